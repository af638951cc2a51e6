"""Handwritten digits with XGBoost."""

import xgboost
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main():
    config = {
        "objective": "multi:softprob",
        "num_class": 10,
        "eta": 0.1,
        "max_depth": 4,
        "subsample": 0.8,
    }
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images, digits, random_state=0)
    training = xgboost.DMatrix(parts[0], parts[2])
    validation = xgboost.DMatrix(parts[1], parts[3])
    xgboost.train(
        config,
        training,
        40,
        evals=[(validation, "validation")],
        verbose_eval=10,
    )


if __name__ == "__main__":
    main()
