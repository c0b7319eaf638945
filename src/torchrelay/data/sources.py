"""Step 2: what can be indexed: samples in memory, or any torch Dataset."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from torchrelay.data.files import Files
from torchrelay.data.order import order
from torchrelay.errors import RelayError, UsageError

Mean = tuple[float, ...]
_BLOCK = 2**22  # values that are summed at once, or hashed; at eight bytes each, what a processor's cache holds


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
    files: Files | None = field(default=None, repr=False)  # the file of each sample, if any
    stamp: str | None = field(default=None, repr=False)  # what identifies the content, if it needn't be read for that

    def __post_init__(self) -> None:
        if not (isinstance(self.inputs, Tensor) and isinstance(self.targets, Tensor)):
            raise UsageError(f"{self.name}: inputs and targets must be tensors: data.arrays() makes them of arrays")
        if self.inputs.ndim == 0 or self.targets.ndim == 0:
            raise RelayError(f"{self.name}: inputs and targets need a first dimension, one entry a sample")
        if len(self.inputs) != len(self.targets):
            raise RelayError(f"{self.name}: {len(self.inputs)} inputs but {len(self.targets)} targets: give one each")
        if len(self.inputs) == 0:
            raise RelayError(f"{self.name}: there are no samples")
        if self.classes and self.targets.ndim == 1 and not self.targets.is_floating_point():
            self._check_labels()

    def _check_labels(self) -> None:
        if self.targets.dtype != torch.int64:
            raise RelayError(f"{self.name}: the labels are {self.targets.dtype}: give int64, as data.arrays() does")
        wrong = ((self.targets < 0) | (self.targets >= len(self.classes))).nonzero()
        if len(wrong):
            place = int(wrong[0])
            where = f" ({self.files.paths[place]})" if self.files else ""
            raise RelayError(
                f"{self.name}: sample {place}{where} has label {int(self.targets[place])}, "
                f"but the {len(self.classes)} classes are 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.inputs)

    def take(self, indices: Tensor) -> "ArraySource":
        """Return the source of these samples, int64 (n,)."""
        files = None if self.files is None else self.files.take(indices.numpy())
        stamp = None if self.stamp is None else f"{self.stamp}/{_hash(indices)}"
        return replace(self, inputs=self.inputs[indices], targets=self.targets[indices], files=files, stamp=stamp)

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
    of its own is not. A method `fingerprint()` of the dataset's, if it has one, says what content it stands for.
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
        if not hasattr(self.dataset, "__len__"):
            raise UsageError(f"{type(self.dataset).__name__} doesn't say how many samples it has: give it a __len__")
        if len(self) == 0:
            raise RelayError(f"{self.name}: there are no samples")

    @property
    def files(self) -> Files | None:
        """The file of each sample, if the dataset is ours and knows."""
        found = getattr(self.dataset, "files", None)
        return found if isinstance(found, Files) else None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """Return what the dataset says of its content, or the little to be told unread: its kind and its length."""
        own = getattr(self.dataset, "fingerprint", None)
        if callable(own):
            return str(own())
        return f"{type(self.dataset).__name__} of {len(self)}"


Source = ArraySource | DatasetSource


def arrays(inputs: Any, targets: Any, classes: Sequence[str] = (), name: str = "arrays") -> ArraySource:
    """Return a source of arrays: what is uint8 stays so, other integers become int64, all else float32.

    Args:
        inputs: a tensor or a NumPy array (samples, …). Images are uint8 (samples, channels, height, width) or, with
            1 or 3 channels, (samples, height, width, channels), which is turned around; float images lie in [0, 1].
        targets: (samples, …) class indices, numbers, or 0/1 labels; integers become int64, all else float32.
        classes: names of the classes or labels.
        name: what logs call it.

    Raises:
        UsageError: they can't be made tensors.
        RelayError: they don't fit each other or the classes; the text names the sample.
    """
    x, y = _tensor(inputs, f"{name}: inputs"), _tensor(targets, f"{name}: targets")
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2).contiguous()
    if x.dtype != torch.uint8:
        x = _plain(x)
    y = _plain(y)
    return ArraySource(x, y, tuple(classes), name)


def _tensor(values: Any, name: str) -> Tensor:
    """Return a tensor on the CPU of whatever holds numbers."""
    if isinstance(values, np.ndarray):
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        if any(step < 0 for step in values.strides):  # as BGR images have that were turned into RGB
            values = values.copy()
    try:
        return torch.as_tensor(values, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = str(values.dtype) if isinstance(values, np.ndarray) else type(values).__name__
        raise UsageError(
            f"{name} of {kind} can't be made a tensor{_odd_one(values)}: give numbers, in one shape for all samples, "
            "and the names of classes apart, as classes=…"
        ) from error


def _odd_one(values: Any) -> str:
    """Say which of some samples is unlike the first: the usual reason why they make no tensor."""

    def form(value: Any) -> str:
        if isinstance(value, list | tuple):
            return f"{len(value)} entries"
        return f"shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__

    for place, value in enumerate(values if isinstance(values, list | tuple) else ()):
        if form(value) != form(values[0]):
            return f", for sample {place} has {form(value)} and sample 0 has {form(values[0])}"
    return ""


def _plain(values: Tensor) -> Tensor:
    """Return int64 of integers and float32 of all else, truth values among it."""
    return values.float() if values.is_floating_point() or values.dtype == torch.bool else values.long()


def dataset(
    data: Dataset[Any], classes: Sequence[str] = (), collate: Callable[[list[Any]], Any] | None = None
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
    raise UsageError(
        f"{type(thing).__name__} is no data: give a source of torchrelay.data, a torch Dataset, or (inputs, targets)"
    )


def split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Divide a source into the rest and a part of its own.

    Each class is divided by that share; one with two samples or more is in both.

    Args:
        source: what to divide.
        share: of the samples that go into the part, between 0 and 1.
        seed: from which the choice follows; it depends on nothing else.

    Raises:
        UsageError: one side would be empty, or the source isn't held in memory.
    """
    if not 0.0 < share < 1.0:
        raise UsageError(f"a share of {share} of {source.name} leaves one part empty: choose one between 0 and 1")
    if not isinstance(source, ArraySource):
        raise UsageError(f"{source.name} can't be divided without reading it: give the parts as datasets of their own")
    labelled = source.targets.ndim == 1 and not source.targets.is_floating_point()
    targets = source.targets.numpy() if labelled else np.zeros(len(source), dtype=np.int64)
    chosen = np.zeros(len(source), dtype=bool)
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        shuffled = members[order(seed, int(label), np.arange(len(members)), len(members))]
        count = min(max(round(len(members) * share), 1), len(members) - 1)
        chosen[shuffled[:count]] = True
    if not chosen.any():
        raise UsageError(
            f"{source.name}: no class has a second sample, so no part can be set apart: add samples, or give the part"
        )
    rest, part = (torch.from_numpy(np.flatnonzero(side)) for side in (~chosen, chosen))
    return source.take(rest), source.take(part)


def statistics(source: Source) -> dict[str, Any]:
    """Return the "mean" and "std" of an image source's channels: the published ones, or those of its images.

    A source that isn't images in memory has none.
    """
    if not isinstance(source, ArraySource) or source.inputs.ndim != 4:
        return {}
    if source.mean is not None and source.std is not None:
        return {"mean": source.mean, "std": source.std}
    mean, std = channel_statistics(source.inputs)
    return {"mean": mean, "std": std}


def channel_statistics(images: Tensor) -> tuple[Mean, Mean]:
    """Return the mean and the deviation of each channel of images in [0, 1].

    Bytes are counted, which is exact. The rest is left to NumPy, which adds in one thread: the number of threads
    changes nothing.

    Args:
        images: uint8 or float32 (samples, channels, height, width).
    """
    channels, count = images.shape[1], images.numel() // images.shape[1]
    total, squares = np.zeros(channels), np.zeros(channels)
    if images.dtype == torch.uint8:
        levels = np.arange(256)
        found = _histograms(images)
        total, squares = found @ levels / 255, found @ levels**2 / 255**2
    else:
        for block in _split(images):
            values = block.numpy().astype(np.float64)
            total += values.sum(axis=(0, 2, 3))
            squares += np.square(values).sum(axis=(0, 2, 3))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1e-6).tolist())


def _histograms(images: Tensor) -> npt.NDArray[np.int64]:
    """Return how often each value stands in each channel of uint8 images, int64 (channels, 256)."""
    found = np.zeros((images.shape[1], 256), dtype=np.int64)
    for block in _split(images):
        for channel in range(images.shape[1]):
            found[channel] += np.bincount(block[:, channel].reshape(-1).numpy(), minlength=256)
    return found


def _split(values: Tensor) -> tuple[Tensor, ...]:
    """Return (samples, …) in blocks that don't strain the memory."""
    each = max(values[0].numel(), 1) if len(values) else 1
    return torch.split(values, max(_BLOCK // each, 1))


def _hash(*tensors: Tensor) -> str:
    """Return a hash of the tensors' types, shapes and bytes."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        for block in _split(tensor.detach().cpu()):
            found.update(block.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
