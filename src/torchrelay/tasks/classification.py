"""Step 6: one class per sample."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrelay.data.labels import TargetError, out_of_range, wrong_label
from torchrelay.errors import RelayError, UsageError
from torchrelay.tasks.metrics import AccuracyByClass, ConfusionMatrix, TopAccuracy
from torchrelay.tasks.targets import REFUSALS, refused_classes
from torchrelay.tasks.task import Task

_NO_LABEL = torch.iinfo(torch.int64).min  # PyTorch ignores -100 by default; no label is ignored here


class Classification(Task):
    """One class per sample: cross entropy, top-1 and top-5 accuracy, accuracy by class.

    Args:
        label_smoothing: fraction of the target that is spread evenly over all classes (Szegedy et al., CVPR 2016).
        class_weights: (classes,), the weight of a sample of each class.
        classes: their number, needed for the metrics by class; the trainer sets it if the data knows it.
    """

    headline = "accuracy"
    higher_is_better = True
    percent = True

    def __init__(
        self, label_smoothing: float = 0.0, class_weights: Tensor | None = None, classes: int | None = None
    ) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise UsageError(f"label_smoothing is {label_smoothing}: choose a share from 0 up to, not including, 1")
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.classes = classes if class_weights is None else len(class_weights)
        self._highest, self._where = -1, ""  # the highest label in `check`, and its sample

    def check(self, targets: Tensor, name: str) -> None:
        """Refuse labels out of range, and numbers that are neither classes nor probabilities of classes."""
        if targets.is_floating_point():
            if targets.ndim == 1:
                raise TargetError("a class is a whole number: give integers, or another task, such as Regression()")
            return
        label = wrong_label(targets, self.classes)
        if label is not None:
            raise out_of_range(label, self.classes)
        if (highest := int(targets.max())) > self._highest:
            self._highest = highest
            self._where = f"sample {int((targets == highest).nonzero()[0, 0])} of {name}"

    def _check_outputs(self, classes: int) -> None:
        """Refuse a model without an output for each class: a GPU would stop without saying why."""
        if classes == 1 and max(self.classes or 0, self._highest + 1) == 2:
            raise RelayError(
                "the model gives 1 output for 2 classes: build it with 2, or give loss=nn.BCEWithLogitsLoss(), which "
                "takes one logit"
            )
        if self.classes is not None and classes != self.classes:
            raise RelayError(
                f"the model gives {classes} outputs for {self.classes} classes: build it with {self.classes} "
                f"(often num_classes={self.classes})"
            )
        if classes <= self._highest:
            raise RelayError(
                f"the model gives {classes} outputs, but {self._where} has label {self._highest}: build it with "
                f"{self._highest + 1}, or correct the label"
            )

    def _weights(self, targets: Tensor) -> Tensor | None:
        if self.class_weights is not None and self.class_weights.device != targets.device:
            self.class_weights = self.class_weights.to(targets.device)
        return self.class_weights

    def weight(self, targets: Tensor) -> Tensor | float:
        """Return the number of samples, or the sum of their classes' weights."""
        weights = self._weights(targets)
        if weights is None:
            return float(len(targets))
        if targets.is_floating_point():
            return (targets @ weights).sum()
        try:
            return weights[targets].sum()
        except IndexError as error:
            if (label := wrong_label(targets, len(weights))) is None:
                raise
            raise out_of_range(label, len(weights)) from error

    def weight_of(self, samples: int) -> float | None:
        """Return the number of samples if the classes have no weights."""
        counted = self.class_weights is None and type(self).weight is Classification.weight
        return float(samples) if counted else None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross entropy.

        Args:
            outputs: (batch, classes) logits.
            targets: (batch,) class indices, or (batch, classes) probabilities, as mixup makes them.
        """
        weights, smoothing = self._weights(targets), self.label_smoothing
        try:
            self._check_outputs(outputs.shape[1])
            return F.cross_entropy(
                outputs, targets, weights, reduction="sum", label_smoothing=smoothing, ignore_index=_NO_LABEL
            )
        except REFUSALS as error:
            if (fault := refused_classes(outputs, targets)) is None:
                raise
            raise fault from error

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the number of correct predictions; a mixed target counts as its most probable class."""
        if targets.is_floating_point():
            targets = targets.argmax(1)
        return {"accuracy": (outputs.argmax(1) == targets).count_nonzero()}

    def metrics(self) -> Mapping[str, Any]:
        """Return top-5 accuracy (from six classes on), accuracy by class and the confusion matrix."""
        if self.classes is None or self.classes < 2:
            return {}
        by_class = {
            "accuracy_by_class": AccuracyByClass(self.classes),
            "confusion_matrix": ConfusionMatrix(self.classes),
        }
        return by_class | ({"top5_accuracy": TopAccuracy(5)} if self.classes > 5 else {})

    def per_sample(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each sample's loss without class weights, its most probable class with its probability, its class."""
        confidence, prediction = outputs.float().softmax(1).max(1)
        loss = F.cross_entropy(outputs.float(), targets, reduction="none", label_smoothing=self.label_smoothing)
        target = targets.argmax(1) if targets.is_floating_point() else targets
        return {"loss": loss, "prediction": prediction, "confidence": confidence, "target": target}

    def predict(self, outputs: Tensor) -> Tensor:
        """Return (batch, classes) probabilities."""
        return outputs.float().softmax(1)


def balanced_weights(targets: Tensor, classes: int) -> Tensor:
    """Return (classes,) float32 weights inverse to the frequency of each class in `targets`, one on average."""
    counts = torch.bincount(targets, minlength=classes).clamp(min=1)
    return (len(targets) / (classes * counts)).float()
