"""A small network on MNIST."""

import optuna
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from hpo import Settings, checkpoint, run_script, run_worker
from hpo.train.mnist import prepare  # noqa: F401  unpacks the data


class Net(nn.Module):
    def __init__(self, channels, dropout):
        super().__init__()
        self.convolution = nn.Conv2d(1, channels, 5, padding=2)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels * 7 * 7, 10)

    def forward(self, images):
        x = functional.relu(functional.max_pool2d(self.convolution(images), 4))
        return self.linear(self.dropout(x.flatten(1)))


def search_space(trial):
    return {
        "channels": trial.suggest_categorical("channels", [8, 16, 32]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        "lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
        "epochs": trial.suggest_categorical("epochs", [2, 3, 5]),
    }


def validate(model, loader, device):
    model.eval()
    loss = 0.0
    with torch.no_grad():
        for images, labels in loader:
            logits = model(images.to(device))
            loss += functional.cross_entropy(logits, labels.to(device), reduction="sum").item()
    return loss / len(loader.dataset)


def train_model(config, trial):
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = MNIST("../data", download=True, transform=ToTensor())
    training = Subset(data, range(Settings.from_env().train_images))
    loader = DataLoader(training, 64, shuffle=True)
    validation = DataLoader(Subset(data, range(50_000, 60_000)), 500)
    model = Net(config["channels"], config["dropout"]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])

    losses = checkpoint.load(trial, model, optimizer)
    for epoch in range(len(losses), config["epochs"]):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            logits = model(images.to(device))
            functional.cross_entropy(logits, labels.to(device)).backward()
            optimizer.step()
        loss = validate(model, validation, device)
        losses.append(loss)
        trial.report(loss, epoch)
        checkpoint.save(trial, model, optimizer, losses)
        if trial.should_prune():
            raise optuna.TrialPruned
    return losses[-1]


def objective(trial):
    return train_model(search_space(trial), trial)


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
