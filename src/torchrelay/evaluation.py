"""Step 7, the test: every sample once, in blocks whose sums are added in the order of the data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchrelay.data.batches import Batch
from torchrelay.device import Device
from torchrelay.faults import explain
from torchrelay.task import Task

Forward = Callable[[Any], Any]  # from inputs to outputs


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    values: dict[str, float]  # loss, and the task's metrics that are one number
    tables: dict[str, list[float]] = field(default_factory=dict)  # metrics with a value a class
    confusion: Tensor | None = None  # (classes, classes) int64: row: what it is, column: what the network said
    samples: int = 0

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return all of it as JSON can hold it, the tables by the classes' names."""
        tables = {name: self.by_class(row, classes) for name, row in self.tables.items()}
        confusion = {} if self.confusion is None else {"confusion_matrix": self.confusion.tolist()}
        return {"samples": self.samples, **self.values, **tables, **confusion}

    @staticmethod
    def by_class(row: Sequence[float], classes: Sequence[str]) -> dict[str, float]:
        """Return a table's values by the classes' names, or by their numbers where the data names none."""
        names = classes if len(classes) == len(row) else [str(i) for i in range(len(row))]
        return dict(zip(names, row, strict=True))


class Sums:
    """Sums of loss and measures over batches, kept on the device until somebody asks.

    They are added one after another in float64, so when they are fetched makes no difference to a bit.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[Tensor, Tensor | float]] = []
        self._measures: list[tuple[dict[str, Tensor], Tensor | int]] = []
        self.loss = 0.0
        self.weight = 0.0
        self.measures: dict[str, float] = {}
        self.count = 0

    def add_loss(self, mean: Tensor, weight: Tensor | float) -> None:
        """Add a batch's mean loss, which counts by its weight."""
        self._losses.append((mean, weight))

    def add_measures(self, measures: dict[str, Tensor], count: Tensor | int) -> None:
        """Add summed measures of `count` things."""
        self._measures.append((measures, count))

    def fetch(self) -> None:
        """Add up what waits, which waits for the device."""
        for loss, weight in self._losses:
            self.loss += float(loss) * float(weight)
            self.weight += float(weight)
        for measures, count in self._measures:
            self.count += int(count)
            for name, value in measures.items():
                self.measures[name] = self.measures.get(name, 0.0) + float(value)
        self._losses.clear()
        self._measures.clear()

    def means(self) -> dict[str, float]:
        """Return the mean loss and measures of all that was added."""
        self.fetch()
        values = {"loss": self.loss / self.weight if self.weight else 0.0}
        return values | {name: value / max(self.count, 1) for name, value in self.measures.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint inside an epoch."""
        self.fetch()
        return {"loss": self.loss, "weight": self.weight, "measures": dict(self.measures), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the sums of a checkpoint."""
        self._losses.clear()
        self._measures.clear()
        self.loss, self.weight, self.count = state["loss"], state["weight"], state["count"]
        self.measures = dict(state["measures"])


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], task: Task, device: Device, forward: Forward) -> Evaluation:
    """Run a model over data, in evaluation mode, and return its loss and metrics; the mode it had is set again.

    Args:
        model: whose mode is set.
        batches: each sample once.
        task: what a batch means.
        device: where the batches are.
        forward: the model, or the same compiled.
    """
    was_training = model.training
    model.eval()
    sums, samples = Sums(), 0
    metrics = {name: metric.to(device.device) for name, metric in task.metrics().items()}
    for batch in batches:
        try:
            with device.autocast():
                outputs = forward(batch.inputs)
                loss = task.loss(outputs, batch.targets)
        except Exception as error:
            explain(error, batch, model)
            raise
        weight = task.weight(batch.targets)
        sums.add_loss(loss / weight, weight)
        sums.add_measures(task.measure(outputs, batch.targets), task.count(batch.targets))
        samples += len(batch.indices)
        if metrics:
            predictions = task.predict(outputs)
            for metric in metrics.values():
                metric.update(predictions, _as_targets(batch.targets, predictions))
    model.train(was_training)
    return _result(sums, samples, {name: metric.compute() for name, metric in metrics.items()})


def _as_targets(targets: Tensor, predictions: Tensor) -> Tensor:
    """Return 0/1 targets as torchmetrics wants them: integers where the targets are labels of (batch, labels)."""
    return targets.long() if targets.is_floating_point() and targets.shape == predictions.shape else targets


def _result(sums: Sums, samples: int, computed: dict[str, Tensor]) -> Evaluation:
    values = sums.means()
    tables: dict[str, list[float]] = {}
    confusion = None
    for name, value in computed.items():
        if value.ndim == 0:
            values[name] = float(value)
        elif value.ndim == 1:
            tables[name] = value.tolist()
        else:
            confusion = value.cpu().long()
    return Evaluation(values, tables, confusion, samples)


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch], task: Task, device: Device, forward: Forward) -> Tensor:
    """Return what the task makes of the outputs for each sample, in the order of the data, on the CPU."""
    was_training = model.training
    model.eval()
    found = []
    for batch in batches:
        with device.autocast():
            outputs = forward(batch.inputs)
        found.append(task.predict(outputs).cpu())
    model.train(was_training)
    return torch.cat(found)
