"""Step 7, the test: outputs that are more than a tensor: joined over batches, and sent between processes."""

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchrelay.device.device import mapped
from torchrelay.errors import RelayError


def to_cpu(value: Any) -> Any:
    """Return the same with all tensors on the CPU."""
    return mapped(lambda each: each.to("cpu"), value)


def joined(batches: Sequence[Any]) -> Any:
    """Return the predictions of several batches as one: tensors along their first dimension, lists one after another.

    Raises:
        RelayError: the tensors of two batches don't fit together.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        try:
            return torch.cat([*batches])
        except RuntimeError as error:
            raise RelayError(
                f"the predictions of two batches can't be joined ({error}): let the task's predict() return a list "
                "with an entry for each sample"
            ) from error
    if isinstance(first, Mapping):
        return {key: joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple):
        items = [joined(each) for each in zip(*batches, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
    if isinstance(first, list):
        return [item for batch in batches for item in batch]
    return [*batches]


def pack(value: Any) -> Tensor:
    """Return a value as bytes, for another process of this run, which trusts this one."""
    return torch.frombuffer(bytearray(pickle.dumps(to_cpu(value))), dtype=torch.uint8)


def unpack(content: Tensor | bytes | None) -> Any:
    """Return what another process of this run has packed."""
    content = content.cpu().numpy().tobytes() if isinstance(content, Tensor) else content or b""
    return pickle.loads(content)  # noqa: S301 - processes of a run share code and weights already
