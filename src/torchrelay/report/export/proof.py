"""Whether an exported file answers like the run: on all test data, with its metrics, its latency and its size."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from torchrelay.data.batch import inputs_and_targets
from torchrelay.data.sources import ArraySource, DatasetSource, Source
from torchrelay.errors import UsageError
from torchrelay.report.export.formats import Run
from torchrelay.report.export.inference import Kind, decided
from torchrelay.report.export.intervals import Floats, bootstrap, wilson
from torchrelay.tasks.metrics import Count, TopAccuracy
from torchrelay.tasks.task import Task, total

_WARM_UP, _CALLS, _SECONDS = 5, 300, 2.0  # of a measurement of latency, which ends at the first of the last two
_METRIC_RESAMPLES = 200


@dataclass(frozen=True)
class Metric:
    """A metric of the test data, with its 95% confidence interval if there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    method: str = ""


@dataclass(frozen=True)
class Proof:
    """How a form of the model answers the test data."""

    form: str
    file: str  # "" for the run's own model
    size: int  # bytes
    largest_difference: float  # of its predictions from the run's
    flipped: int | None  # samples or labels that it decides differently; None: nothing is decided
    headline: float | None
    p50: float  # seconds for a sample alone
    p95: float


def batches(source: Source, size: int) -> Iterator[tuple[Tensor, Any]]:
    """Yield raw inputs, before any preprocessing, and targets; None if there are none.

    Raises:
        UsageError: the samples can't be read again, or a sample isn't a single tensor.
    """
    if isinstance(source, ArraySource):
        for start in range(0, len(source), size):
            part = slice(start, start + size)
            yield source.inputs[part], source.targets[part] if source.has_targets else None
        return
    if not isinstance(source, DatasetSource):
        raise UsageError(f"{source.name} is a stream, whose samples an export can't read: give its parts as datasets")
    for start in range(0, len(source), size):
        samples = [source.dataset[i] for i in range(start, min(start + size, len(source)))]
        inputs, targets = inputs_and_targets((source.collate or default_collate)(samples))
        if not isinstance(inputs, Tensor):
            raise UsageError(f"the samples of {source.name} aren't single tensors, and only these can be exported")
        yield inputs, targets


def contributions(task: Task, outputs: Tensor, targets: Any, size: int = 1) -> dict[str, tuple[Floats, Floats]]:
    """Return what blocks of samples contribute to the loss and to each metric, and by what the sums are divided."""
    found: dict[str, list[tuple[float, float]]] = {}
    with torch.no_grad():
        for start in range(0, len(outputs), size):
            given, wanted = outputs[start : start + size], targets[start : start + size]
            counted = float(task.count(wanted))
            parts = {name: (float(value), counted) for name, value in task.measure(given, wanted).items()}
            if type(task).loss is not Task.loss:
                parts["loss"] = float(total(task.loss(given, wanted), task)), float(task.weight(wanted))
            for name, pair in parts.items():
                found.setdefault(name, []).append(pair)
    return {name: (np.array([s for s, _ in pairs]), np.array([w for _, w in pairs])) for name, pairs in found.items()}


def measure(task: Task, outputs: Tensor, targets: Any) -> dict[str, Metric]:
    """Return the task's metrics of the test data with their intervals."""
    found = {}
    for name, (sums, weights) in contributions(task, outputs, targets).items():
        value = float(sums.sum() / weights.sum())
        if np.isin(sums, (0.0, 1.0)).all() and (weights == 1).all() and name != "loss":
            found[name] = Metric(value, *wilson(int(sums.sum()), len(sums)), "Wilson")
        else:
            found[name] = Metric(value, *bootstrap(sums, weights), "bootstrap")
    predictions, generator = task.predict(outputs), np.random.default_rng(0)
    for name, metric in task.metrics().items():
        metric.update(predictions, targets)
        value = metric.compute()
        if not isinstance(value, Tensor) or value.ndim:
            continue
        bounds: tuple[Any, ...] = ()
        if isinstance(metric, TopAccuracy):
            correct, samples = metric.counts.tolist()
            bounds = *wilson(correct, samples), "Wilson"
        elif isinstance(metric, Count):
            drawn = [_of_resample(task, name, predictions, targets, generator) for _ in range(_METRIC_RESAMPLES)]
            bounds = *map(float, np.percentile(drawn, [2.5, 97.5])), "bootstrap"
        found[name] = Metric(float(value), *bounds)
    return found


def _of_resample(task: Task, name: str, predictions: Tensor, targets: Tensor, generator: np.random.Generator) -> float:
    chosen = torch.from_numpy(generator.integers(len(predictions), size=len(predictions)))
    metric = task.metrics()[name]
    metric.update(predictions[chosen], targets[chosen])
    return float(metric.compute())


def headline(task: Task, outputs: Tensor, targets: Any) -> float | None:
    """Return the task's headline metric; None if there are no targets, or it is none of the task's."""
    if targets is None:
        return None
    if task.headline in (found := contributions(task, outputs, targets, 1000)):
        sums, weights = found[task.headline]
        return float(sums.sum() / weights.sum())
    if (metric := task.metrics().get(task.headline)) is None:
        return None
    metric.update(task.predict(outputs), targets)
    return float(metric.compute())


def prove(
    form: str,
    file: str,
    size: int,
    run: Run,
    source: Source,
    reference: tuple[Tensor, Tensor],
    targets: Any,
    task: Task,
    kind: Kind,
    batch_size: int,
) -> Proof:
    """Answer all samples, and compare with the run's predictions.

    Args:
        form: the form's name.
        file: its file's name.
        size: its bytes.
        run: answers by it.
        source: the samples.
        reference: the run's predictions, at the same temperature, and its outputs.
        targets: of the samples; None if they have none.
        task: measures the outputs.
        kind: what the predictions are.
        batch_size: samples that are answered at once.
    """
    answers = [run(inputs) for inputs, _ in batches(source, batch_size)]
    predictions, outputs = (torch.cat([answer[i] for answer in answers]) for i in (0, -1))
    sample = next(batches(source, 1))[0]
    p50, p95 = latency(run, sample)
    difference = float((predictions.double() - reference[0].double()).abs().max())
    mine, others = decided(predictions, kind), decided(reference[0], kind)
    flipped = None if mine is None or others is None else int((mine != others).sum())
    return Proof(form, file, size, difference, flipped, headline(task, outputs, targets), p50, p95)


def latency(run: Run, sample: Tensor) -> tuple[float, float]:
    """Return the median and the 95th percentile of the seconds that a sample alone takes."""
    for _ in range(_WARM_UP):
        run(sample)
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(seconds) < _CALLS and (len(seconds) < 2 or time.perf_counter() < end):
        start = time.perf_counter()
        run(sample)
        seconds.append(time.perf_counter() - start)
    p50, p95 = np.percentile(seconds, [50, 95])
    return float(p50), float(p95)
