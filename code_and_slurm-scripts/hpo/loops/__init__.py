"""Training loops that one does not own.  Used by scripts alone.

command.py      any program: a command line (process.py runs it, metric.py finds its metric)
folds.py        cross-validation, as with scikit-learn
huggingface.py  the Trainer of transformers
keras.py        Keras 3
lightning.py    the Trainer of Lightning
xgboost.py      XGBoost; lightgbm.py LightGBM (rounds.py: what they have in common)
"""
