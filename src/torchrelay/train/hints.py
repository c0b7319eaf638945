"""Step 7: what a person would notice in the numbers of a run that goes wrong: a hint, said once."""

import math

from torchrelay.data.batches import Batches
from torchrelay.tasks.classification import Classification
from torchrelay.tasks.detection import Detection
from torchrelay.tasks.task import Task

_ABSURD = 3.0  # times the loss of guessing, or of the first epoch


def of_batches(batches: Batches) -> str | None:
    """Return the hint that a batch holds more samples than there are."""
    samples = len(batches.source)
    if batches.batch_size <= samples:
        return None
    return (
        f"hint: a batch of {batches.batch_size:,} holds all {samples:,} training samples, so an epoch is one step; "
        "a smaller data.batch_size takes more steps"
    )


def of_task(task: Task) -> str | None:
    """Return the hint that mean average precision isn't measured."""
    if not isinstance(task, Detection) or task.has_map:
        return None
    return "hint: only losses are measured, no mean average precision: pip install 'torchrelay[detection]' adds it"


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
