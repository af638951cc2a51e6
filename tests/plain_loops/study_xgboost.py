"""Handwritten digits with XGBoost."""

from hpo import run_script, run_worker
from hpo.loops.xgboost import StudyCallback

import xgboost
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NEEDS = ("xgboost", "scikit-learn")


def search_space(trial):
    return {
        "objective": "multi:softprob",
        "num_class": 10,
        "eta": trial.suggest_float("eta", 0.03, 0.3, log=True),
        "max_depth": trial.suggest_int("max_depth", 2, 6),
        "subsample": 0.8,
    }


def objective(trial):
    config, callback = search_space(trial), StudyCallback(trial)
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images, digits, random_state=0)
    training = xgboost.DMatrix(parts[0], parts[2])
    validation = xgboost.DMatrix(parts[1], parts[3])
    xgboost.train(
        config,
        training,
        callback.left(40),
        evals=[(validation, "validation")],
        callbacks=[callback],
        xgb_model=callback.model,
    )
    return callback.value


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
