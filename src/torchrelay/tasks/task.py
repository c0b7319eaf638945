"""Step 6: what a batch means: its loss, and how well the network did.

The trainer knows nothing of classes, pixels or tokens; a task tells it. A task of your own needs a `headline` and a
`loss`, some ten lines in all; see `examples/own_task.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from torchrelay.errors import RelayError, UsageError
from torchrelay.settings import Settings
from torchrelay.tasks.metrics import AccuracyByClass, ConfusionMatrix, TopAccuracy
from torchrelay.tasks.targets import REFUSALS, TargetError, out_of_range, refused_classes, wrong_label

_NO_LABEL = torch.iinfo(torch.int64).min  # PyTorch leaves out -100 unasked; where no label is to be ignored, none is


class LossSettings(Settings):
    """What is minimized; it also says what the targets are."""

    name: str = "cross_entropy"
    """cross_entropy (classes), bce (several labels each), mse (numbers), next_token (texts), or a task in --code."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target spread evenly over all classes (cross_entropy, next_token)."""
    class_weights: list[float] | Literal["balanced"] | None = None
    """A weight for each class, or "balanced": inversely to how often the training data has it (cross_entropy, bce)."""


class Task(ABC):
    """What a batch means. The trainer calls the methods in this order: `weight`, `loss`, `measure`, `metrics`.

    The trainer divides the summed loss by the weight of the whole global batch before it goes backward, so a loss is a
    mean over the global batch however it is divided, an uneven last batch included.
    """

    headline: str = "loss"
    """The metric that "best" and early stopping go by."""
    higher_is_better: bool = False
    percent: bool = False
    """Whether the headline metric is a share that people read as a percentage."""

    def check(self, targets: Tensor, name: str) -> None:  # noqa: B027 - an overridable default
        """Look at all targets (samples, …) of data in memory, once before the first step; `name` is the data's.

        Raises:
            TargetError: one can't be learnt.
        """

    def weight(self, targets: Tensor) -> Tensor | float:
        """Return what the summed loss is divided by, from the targets alone; as it stands: the number of samples."""
        return float(len(targets))

    def weight_of(self, samples: int) -> float | None:
        """Return the weight of so many samples if their number alone decides it; None if the targets do.

        Then several processes needn't ask each other before each step.
        """
        return float(samples) if type(self).weight is Task.weight else None

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss summed over a part of the batch, a tensor without dimensions."""

    def measure(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - an overridable default
        """Return cheap measures summed over a part of the batch, kept on the device; the trainer divides by `count`."""
        return {}

    def count(self, targets: Tensor) -> Tensor | int:
        """Return over how many things `measure` has summed, on the device if counted there; by default samples."""
        return len(targets)

    def metrics(self) -> Mapping[str, Any]:
        """Return fresh metrics for an evaluation, by name: of torchmetrics, or `Count`s of your own.

        Each is updated with (predictions, targets).
        """
        return {}

    def predict(self, outputs: Any) -> Any:
        """Return what a person would want to see of the outputs; as it stands: the outputs."""
        return outputs


class Classification(Task):
    """One class a sample: cross entropy, top-1 and top-5 accuracy, accuracy by class.

    Args:
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al., CVPR 2016).
        class_weights: (classes,) how much a sample of each class counts.
        classes: how many there are; needed for the metrics by class and set by the trainer where it knows them.
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
        self._highest, self._where = -1, ""  # of the labels that `check` has seen, and which sample has it

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
        """Refuse a model that doesn't have an output for each class: a GPU would stop without saying why."""
        if self.classes is not None and classes != self.classes:
            raise RelayError(
                f"the model gives {classes} outputs for {self.classes} classes: build it with {self.classes} "
                f"(often num_classes={self.classes})"
            )
        if classes <= self._highest:
            raise RelayError(
                f"the model gives {classes} outputs, but {self._where} has label {self._highest}: build it with "
                f"{self._highest + 1}, or mend the label"
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
        """Return the number of samples where classes have no weights."""
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
        """Return how many were right; with mixed targets, by the class that has the larger part."""
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

    def predict(self, outputs: Tensor) -> Tensor:
        """Return (batch, classes) probabilities."""
        return outputs.float().softmax(1)


class MultiLabel(Task):
    """Any number of labels a sample: binary cross entropy, meant over samples and labels.

    Args:
        positive_weights: (labels,) how much a positive of each label counts against its negatives.
        labels: how many there are; needed for the F1 score and set by the trainer where it knows them.
    """

    headline = "f1"
    higher_is_better = True
    percent = True

    def __init__(self, positive_weights: Tensor | None = None, labels: int | None = None) -> None:
        self.positive_weights = positive_weights
        self.classes = labels  # the name by which the trainer sets it

    def check(self, targets: Tensor, name: str) -> None:  # noqa: ARG002 - as in `Task`
        """Refuse targets that don't lie between 0 and 1."""
        wrong = targets[(targets < 0) | (targets > 1)]
        if len(wrong):
            raise TargetError("each label is there (1) or not (0): mend it", wrong[0].item())

    def weight(self, targets: Tensor) -> float:
        """Return the number of samples times the number of labels."""
        return float(targets.numel())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed binary cross entropy of (batch, labels) logits and 0/1 targets."""
        if outputs.shape != targets.shape:
            raise TargetError(
                f"the model gives {tuple(outputs.shape)} for targets of {tuple(targets.shape)}: make them equal"
            )
        weights = None if self.positive_weights is None else self.positive_weights.to(outputs.device)
        return F.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), reduction="sum", pos_weight=weights
        )

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return how many labels were right."""
        return {"accuracy": ((outputs > 0) == (targets > 0.5)).sum()}

    def count(self, targets: Tensor) -> int:
        """Return the number of labels judged."""
        return targets.numel()

    def metrics(self) -> Mapping[str, Any]:
        """Return the F1 score over all labels and each label's."""
        from torchmetrics.classification import MultilabelF1Score

        if self.classes is None:
            raise RelayError("MultiLabel doesn't know how many labels there are: give MultiLabel(labels=...)")
        return {
            "f1": MultilabelF1Score(self.classes, average="micro"),
            "f1_by_label": MultilabelF1Score(self.classes, average="none"),
        }

    def predict(self, outputs: Tensor) -> Tensor:
        """Return (batch, labels) probabilities."""
        return outputs.float().sigmoid()


class Regression(Task):
    """Numbers: the mean squared error, over samples and outputs."""

    headline = "mean_squared_error"

    def weight(self, targets: Tensor) -> float:
        """Return the number of samples times the numbers of each."""
        return float(targets.numel())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed squared error; outputs of (batch, 1) meet targets of (batch,)."""
        outputs = outputs.view_as(targets) if outputs.numel() == targets.numel() else outputs
        if outputs.shape != targets.shape:
            raise TargetError(
                f"the model gives {tuple(outputs.shape)} for targets of {tuple(targets.shape)}: make them equal"
            )
        return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum")

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the squared and the absolute error, summed."""
        error = outputs.view_as(targets).float() - targets.float()
        return {"mean_squared_error": error.square().sum(), "mean_absolute_error": error.abs().sum()}

    def count(self, targets: Tensor) -> int:
        """Return the number of numbers."""
        return targets.numel()


class NextToken(Task):
    """Sequences: cross entropy of each next token.

    Args:
        label_smoothing: as in `Classification`.
        ignore: the target of places that don't count, such as padding.
    """

    headline = "loss"

    def __init__(self, label_smoothing: float = 0.0, ignore: int = -100) -> None:
        self.label_smoothing = label_smoothing
        self.ignore = ignore
        self._highest, self._where = -1, ""  # of the tokens that `check` has seen, and which sample has it

    def check(self, targets: Tensor, name: str) -> None:
        """Refuse tokens below 0, but for those to be ignored."""
        label = wrong_label(targets, None, self.ignore)
        if label is not None:
            raise out_of_range(label, None)
        if (highest := int(targets.max())) > self._highest:
            self._highest = highest
            self._where = f"sample {int((targets == highest).nonzero()[0, 0])} of {name}"

    def weight(self, targets: Tensor) -> Tensor:
        """Return the number of tokens that count."""
        return (targets != self.ignore).sum().float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross entropy of (batch, length, vocabulary) logits and (batch, length) tokens."""
        if outputs.shape[-1] <= self._highest:  # a GPU would stop without saying why
            raise RelayError(
                f"the model gives {outputs.shape[-1]} outputs, but {self._where} has token {self._highest}: "
                f"build it with {self._highest + 1}"
            )
        logits, tokens, smoothing = outputs.flatten(0, 1), targets.flatten(), self.label_smoothing
        try:
            return F.cross_entropy(logits, tokens, ignore_index=self.ignore, reduction="sum", label_smoothing=smoothing)
        except REFUSALS as error:
            if (fault := refused_classes(logits, tokens, self.ignore)) is None:
                raise
            raise fault from error

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return how many tokens were right."""
        return {"accuracy": ((outputs.argmax(-1) == targets) & (targets != self.ignore)).sum()}

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of tokens that count, without waiting for the device."""
        return (targets != self.ignore).sum()

    def predict(self, outputs: Tensor) -> Tensor:
        """Return (batch, length, vocabulary) probabilities."""
        return outputs.float().softmax(-1)


def balanced_weights(targets: Tensor, classes: int) -> Tensor:
    """Return (classes,) float32 weights inverse to how often each class stands in `targets`, one on average."""
    counts = torch.bincount(targets, minlength=classes).clamp(min=1)
    return (len(targets) / (classes * counts)).float()
