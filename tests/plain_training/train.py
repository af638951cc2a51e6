"""A small network on MNIST."""

import argparse

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor


class Net(nn.Module):
    def __init__(self, channels, dropout):
        super().__init__()
        self.convolution = nn.Conv2d(1, channels, 5, padding=2)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels * 7 * 7, 10)

    def forward(self, images):
        x = functional.relu(functional.max_pool2d(self.convolution(images), 4))
        return self.linear(self.dropout(x.flatten(1)))


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=50_000)
    return parser.parse_args()


def validate(model, loader, device):
    model.eval()
    loss = 0.0
    with torch.no_grad():
        for images, labels in loader:
            logits = model(images.to(device))
            loss += functional.cross_entropy(logits, labels.to(device), reduction="sum").item()
    return loss / len(loader.dataset)


def main():
    args = arguments()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = MNIST("../data", download=True, transform=ToTensor())
    training = Subset(data, range(args.images))
    loader = DataLoader(training, 64, shuffle=True)
    validation = DataLoader(Subset(data, range(50_000, 60_000)), 500)
    model = Net(args.channels, args.dropout).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    for epoch in range(args.epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            logits = model(images.to(device))
            functional.cross_entropy(logits, labels.to(device)).backward()
            optimizer.step()
        loss = validate(model, validation, device)
        print(f"epoch {epoch}: validation loss {loss:.4f}")


if __name__ == "__main__":
    main()
