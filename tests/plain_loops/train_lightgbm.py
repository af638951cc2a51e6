"""Handwritten digits with LightGBM."""

import lightgbm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main():
    config = {
        "objective": "multiclass",
        "num_class": 10,
        "eta": 0.1,
        "num_leaves": 15,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
    }
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images, digits, random_state=0)
    training = lightgbm.Dataset(parts[0], parts[2])
    validation = lightgbm.Dataset(parts[1], parts[3])
    lightgbm.train(
        config,
        training,
        40,
        valid_sets=[validation],
        callbacks=[lightgbm.log_evaluation(10)],
    )


if __name__ == "__main__":
    main()
