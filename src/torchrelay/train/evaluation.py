"""Step 7, the test: every sample once, in batches whose sums are added in the order of the data."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.device.device import Device
from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.distributed.strategy import Strategy
from torchrelay.errors import UsageError
from torchrelay.models.ema import EMA
from torchrelay.rng import reseed, step_seed
from torchrelay.run.settings import Views
from torchrelay.tasks.classification import Classification
from torchrelay.tasks.metrics import Count
from torchrelay.tasks.targets import explain
from torchrelay.tasks.task import Task, calls_once, total
from torchrelay.train.progress import RunningSums
from torchrelay.train.record import log
from torchrelay.train.samples import Collector, Samples
from torchrelay.train.shown import Result, metrics_table
from torchrelay.train.trees import joined, pack, to_cpu, unpack
from torchrelay.train.tta import check_tta, with_tta


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

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the metrics, and the range of those of each class."""
        return metrics_table(self.values, self.tables, f"{self.samples:,} samples evaluated")

    @staticmethod
    def by_class(row: Sequence[float], classes: Sequence[str]) -> dict[str, float | None]:
        """Return a table's values by the classes' names, or numbers if they have none; None for one without samples."""
        names = classes if len(classes) == len(row) else [str(i) for i in range(len(row))]
        return {name: None if math.isnan(value) else value for name, value in zip(names, row, strict=True)}


def score(task: Task, values: Mapping[str, float]) -> float | None:
    """Return the task's headline metric such that higher is better; None if it isn't among the values."""
    value = values.get(task.headline)
    return value if value is None or task.higher_is_better else -value


class Evaluator:
    """Runs a model over data in evaluation mode: each sample once, and in the mode that it had afterwards.

    Several processes share the batches. Rank 0 adds up what all of them computed, batch after batch, so the metrics are
    those of one process; then it sends them to the others.

    Args:
        model: whose mode is set.
        task: what a batch means.
        device: where the model is.
        parts: batches of the data to evaluate on, by name; models are selected by the first.
        strategy: runs the model, on several processes; None: the model itself, in this process alone.
        views: how many views of an image the outputs are averaged over (test-time augmentation).
        ema: averaged weights, which are evaluated in place of the model's own.
        before: called before the model's weights are touched, when staged weights must have been copied.

    Attributes:
        selects_on: the part by which the best model is selected; "train" if there is none.
        last: the last evaluation of that part.
        samples: what it found of each sample; on rank 0.
        collective_forward: whether every process must go through the model equally often, as FSDP needs it.

    Raises:
        UsageError: the task can't be evaluated with so many views.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        device: Device,
        parts: Mapping[str, Batches] | None = None,
        *,
        strategy: Strategy | None = None,
        views: Views = 1,
        ema: EMA | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        check_tta(views, isinstance(task, Classification))
        self.parts = dict(parts or {})
        self.selects_on = next(iter(self.parts), "train")
        self.last: Evaluation | None = None
        self.samples: Samples | None = None
        self._model, self._task, self._device = model, task, device
        runner: Any = model if strategy is None else strategy if calls_once(task) else strategy.module
        self._forward = with_tta(runner, views)
        self._group = strategy.group if strategy else ProcessGroup(0, 1, device.device)
        self.collective_forward = strategy is not None and strategy.collective_forward
        self._ema, self._before = ema, before

    def evaluate(
        self,
        part: str | Batches = "test",
        should_stop: Callable[[], bool] = lambda: False,
        rounds: int | None = None,
    ) -> Evaluation | None:
        """Evaluate on a part of the data.

        Args:
            part: its name, such as "test"; or batches of other data.
            should_stop: asked before each round of batches by all processes.
            rounds: of batches, one in each process; None: all. Then the evaluation isn't kept as `last`.

        Returns:
            None if it was told to stop.

        Raises:
            UsageError: there is no such part.
        """
        if isinstance(part, str) and part not in self.parts:
            raise UsageError(f"there is no {part} data to evaluate on: give Trainer(..., {part}=...)")
        is_kept = part == self.selects_on and rounds is None
        collector = Collector(self._task) if is_kept and self._group.main else None
        with self._evaluating():
            batches = self.parts[part] if isinstance(part, str) else part
            evaluation = self._sum_up(batches, should_stop, rounds, collector)
            samples = collector.collected() if collector is not None else None
        if evaluation is not None and is_kept:
            self.last, self.samples = evaluation, samples
        return evaluation

    @property
    def result(self) -> Result:
        """The metrics of the last evaluation; empty if there was none."""
        return Result(self.last.values if self.last else {})

    def predict(self, batches: Batches) -> Any:
        """Return the task's predictions for each sample, in the order of the data, on the CPU.

        Tensors are (samples, …), also within dicts and tuples; of a list, an entry stands for each sample.
        """

        def predictions(batch: Batch) -> tuple[Any, ...]:
            with self._device.autocast():
                return (self._task.predict_batch(self._forward, batch),)

        with self._evaluating():
            rounds = self._shared(batches, predictions, lambda: False)
            found = [to_cpu(results[0]) for results in rounds if results]
        if self._group.size == 1:
            return joined(found)
        packed = pack(joined(found)).numpy().tobytes() if self._group.main else None
        return unpack(self._group.broadcast_bytes(packed))

    def loss(self, batch: Batch) -> float:
        """Return the task's summed loss of a batch, in evaluation mode."""
        with self._evaluating(), self._device.autocast():
            return float(total(self._task.evaluate_batch(self._forward, batch)[0], self._task))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Set evaluation mode and the averaged weights, if there are any; undo both."""
        self._before()
        was_training = self._model.training
        with torch.no_grad(), log.muted(), nullcontext() if self._ema is None else self._ema.swap(self._model):
            self._model.eval()
            try:
                yield
            finally:
                self._model.train(was_training)

    def _sum_up(
        self, batches: Batches, should_stop: Callable[[], bool], rounds: int | None, collector: Collector | None
    ) -> Evaluation | None:
        task, sums, samples = self._task, RunningSums(), 0
        metrics: dict[str, Any] = {name: metric.to(self._device.device) for name, metric in task.metrics().items()}
        for metric in metrics.values():
            # A metric of torchmetrics would wait for the other ranks, which have none.
            metric.distributed_available_fn = lambda: False
        for index, results in enumerate(self._shared(batches, self._outputs_and_loss, should_stop, rounds)):
            if results is None:
                return None
            outputs, loss, targets, number = results
            batch_weight, mean = self._weight(targets, number), total(loss, task)
            sums.add_loss(mean / batch_weight, batch_weight)
            if isinstance(loss, dict):
                sums.add_logged({name: (part, batch_weight) for name, part in loss.items()})
            if outputs is not None:
                counted = number if type(task).count is Task.count else task.count(targets)
                sums.add_measures(task.measure(outputs, targets), counted)
            if collector is not None:
                # A stream's positions; it may end before the samples that it was said to have.
                stream = np.arange(samples, samples + number)
                collector.add(outputs, targets, batches.indices(0, index) if batches.stream is None else stream)
            samples += number
            if metrics:
                predictions = task.predict(outputs)
                for metric in metrics.values():
                    metric.update(predictions, _as_targets(targets, predictions, metric))
        if not self._group.main:
            return _receive(self._group)
        evaluation = _result(sums, samples, {name: metric.compute() for name, metric in metrics.items()})
        return evaluation if self._group.size == 1 else _send(evaluation, self._group)

    def _weight(self, targets: Any, samples: int) -> Tensor | float:
        counted = self._task.weight_of(samples)
        return self._task.weight(targets) if counted is None else counted

    def _outputs_and_loss(self, batch: Batch) -> tuple[Any, ...]:
        reseed(step_seed(0, "evaluate", int(batch.indices[0]), 0), self._device.device)
        try:
            with self._device.autocast():
                loss, outputs = self._task.evaluate_batch(self._forward, batch)
                return outputs, loss, batch.targets, batch.samples
        except Exception as error:
            explain(error, batch, self._model)
            raise

    def _shared(
        self,
        batches: Batches,
        compute: Callable[[Batch], tuple[Any, ...]],
        should_stop: Callable[[], bool],
        rounds: int | None = None,
    ) -> Iterator[tuple[Any, ...] | None]:
        """Yield on rank 0 the results of all batches in their order; each rank computes its own.

        None is the last yield, on every rank, if they were told to stop.
        """
        group, own = self._group, batches.epoch()
        # In a round each rank computes a batch; rank 0 has one in every round.
        for start in range(0, min(len(batches), (rounds or len(batches)) * group.size), group.size):
            if should_stop():
                yield None
                return
            results: tuple[Any, ...] = ()
            if start + group.rank < len(batches):
                results = compute(next(own))
            elif self.collective_forward:
                compute(batches.dummy_batch())
            if group.size == 1:
                yield results
                continue
            packed = pack(results) if results and not group.main else None
            for source in range(min(group.size, len(batches) - start)):
                received = group.send_to_main(packed if group.rank == source else None, source)
                if group.main:
                    yield results if source == 0 else self._device.move(unpack(received))


def _send(evaluation: Evaluation, group: ProcessGroup) -> Evaluation:
    """Send rank 0's evaluation to the other ranks."""
    content = asdict(replace(evaluation, confusion=None))
    content["confusion"] = None if evaluation.confusion is None else evaluation.confusion.tolist()
    group.broadcast_bytes(json.dumps(content).encode())
    return evaluation


def _receive(group: ProcessGroup) -> Evaluation:
    content = json.loads(group.broadcast_bytes(None))
    confusion = content.pop("confusion")
    return Evaluation(**content, confusion=None if confusion is None else torch.tensor(confusion))


def _as_targets(targets: Any, predictions: Any, metric: Any) -> Any:
    """Return 0/1 targets of (batch, labels) as integers, which torchmetrics wants."""
    if not (isinstance(targets, Tensor) and isinstance(predictions, Tensor)):
        return targets
    wanted = targets.is_floating_point() and targets.shape == predictions.shape and not isinstance(metric, Count)
    return targets.long() if wanted else targets


def _result(sums: RunningSums, samples: int, computed: dict[str, Any]) -> Evaluation:
    values = sums.means()
    tables: dict[str, list[float]] = {}
    confusion = None
    for name, value in computed.items():
        if isinstance(value, Mapping):  # a metric of torchmetrics with several results
            values |= {key: float(each) for key, each in value.items() if isinstance(each, Tensor) and not each.ndim}
        elif value.ndim == 0:
            values[name] = float(value)
        elif value.ndim == 1:
            tables[name] = value.tolist()
        else:
            confusion = value.cpu().long()
    return Evaluation(values, tables, confusion, samples)
