"""Step 7, the test: what a classification is counted by.

torchmetrics has all of this, and more; its import takes 100 MB and one to two seconds, for what are a few lines.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Count(ABC):
    """Whole numbers that add up over batches, on the device. It is used as a metric of torchmetrics is."""

    def __init__(self, *shape: int) -> None:
        self.counts = torch.zeros(shape, dtype=torch.int64)

    def to(self, device: torch.device) -> "Count":
        """Count on another device."""
        self.counts = self.counts.to(device)
        return self

    @abstractmethod
    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            predictions: (batch, classes) of which the largest counts.
            targets: (batch,) classes, or (batch, classes) probabilities, of which the largest counts.
        """

    @abstractmethod
    def compute(self) -> Tensor:
        """Return what follows from all that was counted."""


class ConfusionMatrix(Count):
    """(classes, classes) int64. Row: what it is; column: what the network said."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes, classes)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count each pair of what it is and what was said."""
        classes = len(self.counts)
        pairs = _classes(targets) * classes + predictions.argmax(1)
        self.counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def compute(self) -> Tensor:
        """Return the counts."""
        return self.counts


class AccuracyByClass(ConfusionMatrix):
    """(classes,) float64: the share of each class's samples that was right; 0 for a class without any."""

    def compute(self) -> Tensor:
        """Return the diagonal's share of each row."""
        return self.counts.diagonal() / self.counts.sum(1).clamp(min=1).double()


class TopAccuracy(Count):
    """The share of samples whose class is among the `top` likeliest ones."""

    def __init__(self, top: int) -> None:
        super().__init__(2)  # right, all
        self._top = top

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count who is right, and all."""
        right = (predictions.topk(self._top, dim=1).indices == _classes(targets)[:, None]).sum()
        self.counts += torch.stack((right, right.new_full((), len(targets))))

    def compute(self) -> Tensor:
        """Return a float64 without dimensions."""
        return self.counts[0] / self.counts[1].clamp(min=1).double()


def _classes(targets: Tensor) -> Tensor:
    return targets.argmax(1) if targets.is_floating_point() else targets
