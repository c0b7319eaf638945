"""MNIST or Fashion-MNIST from their idx files, with two convolutions.

    python examples/mnist.py FOLDER

Without a folder it trains on scikit-learn's smaller digits. Debian's package dataset-fashion-mnist has idx files.
"""

import sys

import torch
from torch import nn

import torchrelay as tr


def main(root: str | None = None, run: str = "runs/mnist", epochs: int = 8) -> float:
    train, test = tr.data.mnist(root) if root else tr.data.digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip
    model(train.inputs[:1] / 255)  # a lazy layer learns its size
    trainer = tr.Trainer(
        model,
        train,
        test,
        optimizer=tr.optim.AdamW(lr=2e-3),
        schedule=tr.optim.OneCycle(),
        epochs=epochs,
        batch_size=64,
        run=run,
    )
    return trainer.fit()["accuracy"]


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else None)
