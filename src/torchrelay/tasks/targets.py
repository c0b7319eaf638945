"""Step 6: find the sample to blame when a loss can't be computed.

PyTorch's errors name no sample, and a label out of range stops a GPU without saying which. Targets in memory are
checked once, before the first step; targets of a dataset are checked only after the loss has failed. So a step without
an error costs nothing extra.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.data.labels import TargetError, describe, dtype_name, out_of_range, wrong_label
from torchrelay.errors import RelayError

REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)  # what PyTorch raises for a wrong argument


def check_targets(check: Callable[[Tensor, str], None], batches: Batches) -> None:
    """Have a task check all targets, if the source holds them in memory.

    Args:
        check: the task's `check`.
        batches: the data to check.

    Raises:
        RelayError: a target can't be learned; the text names its sample.
    """
    targets = batches.targets_in_memory()
    if targets is None:
        return
    try:
        check(targets, batches.name)
    except TargetError as error:
        raise error.of(batches.name, targets, range(len(targets))) from None


def explain(error: Exception, batch: Batch, model: nn.Module) -> None:
    """Raise an error that names a sample of the batch, if that is what failed; otherwise return.

    Args:
        error: the exception of the forward pass or the loss.
        batch: the batch.
        model: the model.

    Raises:
        RelayError: the message names the sample.
    """
    if isinstance(error, TargetError) and batch.targets is None:
        raise RelayError(
            f"{batch.name} has no targets: give Trainer pairs (inputs, targets), or another task"
        ) from error
    if isinstance(error, TargetError):
        raise error.of(batch.name, batch.targets, batch.indices) from error
    wanted = next((parameter.dtype for parameter in model.parameters()), None)
    given = batch.inputs.dtype if isinstance(batch.inputs, Tensor) else None
    if isinstance(error, RuntimeError) and given in (torch.uint8, torch.float64) and wanted not in (None, given):
        raise RelayError(
            f"{batch.name}: sample {int(batch.indices[0])} is {describe(batch.inputs[0])}, and the model computes in "
            f"{dtype_name(wanted)}: let the dataset return {dtype_name(wanted)}"
        ) from error


def refused_classes(outputs: Any, targets: Any, ignore: int | None = None) -> RelayError | None:
    """Return why the cross entropy can't be computed, or None if neither outputs nor targets are the cause.

    Args:
        outputs: should be (batch, classes, …) logits.
        targets: should be (batch, …) class indices or (batch, classes, …) probabilities.
        ignore: the label of positions without a class, if there is one.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        return RelayError(f"the model gives {describe(outputs)}, but the loss wants (batch, classes): fix its output")
    if not isinstance(targets, Tensor):
        return TargetError("the loss wants a class's number: let the dataset return an int")
    if len(outputs) != len(targets):
        return RelayError(f"the model gives {len(outputs)} outputs for {len(targets)} samples: it must keep them apart")
    classes = outputs.shape[1]
    if targets.is_floating_point():
        if targets.shape == outputs.shape:
            return None
        return TargetError(f"the loss wants a class's number (int64), or a probability for each of {classes} classes")
    if targets.ndim != outputs.ndim - 1:
        return TargetError("the loss wants one class a sample: let the data hold a number without dimensions")
    if targets.dtype not in (torch.int64, torch.uint8):
        return TargetError("the loss wants int64: let the dataset return an int")
    label = wrong_label(targets, classes, ignore)
    return None if label is None else out_of_range(label, classes)
