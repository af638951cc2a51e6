"""Handwritten digits with Keras."""

import os

os.environ["KERAS_BACKEND"] = "torch"
import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main():
    keras.utils.set_random_seed(0)
    config = {"units": 64, "lr": 1e-3}
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
    )


if __name__ == "__main__":
    main()
