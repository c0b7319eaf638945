"""Step 6: which sample is to blame where a batch can't be learnt from.

A loss would refuse it in PyTorch's words, which name no sample, and a GPU stops at a label out of range without saying
which. Targets in memory are looked at once, before the first step; those of a dataset where a loss has refused them. So
a step in which all is well pays nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchrelay.errors import RelayError

if TYPE_CHECKING:
    from torchrelay.data.batches import Batch
    from torchrelay.data.order import Positions

REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)  # what PyTorch raises at a wrong argument
_SHOWN = 60  # characters of a value in a message


class TargetError(RelayError):
    """Targets that a loss can't take. Whoever has the batch says by `of` which sample it is.

    Args:
        text: what the loss wants, and what to do.
        label: the label that is wrong; None if it isn't this or that value, but their shape or type.
    """

    def __init__(self, text: str, label: float | None = None) -> None:
        super().__init__(text)
        self.label = label

    def of(self, name: str, targets: Any, indices: "Sequence[int] | Positions") -> RelayError:
        """Return the error that says which sample is the first such one, and what its target is.

        Args:
            name: the data's.
            targets: (batch, …) all of the batch.
            indices: (batch,) which samples these are.
        """
        place = 0 if self.label is None else int((targets == self.label).nonzero()[0, 0])
        value = f"label {self.label}" if self.label is not None else f"target {_described(targets[place])}"
        return RelayError(f"{name}: sample {int(indices[place])} has {value}: {self}")


def explain(error: Exception, batch: "Batch", model: nn.Module) -> None:
    """Raise an error that names a sample of the batch, if that is what failed; otherwise return.

    Args:
        error: what was raised.
        batch: on which.
        model: by which model.

    Raises:
        RelayError: the text names the sample.
    """
    if isinstance(error, TargetError):
        raise error.of(batch.name, batch.targets, batch.indices) from error
    wanted = next((parameter.dtype for parameter in model.parameters()), None)
    given = batch.inputs.dtype if isinstance(batch.inputs, Tensor) else None
    if isinstance(error, RuntimeError) and given in (torch.uint8, torch.float64) and wanted not in (None, given):
        raise RelayError(
            f"{batch.name}: sample {int(batch.indices[0])} is {_described(batch.inputs[0])}, and the model computes in "
            f"{_plain(wanted)}: let the dataset return {_plain(wanted)}"
        ) from error


def wrong_label(targets: Tensor, classes: int | None, ignore: int | None = None) -> int | None:
    """Return a label that is no class, or None.

    Args:
        targets: (…) class indices.
        classes: how many there are; None: any number.
        ignore: the label that stands for none, if there is one.
    """
    if ignore is not None:
        targets = targets[targets != ignore]
    if targets.numel() == 0:
        return None
    low, high = (int(value) for value in targets.aminmax())
    if classes is not None and high >= classes:
        return high
    return low if low < 0 else None


def refused_classes(outputs: Any, targets: Any, ignore: int | None = None) -> RelayError | None:
    """Return why a cross entropy can't be had, or None if neither outputs nor targets are the reason.

    Args:
        outputs: (batch, classes, …) logits, as it should be.
        targets: (batch, …) class indices or (batch, classes, …) probabilities, as it should be.
        ignore: the label that stands for none, if there is one.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        return RelayError(
            f"the model gives {_described(outputs)}, but the loss wants (batch, classes): mend its output"
        )
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


def out_of_range(label: int, classes: int | None) -> TargetError:
    """Return the error of a label that is no class.

    Args:
        label: which.
        classes: how many classes there are, or outputs of the model; None: not known.
    """
    if classes is None:
        return TargetError("classes count from 0: mend the label", label)
    return TargetError(f"the {classes} classes are 0 to {classes - 1}: mend the label, or give the model more", label)


def _described(value: Any) -> str:
    """Return a value with its type and shape, or these alone where it is long."""
    if not isinstance(value, Tensor):
        return f"{value!r:.{_SHOWN}}" if isinstance(value, str | float | int) else f"a {type(value).__name__}"
    shape = f" of shape {tuple(value.shape)}" if value.ndim else ""
    text = str(value.tolist()) if value.numel() < _SHOWN else ""
    kind = f"{_plain(value.dtype)}{shape}"
    return f"{text} ({kind})" if 0 < len(text) <= _SHOWN else kind


def _plain(kind: torch.dtype | None) -> str:
    return str(kind).removeprefix("torch.")
