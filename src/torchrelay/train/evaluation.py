"""Step 7, the test: every sample once, in blocks whose sums are added in the order of the data."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.device.device import Device
from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.errors import UsageError
from torchrelay.tasks.metrics import Count
from torchrelay.tasks.targets import explain
from torchrelay.tasks.task import Task
from torchrelay.train.views import Forward

_WAITING = 1024  # steps whose sums may wait: an epoch can have millions


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


class RunningSums:
    """RunningSums of loss and measures over batches, kept on the device until somebody asks.

    They are added one after another in float64, so when they are fetched makes no difference to a bit. Where several
    processes train, they are added in the order in which one process would have computed them.

    Args:
        group: the processes; all of them fetch at the same time. None: this one alone.
        each: measures that each of them adds a step.
    """

    def __init__(self, group: ProcessGroup | None = None, each: int = 1) -> None:
        self._group, self._each = group, each
        self._losses: list[tuple[Tensor | float, Tensor | float]] = []
        self._measures: list[tuple[dict[str, Tensor | float], Tensor | float]] = []
        self.loss = 0.0
        self.weight = 0.0
        self.measures: dict[str, float] = {}
        self.count = 0

    def add_loss(self, mean: Tensor, weight: Tensor | float) -> None:
        """Add a batch's mean loss, which counts by its weight."""
        self._losses.append((_read(mean), _read(weight)))
        if len(self._losses) >= _WAITING:
            self.fetch()

    def add_measures(self, measures: dict[str, Tensor], count: Tensor | int) -> None:
        """Add summed measures of `count` things."""
        self._measures.append(({name: _read(value) for name, value in measures.items()}, _read(count)))

    def fetch(self) -> None:
        """Add up what waits, which waits for the device."""
        for loss, weight in self._losses:
            self.loss += float(loss) * float(weight) if float(weight) else 0.0  # a mean over nothing is no number
            self.weight += float(weight)
        names, rows = self._in_order()
        if len(rows):
            before = [float(self.count), *(self.measures.get(name, 0.0) for name in names)]
            # One after another, as a loop would: numpy's accumulate doesn't add in pairs as its sum does.
            count, *totals = np.add.accumulate(np.vstack([before, rows]), axis=0)[-1].tolist()
            self.count = int(count)
            self.measures |= dict(zip(names, totals, strict=True))
        self._losses.clear()
        self._measures.clear()

    def _in_order(self) -> tuple[list[str], npt.NDArray[np.float64]]:
        """Return the measures' names, and (rows, 1 + names) counts and measures in the order of one process."""
        names = next((list(measures) for measures, _ in self._measures if measures), list(self.measures))
        group = self._group if self._group is not None and self._group.size > 1 and self._measures else None
        if group is not None:  # a process that has had no sample yet doesn't know them
            names = json.loads(group.broadcast_bytes(json.dumps(names).encode()))
        own = [[float(count), *(float(there.get(name, 0.0)) for name in names)] for there, count in self._measures]
        rows = np.array(own, dtype=np.float64).reshape(len(own), 1 + len(names))
        if group is None:
            return names, rows
        gathered = group.gather(torch.from_numpy(rows)).numpy()
        # Of each step, the last process's come first, as the last replica does.
        steps = gathered.reshape(group.size, len(own) // self._each, self._each, 1 + len(names))
        return names, steps[::-1].transpose(1, 0, 2, 3).reshape(-1, 1 + len(names))

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


def _read(value: Tensor | float) -> Tensor | float:
    """Return a tensor on the CPU as a number, anything else as it is.

    A small tensor that is kept from each step lies in the way of the next steps' large ones: the heap grows and grows.
    """
    return value.item() if isinstance(value, Tensor) and value.is_cpu else value


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    task: Task,
    device: Device,
    forward: Forward,
    group: ProcessGroup | None = None,
    check: Callable[[], None] = lambda: None,
    collective_forward: bool = False,
) -> Evaluation:
    """Run a model over data, in evaluation mode, and return its loss and metrics; the mode it had is set again.

    Several processes share the batches. The first one adds up what all of them have found, batch after batch, so the
    figures are those of one process; then all of them know them.

    Args:
        model: whose mode is set.
        batches: each sample once.
        task: what a batch means.
        device: where the batches are.
        forward: the model, or the same compiled.
        group: the processes; None: this one alone.
        check: called before each batch; may raise.
        collective_forward: whether every process must go through the model as often as the others.
    """
    group = group or ProcessGroup(0, 1, device.device)
    was_training = model.training
    model.eval()
    sums, samples = RunningSums(), 0
    metrics: dict[str, Any] = {name: metric.to(device.device) for name, metric in task.metrics().items()}
    for metric in metrics.values():
        metric.distributed_available_fn = lambda: False  # one of torchmetrics would wait for the others, who have none

    def compute(batch: Batch) -> tuple[Any, ...]:
        try:
            with device.autocast():
                outputs = forward(batch.inputs)
                return outputs, task.loss(outputs, batch.targets), batch.targets
        except Exception as error:
            explain(error, batch, model)
            raise

    for outputs, loss, targets in _shared(batches, group, compute, check, collective_forward):
        weight = task.weight(targets)
        sums.add_loss(loss / weight, weight)
        sums.add_measures(task.measure(outputs, targets), task.count(targets))
        samples += len(targets)
        if metrics:
            predictions = task.predict(outputs)
            for metric in metrics.values():
                metric.update(predictions, _as_targets(targets, predictions, metric))
    model.train(was_training)
    if not group.main:
        return _from_main(group)
    found = _result(sums, samples, {name: metric.compute() for name, metric in metrics.items()})
    return found if group.size == 1 else _to_all(found, group)


def _shared(
    batches: Batches,
    group: ProcessGroup,
    compute: Callable[[Batch], tuple[Any, ...]],
    check: Callable[[], None],
    collective_forward: bool,
) -> Iterator[tuple[Any, ...]]:
    """Yield, in the first process, what was computed of all batches in their order; each process computes its own.

    Raises:
        UsageError: there are several processes, and the model gives more than a tensor.
    """
    own = batches.epoch()
    for start in range(0, len(batches), group.size):  # a round: a batch for each process
        check()
        results: tuple[Any, ...] = ()  # the first process has some in every round
        if start + group.rank < len(batches):
            results = compute(next(own))
        elif collective_forward:
            compute(batches.dummy_batch())
        if group.size == 1:
            yield results
            continue
        if not all(isinstance(result, Tensor) for result in results):
            raise UsageError("several processes can't share an evaluation of a model that gives more than a tensor")
        for source in range(min(group.size, len(batches) - start)):
            found = [group.send_to_main(each if group.rank == source else None, source) for each in results]
            if group.main:
                yield tuple(found)


def _to_all(found: Evaluation, group: ProcessGroup) -> Evaluation:
    """Tell the other processes what the first one found."""
    facts = asdict(replace(found, confusion=None))
    facts["confusion"] = None if found.confusion is None else found.confusion.tolist()
    group.broadcast_bytes(json.dumps(facts).encode())
    return found


def _from_main(group: ProcessGroup) -> Evaluation:
    facts = json.loads(group.broadcast_bytes(None))
    confusion = facts.pop("confusion")
    return Evaluation(**facts, confusion=None if confusion is None else torch.tensor(confusion))


def _as_targets(targets: Tensor, predictions: Tensor, metric: Any) -> Tensor:
    """Return 0/1 targets of (batch, labels) as integers, which torchmetrics wants."""
    wanted = targets.is_floating_point() and targets.shape == predictions.shape and not isinstance(metric, Count)
    return targets.long() if wanted else targets


def _result(sums: RunningSums, samples: int, computed: dict[str, Tensor]) -> Evaluation:
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
def predict(
    model: nn.Module,
    batches: Batches,
    task: Task,
    device: Device,
    forward: Forward,
    group: ProcessGroup | None = None,
    collective_forward: bool = False,
) -> Tensor:
    """Return what the task makes of the outputs for each sample, in the order of the data, on the CPU."""
    group = group or ProcessGroup(0, 1, device.device)
    was_training = model.training
    model.eval()

    def compute(batch: Batch) -> tuple[Any, ...]:
        with device.autocast():
            return (task.predict(forward(batch.inputs)),)

    found = [predicted.cpu() for (predicted,) in _shared(batches, group, compute, lambda: None, collective_forward)]
    model.train(was_training)
    if group.size == 1:
        return torch.cat(found)
    packed = safetensors.torch.save({"all": torch.cat(found)}) if group.main else None
    predicted_by_all: Tensor = safetensors.torch.load(group.broadcast_bytes(packed))["all"]
    return predicted_by_all
