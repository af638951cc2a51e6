"""Handwritten digits with LightGBM."""

from hpo import run_script, run_worker
from hpo.loops.lightgbm import StudyCallback

import lightgbm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NEEDS = ("lightgbm", "scikit-learn")


def search_space(trial):
    return {
        "objective": "multiclass",
        "num_class": 10,
        "eta": trial.suggest_float("eta", 0.03, 0.3, log=True),
        "num_leaves": trial.suggest_int("num_leaves", 4, 31),
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
    }


def objective(trial):
    config, callback = search_space(trial), StudyCallback(trial)
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images, digits, random_state=0)
    training = lightgbm.Dataset(parts[0], parts[2])
    validation = lightgbm.Dataset(parts[1], parts[3])
    lightgbm.train(
        config,
        training,
        callback.left(40),
        valid_sets=[validation],
        callbacks=callback.both,
        init_model=callback.model,
    )
    return callback.value


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
