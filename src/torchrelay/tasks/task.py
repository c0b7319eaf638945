"""Step 6: the contract of a task: what a batch means, its loss and its metrics.

The trainer knows nothing about classes, pixels or tokens; the task does. A task says what is minimized and what people
are told; each method has a default that suits pairs of inputs and targets.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from torchrelay.data.batch import Arguments, Batch, Keywords
from torchrelay.errors import RelayError, UsageError
from torchrelay.settings import Settings

Loss = Tensor | dict[str, Tensor]


class LossSettings(Settings):
    """The loss, which also decides what the targets mean."""

    name: str = "cross_entropy"
    """cross_entropy, bce (several labels each), mse, next_token, segmentation, detection, or a task in --code."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the target that is spread evenly over all classes (cross_entropy, next_token)."""
    class_weights: list[float] | Literal["balanced"] | None = None
    """A weight per class, or "balanced": inverse to its frequency in the data (cross_entropy, bce)."""


class Task:
    """What a batch means. Most tasks need a `headline` and a `loss`; see `examples/own_task.py`.

    Before the backward pass the trainer divides the summed loss by the weight of the global batch. So the loss is a
    mean over the global batch however that is divided, including an uneven last batch. A batch that isn't a pair of
    inputs and targets is in `batch.data` as the dataset's samples were collated.

    Modules that a task holds, such as a teacher or a perceptual loss, are moved to the device; they are neither trained
    nor saved.
    """

    headline: str = "loss"
    """The metric that decides on the best checkpoint and on early stopping."""
    higher_is_better: bool = False
    percent: bool = False
    """Whether the headline metric is a fraction to be shown as a percentage."""
    updates: Sequence[str] = ("main",)
    """The optimizer updates of a step, in their order. Several, such as a GAN's, have an optimizer each, by name."""

    # What the trainer minimizes

    def forward(self, model: Any, batch: Batch) -> Any:
        """Return the model's outputs for a batch: by default of `batch.inputs`.

        Args:
            model: the module, or what runs it on several devices.
            batch: a replica's part of the global batch.
        """
        inputs = batch.inputs
        if isinstance(inputs, Arguments):
            return model(*inputs)
        return model(**inputs) if isinstance(inputs, Keywords) else model(inputs)

    def loss(self, outputs: Any, targets: Any) -> Loss:  # noqa: ARG002 - an overridable default
        """Return the loss summed over a part of the batch, without dimensions.

        A dict of such sums is logged part by part; their total is minimized.
        """
        raise UsageError(
            f"{type(self).__name__} has no loss: define loss(outputs, targets), summed over the samples, or "
            "compute(model, batch, update) if the loss needs the model"
        )

    def compute(self, model: Any, batch: Batch, update: str) -> Loss | tuple[Loss, Any]:  # noqa: ARG002
        """Return the loss of an update, summed over the batch; override it when the loss needs the model.

        Args:
            model: as in `forward`.
            batch: a replica's part of the global batch.
            update: the name of the update, one of `updates`. Only its parameters require gradients meanwhile.

        Returns:
            The loss, or the loss and the outputs that `measure` takes.
        """
        outputs = self.forward(model, batch)
        return self.loss(outputs, batch.targets), outputs

    def module(self, model: nn.Module, update: str) -> nn.Module:
        """Return what an update trains: the model, or where there are several updates, its submodule of that name."""
        if len(self.updates) == 1:
            return model
        part = getattr(model, update, None)
        if not isinstance(part, nn.Module):
            raise UsageError(
                f"{type(model).__name__} has no submodule '{update}', which {type(self).__name__} updates: name it so, "
                "or override Task.module(model, update)"
            )
        return part

    def weight(self, targets: Any) -> Tensor | float:
        """Return the divisor of the summed loss, computed from the targets alone; by default the number of samples."""
        return float(len(targets))

    def weight_of(self, samples: int) -> float | None:
        """Return the weight of a number of samples; None if it depends on the targets.

        If it isn't None, processes needn't communicate it before each step.
        """
        return float(samples) if type(self).weight is Task.weight else None

    # What people are told

    def check(self, targets: Tensor, name: str) -> None:
        """Check all targets (samples, …) of a source in memory, once before the first step; `name` is the source's.

        Raises:
            TargetError: a target can't be learned.
        """

    def measure(self, outputs: Any, targets: Any) -> dict[str, Tensor]:  # noqa: ARG002 - an overridable default
        """Return cheap metrics summed over a part of the batch, on the device; the trainer divides them by `count`."""
        return {}

    def count(self, targets: Any) -> Tensor | int:
        """Return the number of items that `measure` sums over, on the device if counted there; by default samples."""
        return len(targets)

    def metrics(self) -> Mapping[str, Any]:
        """Return new metrics for an evaluation, by name: subclasses of `Count`, or metrics of torchmetrics.

        Each is updated with (what `predict` returns, targets).
        """
        return {}

    def per_sample(self, outputs: Any, targets: Any) -> dict[str, Tensor]:  # noqa: ARG002 - an overridable default
        """Return what an evaluation keeps of each sample, (samples, …) by name; by default a target that is a number.

        "loss", "prediction", "confidence" and "target" are names that a report knows. It is called with whole batches,
        and mustn't change anything; where it returns nothing or fails, nothing is kept.
        """
        return {"target": targets} if isinstance(targets, Tensor) and targets.ndim == 1 else {}

    def evaluate_batch(self, model: Any, batch: Batch) -> tuple[Loss, Any]:
        """Return the summed loss of a batch and the model's outputs, in an evaluation; by default as `compute` does.

        PyTorch's generators are reseeded before each batch, and no gradient is recorded.
        """
        return loss_and_outputs(self, model, batch, self.updates[0])

    def predict(self, outputs: Any) -> Any:
        """Return the outputs in the form that users want, such as probabilities; by default unchanged."""
        return outputs

    def predict_batch(self, model: Any, batch: Batch) -> Any:
        """Return the predictions for a batch; by default of its outputs. Override it to generate, for example."""
        return self.predict(self.forward(model, batch))


def held_modules(task: Task) -> list[nn.Module]:
    """Return the modules that a task holds as attributes, alone or in lists, tuples and dicts."""
    found = list[nn.Module]()
    for value in vars(task).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        found += [each for each in values if isinstance(each, nn.Module)]
    return found


def calls_once(task: Task) -> bool:
    """Return whether a task calls the model once for a batch, as a whole, as the default methods do."""
    return type(task).compute is Task.compute and type(task).forward is Task.forward


def loss_and_outputs(task: Task, model: Any, batch: Batch, update: str) -> tuple[Loss, Any]:
    """Return what `Task.compute` found; the outputs are None if it returned a loss alone."""
    found = task.compute(model, batch, update)
    return found if isinstance(found, tuple) else (found, None)


def total(loss: Any, task: Task) -> Tensor:
    """Return the sum of a loss's parts.

    Raises:
        RelayError: it isn't what a task must return; the text says what was expected.
    """
    if isinstance(loss, dict) and loss:
        return reduce(add, (total(part, task) for part in loss.values()))
    if isinstance(loss, Tensor) and not loss.ndim:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise RelayError(
        f"the loss of {type(task).__name__} is {found}: return a sum over the samples without dimensions (with "
        'reduction="sum", or .sum()), or a dict of such sums'
    )


def weight(task: Task, batch: Batch) -> Tensor | float:
    """Return a task's weight of a batch."""
    counted = task.weight_of(batch.samples)
    return task.weight(batch.targets) if counted is None else counted


def count(task: Task, batch: Batch) -> Tensor | int:
    """Return the number of items of a batch that `measure` sums over."""
    return batch.samples if type(task).count is Task.count else task.count(batch.targets)
