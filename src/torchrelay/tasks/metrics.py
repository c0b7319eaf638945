"""Metrics that are counts of right and wrong predictions, kept on the device.

torchmetrics has all of them and many more, but importing it takes 100 MB and one to two seconds. A task of your own may
use it: install the extra `metrics`.
"""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor


class Count(ABC):
    """An int64 tensor of counts that adds up over batches. It has the interface of a torchmetrics metric.

    Args:
        shape: of the tensor.
    """

    def __init__(self, *shape: int) -> None:
        self.counts = torch.zeros(shape, dtype=torch.int64)

    def to(self, device: torch.device) -> Self:
        """Move the counts to a device."""
        self.counts = self.counts.to(device)
        return self

    @abstractmethod
    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            predictions: what the task's `predict` returned: (batch, classes) or (batch, labels) probabilities.
            targets: (batch,) classes, (batch, classes) probabilities, or (batch, labels) zeros and ones.
        """

    @abstractmethod
    def compute(self) -> Tensor:
        """Return the metric of all batches so far."""


class ConfusionMatrix(Count):
    """(classes, classes) int64: the samples of each true class (row) by predicted class (column)."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes, classes)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch of (batch, classes) predictions."""
        classes = len(self.counts)
        pairs = _classes(targets) * classes + predictions.argmax(1)
        self.counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def compute(self) -> Tensor:
        """Return the counts."""
        return self.counts


class AccuracyByClass(ConfusionMatrix):
    """(classes,) float64: the share of each class's samples that was predicted correctly; NaN if it has none."""

    def compute(self) -> Tensor:
        """Return the diagonal divided by the sums of the rows."""
        return self.counts.diagonal() / self.counts.sum(1).double()


class TopAccuracy(Count):
    """Float64 scalar: the share of samples whose class is among the `top` most probable ones."""

    def __init__(self, top: int) -> None:
        super().__init__(2)  # correct, all
        self._top = top

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch of (batch, classes) predictions."""
        correct = (predictions.topk(self._top, dim=1).indices == _classes(targets)[:, None]).sum()
        self.counts += torch.stack((correct, correct.new_full((), len(targets))))

    def compute(self) -> Tensor:
        """Return the share."""
        return self.counts[0] / self.counts[1].clamp(min=1).double()


class PixelConfusion(Count):
    """(classes, classes) int64: the pixels of each true class (row) by predicted class (column).

    Args:
        classes: their number.
        ignore: the class of pixels that don't count.
    """

    def __init__(self, classes: int, ignore: int) -> None:
        super().__init__(classes, classes)
        self._ignore = ignore

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch of classes of the same shape."""
        classes = len(self.counts)
        # Ignored pixels have a bin of their own, as leaving them out would wait for the device.
        pairs = torch.where(targets == self._ignore, classes**2, targets.long() * classes + predictions)
        self.counts += torch.bincount(pairs.flatten(), minlength=classes**2 + 1)[:-1].view(classes, classes)

    def compute(self) -> Tensor:
        """Return the counts."""
        return self.counts


class IoUByClass(PixelConfusion):
    """(classes,) float64: each class's intersection over union; NaN for one neither present nor predicted."""

    def compute(self) -> Tensor:
        """Return the diagonal divided by the pixels that are of the class or predicted as it."""
        both = self.counts.diagonal()
        return both / (self.counts.sum(0) + self.counts.sum(1) - both).double()


class MeanIoU(IoUByClass):
    """Float64 scalar: the mean of the classes' intersections over unions, without those that are NaN."""

    def compute(self) -> Tensor:
        """Return the mean."""
        return super().compute().nanmean()


class F1ByLabel(Count):
    """(labels,) float32: each label's F1 score at a threshold of 0.5; 0 for one neither present nor predicted."""

    def __init__(self, labels: int) -> None:
        super().__init__(3, labels)  # true positives, false positives, false negatives

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch of (batch, labels) predictions."""
        predicted, present = predictions > 0.5, targets > 0.5
        self.counts += torch.stack((predicted & present, predicted & ~present, ~predicted & present)).sum(1)

    def compute(self) -> Tensor:
        """Return the scores."""
        return _f1(*self.counts)


class F1(F1ByLabel):
    """Float32 scalar: the F1 score of all labels together (micro average)."""

    def compute(self) -> Tensor:
        """Return the score."""
        return _f1(*self.counts.sum(1))


def _f1(true_positives: Tensor, false_positives: Tensor, false_negatives: Tensor) -> Tensor:
    # In float32 and in this order of operations, torchmetrics computes the same bits.
    total = 2.0 * true_positives + false_negatives + false_positives
    return torch.where(total > 0, 2.0 * true_positives / total, 0.0)


def _classes(targets: Tensor) -> Tensor:
    return targets.argmax(1) if targets.is_floating_point() else targets
