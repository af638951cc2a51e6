"""Handwritten digits with scikit-learn, by cross-validation."""

from hpo import run_script, run_worker
from hpo.loops.folds import over_folds

from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

NEEDS = "scikit-learn"


def search_space(trial):
    c = trial.suggest_float("C", 0.1, 100, log=True)
    gamma = trial.suggest_float("gamma", 1e-4, 1e-2, log=True)
    return {"C": c, "gamma": gamma}


def objective(trial):
    config = search_space(trial)
    images, digits = load_digits(return_X_y=True)

    def fit(train, test):
        model = SVC(**config).fit(images[train], digits[train])
        return model.score(images[test], digits[test])

    return over_folds(trial, StratifiedKFold(5).split(images, digits), fit)


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
