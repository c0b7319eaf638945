"""Step 2: what a user may give as data, and what it becomes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from torchrelay.data.sources import ArraySource, DatasetSource, Source, arrays, dataset
from torchrelay.data.stream import StreamSource, is_stream, stream
from torchrelay.errors import UsageError

_INSTEAD_OF = {  # samplers of PyTorch's
    "WeightedRandomSampler": 'give sampling="balanced"',
    "SubsetRandomSampler": "give torch.utils.data.Subset(dataset, indices)",
    "DistributedSampler": "leave it out, as processes share each batch by themselves",
}


class Samples(Dataset[Any]):
    """A list of samples as a dataset."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        """Return their number."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        """Return a sample."""
        return self._samples[index]


class Columns(Dataset[dict[str, Tensor]]):
    """A dict of equally long tensors as a dataset of dicts, a sample each.

    Args:
        columns: tensors or arrays by name.

    Raises:
        UsageError: they aren't equally long.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        try:
            self._columns = {name: torch.as_tensor(column, device="cpu") for name, column in columns.items()}
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(
                f"a dict of {', '.join(sorted({type(column).__name__ for column in columns.values()}))} can't be used "
                "as data: give equally long tensors by name, from which samples are taken as dicts"
            ) from None
        lengths = {name: len(column) if column.ndim else 1 for name, column in self._columns.items()}
        if len(set(lengths.values())) != 1:
            listed = ", ".join(f"'{name}' {length}" for name, length in lengths.items()) or "nothing"
            raise UsageError(f"a dict as data needs equally long tensors, an entry a sample, and has {listed}")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a sample."""
        return {name: column[index] for name, column in self._columns.items()}


def as_source(data: Any, dtype: torch.dtype = torch.float32) -> Source:
    """Return a source of what a user may give.

    Args:
        data: a source; a torch Dataset, or anything with `__getitem__` and `__len__`; a torch IterableDataset; a pair
            (inputs, targets) of tensors or arrays; a dict of equally long tensors; a list of samples; a DataLoader,
            whose dataset and collate function are taken.
        dtype: of the model's parameters; where that is float64, arrays keep it.

    Raises:
        UsageError: it is none of these.
    """
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(data, ArraySource | DatasetSource | StreamSource):
        return data
    if isinstance(data, DataLoader):
        return _of_loader(data)
    if is_stream(data):
        return stream(data)
    if isinstance(data, Tensor | np.ndarray):
        return arrays(data, dtype=kept)
    if isinstance(data, Mapping):
        return dataset(Columns(data))
    if isinstance(data, list) and all(isinstance(sample, tuple | dict) for sample in data):
        return dataset(Samples(data))
    if isinstance(data, tuple | list) and len(data) == 2:
        return arrays(data[0], data[1], dtype=kept)
    if isinstance(data, Iterator):
        raise UsageError(
            f"a {type(data).__name__} can be read once and in its own order, and a run reads in any order again and "
            "again: give list(...) of it, or a Dataset"
        )
    if isinstance(data, Dataset) or _has_samples(data):
        return dataset(data)
    raise UsageError(
        f"{type(data).__name__} can't be used as data: give a source of torchrelay.data, a torch Dataset, or "
        "(inputs, targets) as arrays"
    )


def stacked(inputs: Any) -> Any:
    """Return a list of arrays of one shape, a sample each, as a tensor, and other data as they are."""
    each = isinstance(inputs, list) and all(isinstance(sample, Tensor | np.ndarray) for sample in inputs)
    if not each or len({tuple(sample.shape) for sample in inputs}) != 1:
        return inputs
    return torch.stack([torch.as_tensor(sample) for sample in inputs])


def _has_samples(data: Any) -> bool:
    """Return whether it is a map-style dataset, though of another library's."""
    if isinstance(data, str | list | tuple) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return False
    try:
        data[0]
    except (LookupError, TypeError):  # such as a table's, which has columns
        return False
    return True


def _of_loader(loader: DataLoader[Any]) -> Source:
    source = as_source(loader.dataset)
    options_of(loader)  # refuses what it can't have
    if loader.collate_fn is default_collate:
        return source
    if isinstance(source, StreamSource):
        return replace(source, collate=loader.collate_fn)
    return dataset(loader.dataset, source.classes, loader.collate_fn)


def options_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return what a DataLoader of training data says of its batches, as arguments of `Trainer`.

    Raises:
        UsageError: its order can't be had here; the text says what to give instead.
    """
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler and not _of_torchdata(loader.batch_sampler, BatchSampler):
        found = (
            f"a batch_sampler ({_name(loader.batch_sampler)})" if loader.batch_sampler is not None else "no batch_size"
        )
        raise UsageError(
            f"the DataLoader has {found}, and here a batch follows from (seed, epoch, position): give its dataset, and "
            "batch_size=, sampling= and drop_last= to Trainer"
        )
    if loader.worker_init_fn is not None:
        raise UsageError(
            "the DataLoader has a worker_init_fn, which isn't called here, as all generators are seeded for each "
            "sample: let the dataset do the rest, and leave it out"
        )
    if is_stream(loader.dataset):
        return {"batch_size": loader.batch_size, "drop_last": loader.drop_last, "workers": loader.num_workers}
    drawn: Any = sampler if isinstance(sampler, RandomSampler) or _of_torchdata(sampler, RandomSampler) else None
    is_random = drawn is not None and not drawn.replacement and len(drawn) == len(loader.dataset)  # type: ignore[arg-type]
    if not is_random and not isinstance(sampler, SequentialSampler):
        instead = _INSTEAD_OF.get(
            _name(sampler), 'give its dataset, and sampling="shuffle", "balanced" or "sequential"'
        )
        raise UsageError(
            f"the DataLoader has a {_name(sampler)}, whose order doesn't follow from (seed, epoch, position): {instead}"
        )
    return {
        "batch_size": loader.batch_size,
        "sampling": "shuffle" if is_random else "sequential",
        "drop_last": loader.drop_last,
        "workers": loader.num_workers,
    }


def _of_torchdata(sampler: Any, kind: type) -> bool:
    """Return whether it is the sampler of this name that a StatefulDataLoader of torchdata's has."""
    return type(sampler).__module__.startswith("torchdata.") and type(sampler).__name__ == kind.__name__


def _name(value: Any) -> str:
    return type(value).__name__
