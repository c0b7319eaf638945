"""Contrastive learning (SimCLR, Chen et al., 2020): the features of two views of an image should agree; no labels.

The loss compares the images of a batch with each other; with several replicas, each compares its own part.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import torchrelay as tr


class Contrastive(tr.Task):
    """Each view must identify the other view of its image among the views of all images."""

    headline = "found"
    higher_is_better = percent = True

    def compute(self, model: Any, batch: Any, update: str) -> tuple[Tensor, Tensor]:
        views = torch.cat([view(batch.inputs), view(batch.inputs)])
        features = F.normalize(model(views), dim=1)
        likeness = (features @ features.T / 0.2).fill_diagonal_(-1e9)
        other = torch.arange(len(views), device=views.device).roll(batch.samples)
        # A sum over the images, each of which has two views.
        return F.cross_entropy(likeness, other, reduction="sum") / 2, (likeness.argmax(1) == other).float()

    def measure(self, outputs: Tensor, targets: Any) -> dict[str, Tensor]:
        return {"found": outputs.sum() / 2}


def view(images: Tensor) -> Tensor:
    """Shift the images by up to a pixel and add noise; PyTorch's generator is reseeded for each step."""
    moved = F.pad(images, (1, 1, 1, 1))
    y, x = torch.randint(3, (2,)).tolist()
    moved = moved[..., y : y + images.shape[-2], x : x + images.shape[-1]]
    return moved + 0.15 * torch.randn_like(moved)


def nearest_neighbors(known: Tensor, labels: Tensor, new: Tensor) -> Tensor:
    """Return the labels of the known features that are nearest to the new ones."""
    return labels[(F.normalize(new, dim=1) @ F.normalize(known, dim=1).T).argmax(1)]


def main(run: str = "runs/contrastive", epochs: int = 6) -> float:
    train, test = tr.data.digits()
    images = [part.inputs / 255 for part in (train, test)]
    settings = tr.ModelSettings(name="small-cnn")
    torch.manual_seed(0)
    model = tr.models.build(settings, classes=64, channels=1, image_size=8, log=print)
    optimizer = tr.optim.AdamW(lr=2e-3)
    trainer = tr.Trainer(
        model, *images, task=Contrastive(), optimizer=optimizer, epochs=epochs, batch_size=128, run=run
    )
    trainer.fit()
    found = nearest_neighbors(trainer.predict(images[0]), train.targets, trainer.predict(images[1]))
    return float((found == test.targets).float().mean())


if __name__ == "__main__":
    print(f"accuracy of the nearest neighbor: {main():.2%}")
