"""Step 6: the contract of a task: what a batch means, its loss and its metrics.

The trainer knows nothing about classes, pixels or tokens; the task does. A task of your own needs a `headline` and a
`loss`, about ten lines; see `examples/own_task.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from torchrelay.settings import Settings


class LossSettings(Settings):
    """The loss, which also decides what the targets mean."""

    name: str = "cross_entropy"
    """cross_entropy (classes), bce (several labels each), mse (numbers), next_token (texts), or a task in --code."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the target that is spread evenly over all classes (cross_entropy, next_token)."""
    class_weights: list[float] | Literal["balanced"] | None = None
    """A weight per class, or "balanced": inverse to its frequency in the data (cross_entropy, bce)."""


class Task(ABC):
    """What a batch means. The trainer calls the methods in this order: `weight`, `loss`, `measure`, `metrics`.

    Before the backward pass the trainer divides the summed loss by the weight of the global batch. So the loss is a
    mean over the global batch however that is divided, including an uneven last batch.
    """

    headline: str = "loss"
    """The metric that decides on the best checkpoint and on early stopping."""
    higher_is_better: bool = False
    percent: bool = False
    """Whether the headline metric is a fraction to be shown as a percentage."""

    def check(self, targets: Tensor, name: str) -> None:  # noqa: B027 - an overridable default
        """Check all targets (samples, …) of a source in memory, once before the first step; `name` is the source's.

        Raises:
            TargetError: a target can't be learned.
        """

    def weight(self, targets: Tensor) -> Tensor | float:
        """Return the divisor of the summed loss, computed from the targets alone; by default the number of samples."""
        return float(len(targets))

    def weight_of(self, samples: int) -> float | None:
        """Return the weight of a number of samples; None if it depends on the targets.

        If it isn't None, processes needn't communicate it before each step.
        """
        return float(samples) if type(self).weight is Task.weight else None

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss summed over a part of the batch, a scalar tensor."""

    def measure(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - an overridable default
        """Return cheap metrics summed over a part of the batch, on the device; the trainer divides them by `count`."""
        return {}

    def count(self, targets: Tensor) -> Tensor | int:
        """Return the number of items that `measure` sums over, on the device if counted there; by default samples."""
        return len(targets)

    def metrics(self) -> Mapping[str, Any]:
        """Return new metrics for an evaluation, by name: subclasses of `Count`, or metrics of torchmetrics.

        Each is updated with (what `predict` returns, targets).
        """
        return {}

    def predict(self, outputs: Any) -> Any:
        """Return the outputs in the form that users want, such as probabilities; by default unchanged."""
        return outputs
