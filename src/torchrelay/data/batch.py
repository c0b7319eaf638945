"""Step 2: one global batch, and how it is divided over replicas."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchrelay.data.order import Positions


def replica_sizes(samples: int, replicas: int) -> tuple[int, ...]:
    """Return how many of a batch's samples each replica gets: consecutive parts, the larger ones first.

    The last ones are empty where there are fewer samples than replicas.
    """
    each, remainder = divmod(samples, replicas)
    return tuple(each + (replica < remainder) for replica in range(replicas))


@dataclass(frozen=True, slots=True)
class Batch:
    """A global batch on the device, or the consecutive part of it that this process computes."""

    inputs: Any
    """(samples, …): a tensor, or a tuple, list or dict of tensors; None if this process has no samples."""
    targets: Tensor
    """(samples, …)."""
    indices: Positions
    """(samples,): each sample's index in the source."""
    replica_sizes: tuple[int, ...]
    """The number of samples of each replica in this part."""
    name: str = "data"
    """The source's name, for error messages."""
    first_replica: int = 0
    """The index of this part's first replica."""
    size: int = 0
    """The number of samples in the whole global batch."""

    def replicas(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each replica's inputs and targets; the last ones may be empty."""
        if len(self.replica_sizes) == 1:
            yield self.inputs, self.targets
            return
        start = 0
        for size in self.replica_sizes:
            part = slice(start, start + size)
            yield None if self.inputs is None else _slice(self.inputs, part), self.targets[part]
            start += size


def _slice(value: Any, part: slice) -> Any:
    if isinstance(value, dict):
        return {key: _slice(item, part) for key, item in value.items()}
    if isinstance(value, list | tuple) and all(isinstance(item, Tensor | dict | list | tuple) for item in value):
        items = [_slice(item, part) for item in value]
        is_named_tuple = hasattr(value, "_fields")
        return type(value)(*items) if is_named_tuple else type(value)(items)
    return value[part]  # a tensor, or a list with one item per sample
