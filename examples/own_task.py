"""Write your own task: what a batch means, in ten lines. Here an autoencoder, whose targets are its inputs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrelay as tr


class Reconstruct(tr.Task):
    """The squared error of the reconstruction, summed over pixels and images."""

    headline = "squared_error"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets, reduction="sum")

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"squared_error": self.loss(outputs, targets)}


def main(run: str = "runs/own-task", epochs: int = 10) -> float:
    train, test = ((part.inputs.flatten(1) / 255.0) for part in tr.data.digits())  # (samples, 64) in [0, 1]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64)
    )
    trainer = tr.Trainer(
        model,
        (train, train),
        (test, test),
        task=Reconstruct(),
        optimizer=tr.optim.AdamW(lr=3e-3),
        epochs=epochs,
        batch_size=64,
        run=run,
    )
    return trainer.fit()["squared_error"]


if __name__ == "__main__":
    main()
