"""Step 6: a loss of PyTorch's as a task.

PyTorch's losses return the mean over the batch that they are given. A part of a batch has to return a sum instead, and
the whole batch a divisor that follows from its targets alone, such that the quotient is the loss's own mean.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchrelay.data.labels import TargetError
from torchrelay.errors import RelayError
from torchrelay.tasks.targets import REFUSALS, refused_classes
from torchrelay.tasks.task import Task

_CLOSE = 0.02  # of the mean; a wrong divisor is wrong by more, and bf16 by less


class Criterion(Task):
    """A loss that is called with (outputs, targets), as PyTorch has them.

    Args:
        name: its name.
        sum_of: returns its sum over a part of a batch.
        mean_of: returns its mean over a batch; the first batch is divided as a check.

    Attributes:
        modules: of PyTorch, which belong on the device.
    """

    def __init__(self, name: str, sum_of: Callable[..., Any], mean_of: Callable[..., Any]) -> None:
        self.name = name
        self.modules = (sum_of, mean_of)
        self._is_checked = False

    def weight(self, targets: Any) -> Tensor | float:
        """Return the number of values."""
        return float(targets.numel())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum."""
        sum_of, mean_of = self.modules
        found: Tensor = sum_of(outputs, targets)
        if not self._is_checked:
            self._is_checked = True
            with torch.no_grad():
                mean, divided = float(mean_of(outputs, targets)), float(found / self.weight(targets))
            if abs(divided - mean) > _CLOSE * abs(mean):
                raise RelayError(
                    f"the mean of {self.name} is {mean:.4g}, and its sum by the number of targets {divided:.4g}: write "
                    "a tr.Task with loss(outputs, targets), the sum, and weight(targets), what it is divided by"
                )
        return found

    def per_sample(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return each sample's loss, its mean over the values that it has; and a target that is a number."""
        each: Any = copy.copy(self.modules[0])
        if isinstance(each, functools.partial):
            each = functools.partial(each, reduction="none")
        else:
            each.reduction = "none"
        found = each(outputs, targets)
        has_rows = isinstance(found, Tensor) and found.ndim and len(found) == len(targets)
        loss = {"loss": found.reshape(len(found), -1).float().mean(1)} if has_rows else {}
        return loss | super().per_sample(outputs, targets)


class OfValues(Criterion):
    """A loss with a term for each value of the targets, such as the absolute error."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum; outputs of (batch, 1) are compared with targets of (batch,)."""
        outputs = outputs.view_as(targets) if outputs.numel() == targets.numel() else outputs
        if outputs.shape != targets.shape:
            raise TargetError(
                f"the model gives {tuple(outputs.shape)} for targets of {tuple(targets.shape)}: make them equal"
            )
        return super().loss(outputs, targets.to(outputs.dtype))

    def per_sample(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each sample's mean loss, its values as they are predicted, and as they are."""
        found = super().per_sample(prediction := outputs.view_as(targets), targets.to(outputs.dtype))
        return found | {"prediction": prediction, "target": targets}


class OfSamples(Criterion):
    """A loss with a term for each sample."""

    def weight(self, targets: Any) -> float:
        """Return the number of samples."""
        return float(len(targets))

    def weight_of(self, samples: int) -> float:
        """Return the number of samples."""
        return float(samples)


class OfClasses(Criterion):
    """A loss with a term for each position that has a class: of each sample, pixel or token.

    Args:
        name: its name.
        sum_of: a module with `ignore_index` and `weight`, a weight of each class or None.
        mean_of: another one.
    """

    headline = "accuracy"
    higher_is_better = True
    percent = True

    def weight(self, targets: Tensor) -> Tensor | float:
        """Return the number of positions that count, or the sum of their classes' weights."""
        if targets.is_floating_point():
            return float(targets.numel() // targets.shape[1])
        counted, weights = self._counted(targets), getattr(self.modules[0], "weight", None)
        if weights is None:
            return counted.sum().float()
        found: Tensor = (weights[targets.where(counted, 0)] * counted).sum()
        return found

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum."""
        try:
            return super().loss(outputs, targets)
        except REFUSALS as error:
            if (fault := refused_classes(outputs, targets, self.modules[0].ignore_index)) is None:  # type: ignore[attr-defined]
                raise
            raise fault from error

    def _counted(self, targets: Tensor) -> Tensor:
        ignored: int = self.modules[0].ignore_index  # type: ignore[attr-defined]
        return targets != ignored

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the number of correct predictions; a mixed target counts as its most probable class."""
        if targets.is_floating_point():
            return {"accuracy": (outputs.argmax(1) == targets.argmax(1)).count_nonzero()}
        return {"accuracy": ((outputs.argmax(1) == targets) & self._counted(targets)).sum()}

    def count(self, targets: Tensor) -> Tensor | int:
        """Return the number of positions that count."""
        return targets.numel() // targets.shape[1] if targets.is_floating_point() else self._counted(targets).sum()

    def per_sample(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each sample's mean loss; and where it has one class, what is predicted, with its probability."""
        found = super().per_sample(outputs, targets)
        if outputs.ndim != 2:
            return found
        confidence, prediction = self.predict(outputs).max(1)
        target = targets.argmax(1) if targets.is_floating_point() else targets
        return found | {"prediction": prediction, "confidence": confidence, "target": target}

    def predict(self, outputs: Tensor) -> Tensor:
        """Return (batch, classes, …) probabilities."""
        return outputs.float().softmax(1)  # of log-probabilities too
