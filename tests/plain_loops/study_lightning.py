"""Handwritten digits with Lightning."""

from hpo import checkpoint, run_script, run_worker
from hpo.loops.lightning import StudyCallback, resume

import torch
from lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

NEEDS = ("lightning>=2.6", "scikit-learn")


class Net(LightningModule):
    def __init__(self, config):
        super().__init__()
        self.lr, width = config["lr"], config["width"]
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, _):
        return functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", functional.cross_entropy(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


build_model = Net  # for check_best_model.py --export


def search_space(trial):
    lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    return {"width": trial.suggest_int("width", 16, 128), "lr": lr}


def objective(trial):
    torch.manual_seed(0)
    config, callback = search_space(trial), StudyCallback(trial)
    images, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float() / 16, torch.tensor(digits))
    training, validation = random_split(data, [1400, 397])
    loaders = DataLoader(training, 64, shuffle=True), DataLoader(validation, 397)
    trainer = Trainer(
        max_epochs=5,
        default_root_dir=checkpoint.folder(trial),
        callbacks=[callback],
    )
    trainer.fit(Net(config), *loaders, **resume(trial))
    return callback.value


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
