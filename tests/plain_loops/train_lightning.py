"""Handwritten digits with Lightning."""

import torch
from lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split


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


def main():
    torch.manual_seed(0)
    config = {"width": 64, "lr": 1e-3}
    images, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float() / 16, torch.tensor(digits))
    training, validation = random_split(data, [1400, 397])
    loaders = DataLoader(training, 64, shuffle=True), DataLoader(validation, 397)
    trainer = Trainer(
        max_epochs=5,
    )
    trainer.fit(Net(config), *loaders)


if __name__ == "__main__":
    main()
