"""Train your own model: any nn.Module, on data that comes with scikit-learn."""

import torch
from torch import Tensor, nn

import torchrelay as tr


class Net(nn.Module):
    """Two convolutions and a linear layer for 8x8 gray images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> (batch, classes)
        return self.head(self.features(images).flatten(1))  # type: ignore[no-any-return]


def main(run: str = "runs/own-model", epochs: int = 8) -> float:
    train, test = tr.data.digits()
    # You create the initial weights, so you seed them.
    torch.manual_seed(0)
    trainer = tr.Trainer(
        Net(),
        train,
        test,
        optimizer=tr.optim.SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule=tr.optim.OneCycle(),
        epochs=epochs,
        batch_size=64,
        run=run,
    )
    return trainer.fit()["accuracy"]


if __name__ == "__main__":
    main()
