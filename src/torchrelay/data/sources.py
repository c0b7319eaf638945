"""Step 2: what can be indexed: samples in memory, or any torch Dataset."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from torchrelay.data.order import order
from torchrelay.errors import RelayError, UsageError

Mean = tuple[float, ...]
_BLOCK = 4096  # samples that are summed or hashed at once


@dataclass(frozen=True)
class ArraySource:
    """Samples held as two tensors, which are gathered, moved and augmented a batch at a time.

    Raises:
        RelayError: the tensors don't fit each other or the classes; the text names the sample.
    """

    inputs: Tensor  # (samples, …); images: uint8 (samples, channels, height, width)
    targets: Tensor  # (samples, …): int64 class indices (samples,), or others
    classes: tuple[str, ...] = ()  # names; () if the targets are no classes
    name: str = "arrays"
    mean: Mean | None = None  # per channel, of images in [0, 1]; None: to be computed
    std: Mean | None = None
    paths: tuple[str, ...] | None = field(default=None, repr=False)  # the file of each sample, if any
    stamp: str | None = field(default=None, repr=False)  # what identifies the content, if something cheaper than it does

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise RelayError(f"{self.name}: {len(self.inputs)} inputs but {len(self.targets)} targets: give one each")
        if len(self.inputs) == 0:
            raise RelayError(f"{self.name}: there are no samples")
        if self.classes and self.targets.ndim == 1 and not self.targets.is_floating_point():
            self._check_labels()

    def _check_labels(self) -> None:
        wrong = ((self.targets < 0) | (self.targets >= len(self.classes))).nonzero()
        if len(wrong):
            place = int(wrong[0])
            where = f" ({self.paths[place]})" if self.paths else ""
            raise RelayError(
                f"{self.name}: sample {place}{where} has label {int(self.targets[place])}, "
                f"but the {len(self.classes)} classes are 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.inputs)

    def take(self, indices: Tensor) -> "ArraySource":
        """Return the source of these samples, int64 (n,)."""
        paths = None if self.paths is None else tuple(self.paths[i] for i in indices.tolist())
        stamp = None if self.stamp is None else f"{self.stamp}/{_hash(indices)}"
        return replace(self, inputs=self.inputs[indices], targets=self.targets[indices], paths=paths, stamp=stamp)

    def fingerprint(self) -> str:
        """Return a hash of the content, or of what identifies it."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self.stamp or _hash(self.inputs, self.targets)


@dataclass(frozen=True)
class DatasetSource:
    """Any map-style torch Dataset of (inputs, target) pairs, read sample by sample through a DataLoader.

    Its global randomness (PyTorch's, NumPy's, Python's) is seeded for each sample; a generator object that it keeps
    of its own is not.
    """

    dataset: Dataset[Any]
    classes: tuple[str, ...] = ()
    name: str = "dataset"
    collate: Callable[[list[Any]], Any] | None = None  # from samples to (inputs, targets); None: PyTorch's own

    def __post_init__(self) -> None:
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__getitem__"):
            raise UsageError(
                f"{type(self.dataset).__name__} can only be read in its own order, so a run could not go on inside an "
                "epoch: give a Dataset with __getitem__ and __len__"
            )
        if len(self) == 0:
            raise RelayError(f"{self.name}: there are no samples")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """Return what little can be told of a dataset without reading it: its kind and its length."""
        return f"{type(self.dataset).__name__} of {len(self)}"


Source = ArraySource | DatasetSource


def arrays(inputs: Any, targets: Any, classes: tuple[str, ...] = (), name: str = "arrays") -> ArraySource:
    """Return a source of arrays.

    Args:
        inputs: a tensor or a NumPy array (samples, …). Images are uint8 (samples, channels, height, width) or, with 1 or
            3 channels, (samples, height, width, channels), which is turned around; float images lie in [0, 1].
        targets: (samples, …) class indices, numbers, or 0/1 labels.
        classes: names of the classes or labels.
        name: what logs call it.
    """
    x, y = torch.as_tensor(inputs), torch.as_tensor(targets)
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2).contiguous()
    if x.dtype == torch.float64:
        x = x.float()
    if not y.is_floating_point() and y.dtype != torch.bool:
        y = y.long()
    elif y.dtype != torch.float32:
        y = y.float()
    return ArraySource(x, y, tuple(classes), name)


def dataset(
    data: Dataset[Any], classes: tuple[str, ...] = (), collate: Callable[[list[Any]], Any] | None = None
) -> DatasetSource:
    """Return a source of any map-style torch Dataset whose samples are pairs (inputs, target).

    Args:
        data: the dataset; its `classes`, if it has some, are taken over.
        classes: names of the classes.
        collate: makes a pair (inputs, targets) of a list of samples; PyTorch's default if not given.
    """
    return DatasetSource(data, tuple(classes or getattr(data, "classes", ())), type(data).__name__, collate)


def as_source(thing: Any) -> Source:
    """Return a source of whatever a user may give: a source, a torch Dataset, or a pair (inputs, targets).

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(thing, ArraySource | DatasetSource):
        return thing
    if isinstance(thing, Dataset):
        return dataset(thing)
    if isinstance(thing, tuple | list) and len(thing) == 2:
        return arrays(*thing)
    raise UsageError(f"{type(thing).__name__} is no data: give a source of torchrelay.data, a Dataset, or (inputs, targets)")


def split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Divide a source into the rest and a part of its own, evenly over the classes where there are some.

    Args:
        source: what to divide.
        share: of the samples that go into the part, between 0 and 1.
        seed: from which the choice follows; it depends on nothing else.

    Raises:
        UsageError: one side would be empty, or the source isn't held in memory.
    """
    if not isinstance(source, ArraySource):
        raise UsageError(f"{source.name} can't be divided without reading it: give the parts as datasets of their own")
    labelled = source.targets.ndim == 1 and not source.targets.is_floating_point()
    targets = source.targets.numpy() if labelled else np.zeros(len(source), dtype=np.int64)
    chosen = np.zeros(len(source), dtype=bool)
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        shuffled = members[order(seed, int(label), np.arange(len(members)), len(members))]
        chosen[shuffled[: round(len(members) * share)]] = True
    if chosen.all() or not chosen.any():
        raise UsageError(f"a share of {share} of {source.name}'s {len(source)} samples leaves one part empty: choose another")
    rest, part = (torch.from_numpy(np.flatnonzero(side)) for side in (~chosen, chosen))
    return source.take(rest), source.take(part)


def channel_statistics(images: Tensor) -> tuple[Mean, Mean]:
    """Return the mean and the deviation of each channel of images in [0, 1].

    Sums of uint8 are exact integers, so that the order of adding and the number of threads don't matter.

    Args:
        images: uint8 or float32 (samples, channels, height, width).
    """
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    wide = torch.int64 if images.dtype == torch.uint8 else torch.float64
    total = torch.zeros(images.shape[1], dtype=wide)
    squares = torch.zeros(images.shape[1], dtype=wide)
    for block in images.split(_BLOCK):
        values = block.to(wide)
        total += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count = images.numel() // images.shape[1]
    mean = [float(t) / count for t in total]
    std = [max(float(s) / count - m * m, 0.0) ** 0.5 for s, m in zip(squares, mean, strict=True)]
    return tuple(m / scale for m in mean), tuple(max(s / scale, 1e-6) for s in std)


def _hash(*tensors: Tensor) -> str:
    """Return a hash of the tensors' types, shapes and bytes."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        for block in tensor.detach().cpu().split(_BLOCK):
            found.update(block.contiguous().view(torch.uint8).numpy().data if block.ndim else bytes(block))
    return found.hexdigest()
