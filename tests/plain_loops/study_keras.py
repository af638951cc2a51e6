"""Handwritten digits with Keras."""

import os

os.environ["KERAS_BACKEND"] = "torch"
from hpo import run_script, run_worker
from hpo.loops.keras import StudyCallback

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NEEDS = ("keras", "scikit-learn")


def search_space(trial):
    lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    return {"units": trial.suggest_int("units", 16, 128), "lr": lr}


def objective(trial):
    keras.utils.set_random_seed(0)
    config, callback = search_space(trial), StudyCallback(trial)
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, digits, random_state=0)
    model = keras.Sequential(
        [
            keras.layers.Dense(config["units"], "relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(config["lr"]), "sparse_categorical_crossentropy")
    model.fit(
        parts[0],
        parts[2],
        epochs=5,
        validation_data=(parts[1], parts[3]),
        verbose=2,
        initial_epoch=callback.epochs,
        callbacks=[callback],
    )
    return callback.value


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
