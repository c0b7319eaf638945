"""Step 6: one class per pixel."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrelay.data.labels import TargetError, out_of_range, wrong_label
from torchrelay.errors import RelayError
from torchrelay.tasks.metrics import IoUByClass, MeanIoU, PixelConfusion
from torchrelay.tasks.targets import REFUSALS, refused_classes
from torchrelay.tasks.task import Loss, Task


class Segmentation(Task):
    """One class per pixel: the mean cross entropy over pixels, mean IoU, IoU by class, pixel accuracy.

    torchvision's models, which return a dict, are taken as they are.

    Args:
        classes: their number; the trainer sets it if the data knows it.
        ignore: the class of pixels that don't count.
        aux_weight: the weight of the auxiliary loss, of a model that returns {"out": …, "aux": …}.
    """

    headline = "mean_iou"
    higher_is_better = True
    percent = True

    def __init__(self, classes: int | None = None, ignore: int = 255, aux_weight: float = 0.5) -> None:
        self.classes, self.ignore, self.aux_weight = classes, ignore, aux_weight

    def check(self, targets: Tensor, name: str) -> None:  # noqa: ARG002 - as in `Task`
        """Refuse classes out of range, except the ignored one."""
        if (label := wrong_label(targets, self.classes, self.ignore)) is not None:
            raise out_of_range(label, self.classes)

    def weight(self, targets: Tensor) -> Tensor:
        """Return the number of pixels that count."""
        return self.count(targets).float()

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of pixels that count, without waiting for the device."""
        return (targets != self.ignore).sum()

    def loss(self, outputs: Any, targets: Tensor) -> Loss:
        """Return the summed cross entropy of (batch, classes, height, width) logits and (batch, height, width) classes.

        Where the outputs are a dict, each entry has a loss; that of "out" has weight 1, the others `aux_weight`.
        """
        if not isinstance(outputs, Mapping):
            return self._cross_entropy(outputs, targets)
        losses = {name: self._cross_entropy(logits, targets) for name, logits in outputs.items()}
        return {name: loss if name == "out" else self.aux_weight * loss for name, loss in losses.items()}

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim != 4 or logits.shape[2:] != targets.shape[1:]:
            raise TargetError(
                f"the model gives {tuple(logits.shape)} for targets of {tuple(targets.shape)}: it must give (batch, "
                "classes, height, width), and the targets must be (batch, height, width)"
            )
        # Pixels as rows: PyTorch's loss for images isn't deterministic on CUDA.
        rows, classes = logits.movedim(1, -1).flatten(0, 2), targets.flatten().long()
        try:
            return F.cross_entropy(rows, classes, ignore_index=self.ignore, reduction="sum")
        except REFUSALS as error:
            if (fault := refused_classes(rows, classes, self.ignore)) is None:
                raise
            raise fault from error

    def measure(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """Return the number of correct pixels."""
        correct = (self.predict(outputs) == targets) & (targets != self.ignore)
        return {"pixel_accuracy": correct.sum()}

    def metrics(self) -> Mapping[str, Any]:
        """Return the mean IoU, the IoU of each class, and the confusion matrix of the pixels."""
        if self.classes is None:
            raise RelayError("Segmentation doesn't know how many classes there are: give Segmentation(classes=...)")
        kinds = {"mean_iou": MeanIoU, "iou_by_class": IoUByClass, "confusion_matrix": PixelConfusion}
        return {name: kind(self.classes, self.ignore) for name, kind in kinds.items()}

    def per_sample(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """Return each image's mean IoU, of the classes that it has or that are predicted in it."""
        classes, predicted = self.classes or 0, self.predict(outputs)
        # An image's pixels are counted apart from those of the others, and ignored ones in a bin of their own.
        bins = torch.where(targets == self.ignore, classes**2, targets.long() * classes + predicted).flatten(1)
        size = classes**2 + 1
        bins += size * torch.arange(len(bins), device=bins.device)[:, None]
        counts = torch.bincount(bins.flatten(), minlength=size * len(bins)).view(-1, size)[:, :-1]
        counts = counts.view(-1, classes, classes)
        both = counts.diagonal(dim1=1, dim2=2)
        return {"mean_iou": (both / (counts.sum(1) + counts.sum(2) - both).float()).nanmean(1)}

    def predict(self, outputs: Any) -> Tensor:
        """Return (batch, height, width) classes, int64."""
        logits: Tensor = outputs["out"] if isinstance(outputs, Mapping) else outputs
        return logits.argmax(1)
