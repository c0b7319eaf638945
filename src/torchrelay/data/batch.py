"""Step 2: one global batch, what of it is inputs and targets, and how it is divided over replicas."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchrelay.data.order import Positions

# Bytes.
_ALIGNMENT = 64
# The entries of a dict that are its targets, in this order.
TARGET_NAMES = ("targets", "target", "labels", "label")


class Arguments(tuple[Any, ...]):
    """Inputs that a model takes as positional arguments: those of samples of three values or more."""

    __slots__ = ()


class Keywords(dict[str, Any]):
    """Inputs that a model takes as keyword arguments: those of samples that are dicts."""


def replica_sizes(samples: int, replicas: int) -> tuple[int, ...]:
    """Return how many of a batch's samples each replica gets: consecutive parts, the larger ones first.

    The last ones are empty where there are fewer samples than replicas.
    """
    each, remainder = divmod(samples, replicas)
    return tuple(each + (replica < remainder) for replica in range(replicas))


def inputs_and_targets(data: Any) -> tuple[Any, Any]:
    """Return what of a collated batch the model takes, and what the loss compares its outputs with.

    A pair is (inputs, targets). Of more values, the last one is the targets, and the others are the model's positional
    arguments. Of a dict, the targets are the entry "targets", "target", "labels" or "label"; the model takes a single
    other tensor as it is, and several as keyword arguments. Anything else is inputs without targets: None.
    """
    if isinstance(data, Mapping):
        name = next((name for name in TARGET_NAMES if name in data), None)
        rest = {key: value for key, value in data.items() if key != name and isinstance(value, Tensor)}
        inputs = next(iter(rest.values())) if len(rest) == 1 else Keywords(rest)
        return inputs, None if name is None else data[name]
    if isinstance(data, list | tuple):
        if len(data) == 2:
            return data[0], data[1]
        return (data[0], None) if len(data) == 1 else (Arguments(data[:-1]), data[-1])
    return data, None


@dataclass(frozen=True, slots=True)
class Batch:
    """A global batch on the device, or the consecutive part of it that this process computes."""

    inputs: Any
    """What the model takes, (samples, …): a tensor, or several; None if this process has no samples."""
    targets: Any
    """What the loss compares the outputs with, (samples, …); None where the data has no targets."""
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
    data: Any = None
    """The batch as it was collated, unless it is a pair of inputs and targets: a dict with its strings, for example."""
    parts: "tuple[Batch, ...]" = ()
    """The replicas' batches, where a `collate` of the user's made each of them; then `inputs` are the first one's."""

    @property
    def samples(self) -> int:
        """The number of samples that this process computes."""
        return len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        """Yield inputs and targets, so that `inputs, targets = batch` takes them apart."""
        yield self.inputs
        yield self.targets

    def replicas(self) -> Iterator["Batch"]:
        """Yield each replica's batch; the last ones may be empty."""
        if len(self.replica_sizes) == 1:
            yield self
            return
        if self.parts:
            yield from self.parts
            return
        start = 0
        for number, size in enumerate(self.replica_sizes, self.first_replica):
            yield self._part(slice(start, start + size), number)
            start += size

    def _part(self, part: slice, replica: int) -> "Batch":
        """Return the batch of a replica, whose samples are a slice of these."""
        indices, data, inputs, targets = self.indices[part], None, None, None
        if len(indices) and self.data is not None:
            data = cut(self.data, part)
            inputs, targets = inputs_and_targets(data)
        elif self.inputs is not None:
            inputs, targets = cut(self.inputs, part), cut(self.targets, part)
        return Batch(inputs, targets, indices, (len(indices),), self.name, replica, self.size, data)


def cut(value: Any, part: slice) -> Any:
    """Return some consecutive samples of what `torch.utils.data.default_collate` returned."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: cut(item, part) for key, item in value.items()}
    if isinstance(value, list | tuple) and all(isinstance(item, Tensor | Mapping | list | tuple) for item in value):
        items = [cut(item, part) for item in value]
        is_named_tuple = hasattr(value, "_fields")
        return type(value)(*items) if is_named_tuple else type(value)(items)
    return aligned(value[part]) if isinstance(value, Tensor) else value[part]


def aligned(values: Tensor) -> Tensor:
    """Return values at an address that is a multiple of 64 bytes, as that of a tensor of its own is.

    The bits of a matrix product depend on it (Intel's "Conditional Numerical Reproducibility of oneMKL"), and where a
    slice begins depends on how many samples were gathered at once.
    """
    return values.clone() if values.is_cpu and values.data_ptr() % _ALIGNMENT else values
