"""Step 2: find the sample whose target can't be learned from, and say which one it is.

PyTorch's own errors name no sample, and a label out of range stops a GPU without saying which label it was.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrelay.data.order import Positions
from torchrelay.errors import RelayError

_LONGEST_VALUE = 60  # characters of a value in a message


class TargetError(RelayError):
    """Targets that a loss can't take. The code that has the batch adds the sample with `of`.

    Args:
        text: what the loss needs, and the remedy.
        label: the wrong label; None if no single value is wrong, but the shape or the type.
    """

    def __init__(self, text: str, label: float | None = None) -> None:
        super().__init__(text)
        self.label = label

    def of(self, name: str, targets: Any, indices: Sequence[int] | Positions) -> RelayError:
        """Return the error that names the first wrong sample and its target.

        Args:
            name: the source's name.
            targets: (batch, …), all targets of the batch.
            indices: (batch,), each sample's index in the source.
        """
        position = 0 if self.label is None else int((targets == self.label).nonzero()[0, 0])
        value = f"label {self.label}" if self.label is not None else f"target {describe(targets[position])}"
        return RelayError(f"{name}: sample {int(indices[position])} has {value}: {self}")


def wrong_label(targets: Tensor, classes: int | None, ignore: int | None = None) -> int | None:
    """Return a label that isn't the index of a class, or None.

    Args:
        targets: (…), class indices.
        classes: the number of classes; None if it isn't known.
        ignore: the label that marks a position without a class, if there is one.
    """
    if ignore is not None:
        targets = targets[targets != ignore]
    if targets.numel() == 0:
        return None
    low, high = (int(value) for value in targets.aminmax())
    if classes is not None and high >= classes:
        return high
    return low if low < 0 else None


def out_of_range(label: int, classes: int | None) -> TargetError:
    """Return the error for a label that isn't the index of a class.

    Args:
        label: the label.
        classes: the number of classes, or of the model's outputs; None if it isn't known.
    """
    if classes is None:
        return TargetError("classes count from 0: correct the label", label)
    return TargetError(
        f"the {classes} classes are 0 to {classes - 1}: correct the label, or give the model more", label
    )


def describe(value: Any) -> str:
    """Return a value with its type and shape, or only these if the value is long."""
    if not isinstance(value, Tensor):
        return f"{value!r:.{_LONGEST_VALUE}}" if isinstance(value, str | float | int) else f"a {type(value).__name__}"
    shape = f" of shape {tuple(value.shape)}" if value.ndim else ""
    text = str(value.tolist()) if value.numel() < _LONGEST_VALUE else ""
    kind = f"{dtype_name(value.dtype)}{shape}"
    return f"{text} ({kind})" if 0 < len(text) <= _LONGEST_VALUE else kind


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return a type's name without "torch."."""
    return str(dtype).removeprefix("torch.")
