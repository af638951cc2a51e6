"""Handwritten digits with scikit-learn, by cross-validation."""

from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC


def main():
    config = {"C": 1.0, "gamma": 1e-3}
    images, digits = load_digits(return_X_y=True)
    scores = []
    for train, test in StratifiedKFold(5).split(images, digits):
        model = SVC(**config).fit(images[train], digits[train])
        scores.append(model.score(images[test], digits[test]))
    print(f"accuracy {sum(scores) / len(scores):.4f}")


if __name__ == "__main__":
    main()
