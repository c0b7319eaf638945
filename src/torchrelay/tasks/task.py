"""Step 6: what a batch means: its loss, and how well the network did.

The trainer knows nothing of classes, pixels or tokens; a task tells it. A task of your own needs a `headline` and a
`loss`, some ten lines in all; see `examples/own_task.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from torchrelay.settings import Settings


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
