"""Step 7: what a person would notice in the numbers of a run that goes wrong: a hint, said once."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torchrelay.data.batch import Batch, replica_sizes
from torchrelay.data.batches import Batches
from torchrelay.data.sources import ArraySource
from torchrelay.data.stream_reader import StreamReader
from torchrelay.tasks.classification import Classification
from torchrelay.tasks.detection import Detection
from torchrelay.tasks.task import Task

_ABSURD = 3.0  # times the loss of guessing, or of the first epoch
_FEW = 7  # samples, of which a half may have nearly the whole loss
_FEW_STEPS, _FEW_IN_ALL = 4, 100  # steps of an epoch, and of a run
_UNLIKE = 5  # times as many samples in a class as in another
_CHANNELS = (1, 3)  # of images
_UNEQUAL = 0.05  # of a loss, by which that of its halves may differ


def at_start(batches: Batches, task: Task, total_steps: int) -> list[str]:
    """Return what is said before the first step."""
    each = (of_images(batches), of_batches(batches, total_steps), of_classes(batches, task), of_task(task))
    return [hint for hint in each if hint is not None]


def of_batches(batches: Batches, total_steps: int) -> str | None:
    """Return the hint that a batch holds most of the samples, or how a stream is read."""
    if batches.stream is not None:
        return _of_stream(batches, batches.stream)
    samples = len(batches.source)
    if batches.batch_size <= samples:
        are_few = batches.source.files is not None and len(batches) < _FEW_STEPS and total_steps < _FEW_IN_ALL
        if not are_few:
            return None
        return (
            f"hint: an epoch of {samples:,} samples is {len(batches)} steps, and the run {total_steps}: a smaller "
            f"data.batch_size than {batches.batch_size} takes more, and more run.epochs"
        )
    return (
        f"hint: a batch of {batches.batch_size:,} holds all {samples:,} training samples, so an epoch is one step; "
        "a smaller data.batch_size takes more steps"
    )


def of_classes(batches: Batches, task: Task) -> str | None:
    """Return the hint that some classes have many times the samples of others."""
    targets, names = batches.targets_in_memory(), batches.source.classes
    is_weighted = batches.sampling == "balanced" or getattr(task, "class_weights", None) is not None
    if not isinstance(task, Classification) or is_weighted or targets is None or len(names) < 2:
        return None
    if targets.ndim != 1 or targets.is_floating_point():
        return None
    counts = torch.bincount(targets, minlength=len(names))
    low, high = int(counts.argmin()), int(counts.argmax())
    if counts[high] < _UNLIKE * counts[low]:
        return None
    return (
        f"hint: {names[high]} has {counts[high]:,} samples and {names[low]} {counts[low]:,}, so accuracy says little "
        "of the rare class: see the accuracy by class; data.sampling=balanced or loss.class_weights=balanced helps"
    )


def of_images(batches: Batches) -> str | None:
    """Return whether float images, or those of a Dataset, are normalized; bytes in memory always are by default."""
    source, mean = batches.source, batches.pipeline.mean
    if isinstance(source, ArraySource):
        if source.inputs.ndim != 4 or not source.inputs.is_floating_point():
            return None
        if mean is None:
            return "the images are taken as they are: floats with negative values are taken for normalized ones"
        return f"the images are normalized by their channels' means, {', '.join(f'{each:.3g}' for each in mean)}"
    if batches.stream is not None or source.files is not None:
        return None
    inputs = batches.dummy_batch().inputs
    are_images = isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] in _CHANNELS
    return f"the images are taken as {source.name} gives them, and not normalized" if are_images else None


def _of_stream(batches: Batches, stream: StreamReader) -> str:
    """Return how a stream is read, and what a resume can promise."""
    way = "goes on from its state" if stream.has_state else "reads it again up to there, which must give the same"
    if batches.source.length is None:  # type: ignore[union-attr]
        way += "; where it ends, it begins again"
    return f"{batches.source.name} is read in its own order, by the training's process; a resume {way}"


def of_task(task: Task) -> str | None:
    """Return the hint that mean average precision isn't measured."""
    if not isinstance(task, Detection) or task.has_map:
        return None
    return "hint: only losses are measured, no mean average precision: pip install 'torchrelay[detection]' adds it"


def of_parts(task: Task, loss: Callable[[Batch], float], batch: Batch, replicas: int) -> str | None:
    """Return the hint that a loss is a mean, or that each replica of a batch minimizes something else than the whole.

    The two halves of a batch have half the loss each; of a mean, each has the whole. Where samples are compared with
    each other, as in contrastive training, the halves don't add up to the whole.

    Args:
        task: one of the user's.
        loss: returns the task's summed loss of a batch.
        batch: a batch.
        replicas: into how many a batch of the training is divided.
    """
    if batch.samples <= _FEW or batch.parts:
        return None
    wholes = [loss(batch) for _ in range(3)]  # which differ where the loss draws random numbers
    halves = [loss(half) for half in replace(batch, replica_sizes=replica_sizes(batch.samples, 2)).replicas()]
    whole, half, noise = wholes[0], halves[0], max(wholes) - min(wholes)
    if 0.9 * abs(whole) < abs(half) < 1.1 * abs(whole):
        return (
            f"hint: the loss of {type(task).__name__} is {whole:.3g} for a batch and {half:.3g} for half of it, as a "
            'mean is: return the sum over the samples (reduction="sum"), which the trainer divides by their number'
        )
    if replicas == 1 or abs(sum(halves) - whole) <= max(_UNEQUAL * abs(whole), 3 * noise):
        return None
    return (
        f"hint: the loss of {type(task).__name__} is {whole / batch.samples:.3g} a sample for a batch and "
        f"{sum(halves) / batch.samples:.3g} for its two halves, so it compares samples with each other: each of the "
        f"{replicas} replicas sees its own part alone, which is another objective than that of one replica"
    )


def of_loss(task: Task, loss: float, first: float, lr: float) -> str | None:
    """Return the hint that a training loss is absurdly high.

    Args:
        task: whose loss it is.
        loss: the mean of an epoch.
        first: the mean of the first epoch that was seen.
        lr: the learning rate that was asked for.
    """
    remedy = f"a learning rate lower than {lr:g} may help"
    classes = task.classes if isinstance(task, Classification) else None
    if classes is not None and classes > 1 and loss > _ABSURD * math.log(classes):
        return f"hint: the training loss of {loss:.3g} is far above {math.log(classes):.3g}, that of guessing; {remedy}"
    if loss > _ABSURD * first > 0:
        return f"hint: the training loss has grown from {first:.3g} to {loss:.3g}; {remedy}"
    return None
