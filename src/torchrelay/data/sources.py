"""Step 2: sources of samples: arrays in memory, or any map-style torch Dataset."""

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
from torchrelay.data.stream import StreamSource
from torchrelay.errors import RelayError, UsageError

Mean = tuple[float, ...]
_BLOCK = 2**22  # values that are summed or hashed at once; at eight bytes each they fit into a processor's cache


@dataclass(frozen=True)
class ArraySource:
    """Samples held as two tensors, from which whole batches are gathered, moved and augmented.

    Raises:
        RelayError: the tensors don't match each other or the classes; the text names the sample.
    """

    inputs: Tensor  # (samples, …); images: uint8 (samples, channels, height, width)
    targets: Tensor  # (samples, …): int64 class indices (samples,), or others; (samples, 0): there are none
    classes: tuple[str, ...] = ()  # names; () if the targets aren't classes
    name: str = "arrays"
    mean: Mean | None = None  # per channel, of images in [0, 1]; None: computed from the images
    std: Mean | None = None
    files: Files | None = field(default=None, repr=False)  # the file of each sample, if any
    stamp: str | None = field(default=None, repr=False)  # identifies the content without reading it

    def __post_init__(self) -> None:
        if not (isinstance(self.inputs, Tensor) and isinstance(self.targets, Tensor)):
            raise UsageError(f"{self.name}: inputs and targets must be tensors: use data.arrays() for NumPy arrays")
        if self.inputs.ndim == 0 or self.targets.ndim == 0:
            raise RelayError(f"{self.name}: inputs and targets need a first dimension with one entry per sample")
        if len(self.inputs) != len(self.targets):
            raise RelayError(
                f"{self.name}: {len(self.inputs)} inputs but {len(self.targets)} targets: give one target per input"
            )
        if len(self.inputs) == 0:
            raise RelayError(f"{self.name}: there are no samples")
        if self.classes and self.targets.ndim == 1 and not self.targets.is_floating_point():
            self._check_labels()

    def _check_labels(self) -> None:
        if self.targets.dtype != torch.int64:
            raise RelayError(f"{self.name}: the labels are {self.targets.dtype}: give int64, as data.arrays() does")
        wrong = ((self.targets < 0) | (self.targets >= len(self.classes))).nonzero()
        if len(wrong):
            index = int(wrong[0])
            file = f" ({self.files.paths[index]})" if self.files else ""
            raise RelayError(
                f"{self.name}: sample {index}{file} has label {int(self.targets[index])}, "
                f"but the {len(self.classes)} classes are 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.inputs)

    @property
    def has_targets(self) -> bool:
        """Whether there is something to compare a model's outputs with."""
        return self.targets.ndim != 2 or self.targets.shape[1] > 0

    def take(self, indices: Tensor) -> "ArraySource":
        """Return the source of the samples with these indices, int64 (n,)."""
        files = None if self.files is None else self.files.take(indices.numpy())
        stamp = None if self.stamp is None else f"{self.stamp}/{_hash(indices)}"
        return replace(self, inputs=self.inputs[indices], targets=self.targets[indices], files=files, stamp=stamp)

    def fingerprint(self) -> str:
        """Return a hash of the content, or the stamp that identifies it."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self.stamp or _hash(self.inputs, self.targets)


@dataclass(frozen=True)
class DatasetSource:
    """Any map-style torch Dataset, read sample by sample through a DataLoader.

    The global generators of PyTorch, NumPy and Python are seeded for each sample; a generator that the dataset holds
    itself is not. If the dataset has a method `fingerprint()`, its result identifies the content.
    """

    dataset: Dataset[Any]
    classes: tuple[str, ...] = ()
    name: str = "dataset"
    collate: Callable[[list[Any]], Any] | None = None  # from samples to a batch; None: PyTorch's

    def __post_init__(self) -> None:
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__getitem__"):
            raise UsageError(
                f"{type(self.dataset).__name__} can only be read in its own order: give tr.data.stream(...) of it, or "
                "a Dataset with __getitem__ and __len__"
            )
        if not hasattr(self.dataset, "__len__"):
            raise UsageError(f"{type(self.dataset).__name__} has no number of samples: give it a __len__")
        if len(self) == 0:
            raise RelayError(f"{self.name}: there are no samples")

    @property
    def files(self) -> Files | None:
        """The file of each sample, if the dataset is one of ours that knows them."""
        files = getattr(self.dataset, "files", None)
        return files if isinstance(files, Files) else None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """Return the dataset's own fingerprint, or what is known without reading it: its class and its length."""
        fingerprint = getattr(self.dataset, "fingerprint", None)
        return str(fingerprint()) if callable(fingerprint) else f"{type(self.dataset).__name__} of {len(self)}"


Source = ArraySource | DatasetSource | StreamSource


@dataclass(frozen=True)
class Parts:
    """The data of a run."""

    train: Source
    test: Source | None
    validation: Source | None = None


def arrays(
    inputs: Any,
    targets: Any = None,
    classes: Sequence[str] = (),
    name: str = "arrays",
    dtype: torch.dtype = torch.float32,
) -> ArraySource:
    """Return a source of arrays. uint8 inputs stay uint8, other integers become int64, everything else `dtype`.

    Args:
        inputs: a tensor or a NumPy array (samples, …). Images are uint8 (samples, channels, height, width) or, with
            1 or 3 channels, (samples, height, width, channels), which is permuted; float images are in [0, 1].
        targets: (samples, …) class indices, numbers, or 0/1 labels; integers become int64, everything else `dtype`.
            None: the samples have no targets.
        classes: names of the classes or labels.
        name: the source's name in logs and errors.
        dtype: float32, or float64 for a model in double precision.

    Raises:
        UsageError: they can't be converted to tensors.
        RelayError: they don't match each other or the classes; the text names the sample.
    """
    x = _tensor(inputs, f"{name}: inputs")
    y = x.new_empty(len(x), 0) if targets is None and x.ndim else _tensor(targets, f"{name}: targets")
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2).contiguous()
    return ArraySource(x if x.dtype == torch.uint8 else _widened(x, dtype), _widened(y, dtype), tuple(classes), name)


def _tensor(values: Any, name: str) -> Tensor:
    """Return numbers of any kind as a tensor on the CPU."""
    if isinstance(values, np.ndarray):
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        if any(stride < 0 for stride in values.strides):  # PyTorch has none; images flipped from BGR to RGB do
            values = values.copy()
    try:
        return torch.as_tensor(values, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = str(values.dtype) if isinstance(values, np.ndarray) else type(values).__name__
        raise UsageError(
            f"{name} of {kind} can't be converted to a tensor{_mismatch(values)}: give numbers in one shape for all "
            "samples, and the names of classes as classes=…"
        ) from error


def _mismatch(values: Any) -> str:
    """Describe the first sample whose shape isn't that of sample 0: the usual reason why there is no tensor."""

    def form(value: Any) -> str:
        if isinstance(value, list | tuple):
            return f"{len(value)} entries"
        return f"shape {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__

    for index, value in enumerate(values if isinstance(values, list | tuple) else ()):
        if form(value) != form(values[0]):
            return f", as sample {index} has {form(value)} and sample 0 has {form(values[0])}"
    return ""


def _widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers as int64, and floats and booleans in a type of floats."""
    return values.to(dtype) if values.is_floating_point() or values.dtype == torch.bool else values.long()


def dataset(
    data: Dataset[Any], classes: Sequence[str] = (), collate: Callable[[list[Any]], Any] | None = None
) -> DatasetSource:
    """Return a source of any map-style torch Dataset.

    Its samples may be anything that can be collated: pairs (inputs, target), longer tuples, dicts, tensors alone; see
    `data.batch.inputs_and_targets`.

    Args:
        data: the dataset.
        classes: names of the classes; by default those that the dataset has as `classes`.
        collate: turns a list of samples into a batch, each replica's own; None: `torch.utils.data.default_collate`.
    """
    return DatasetSource(data, tuple(classes or getattr(data, "classes", ())), type(data).__name__, collate)


def split(source: Source, share: float, seed: int) -> tuple[ArraySource, ArraySource]:
    """Split a source into the larger rest and a part of it, such as training and test part.

    Each class is split by that share; a class with two samples or more is in both.

    Args:
        source: the source to split.
        share: the part's share of the samples, between 0 and 1.
        seed: determines the part's samples, together with the targets.

    Returns:
        The rest and the part.

    Raises:
        UsageError: one of them would be empty, or the source isn't held in memory.
    """
    if not 0.0 < share < 1.0:
        raise UsageError(f"a share of {share} of {source.name} leaves one part empty: choose one between 0 and 1")
    if not isinstance(source, ArraySource):
        raise UsageError(f"{source.name} can't be split without reading it: give the parts as two datasets")
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
            f"{source.name}: no class has two samples, so it can't be split: add samples, or give the parts"
        )
    rest, part = (torch.from_numpy(np.flatnonzero(side)) for side in (~chosen, chosen))
    return source.take(rest), source.take(part)


def statistics(source: Source, always: bool = True) -> dict[str, Any]:
    """Return the "mean" and "std" of an image source's channels: the published ones, or those of its images.

    A source that isn't images in memory has none.

    Args:
        source: the samples.
        always: also if the images are floats of which some are negative, as normalized ones are.
    """
    if not isinstance(source, ArraySource) or source.inputs.ndim != 4:
        return {}
    if source.mean is not None and source.std is not None:
        return {"mean": source.mean, "std": source.std}
    if not always and source.inputs.is_floating_point() and bool(source.inputs.min() < 0):
        return {}
    mean, std = channel_statistics(source.inputs)
    return {"mean": mean, "std": std}


def channel_statistics(images: Tensor) -> tuple[Mean, Mean]:
    """Return the mean and the standard deviation of each channel, on the scale [0, 1].

    Bytes are counted, which is exact. Floats are added by NumPy, which uses one thread, so the result doesn't depend
    on the number of threads.

    Args:
        images: uint8 or float32 (samples, channels, height, width).
    """
    channels, count = images.shape[1], images.numel() // images.shape[1]
    total, squares = np.zeros(channels), np.zeros(channels)
    if images.dtype == torch.uint8:
        levels = np.arange(256)
        counts = _histograms(images)
        total, squares = counts @ levels / 255, counts @ levels**2 / 255**2
    else:
        for block in _blocks(images):
            values = block.numpy().astype(np.float64)
            total += values.sum(axis=(0, 2, 3))
            squares += np.square(values).sum(axis=(0, 2, 3))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1e-6).tolist())


def _histograms(images: Tensor) -> npt.NDArray[np.int64]:
    """Return how often each value occurs in each channel of uint8 images, int64 (channels, 256)."""
    counts = np.zeros((images.shape[1], 256), dtype=np.int64)
    for block in _blocks(images):
        for channel in range(images.shape[1]):
            counts[channel] += np.bincount(block[:, channel].reshape(-1).numpy(), minlength=256)
    return counts


def _blocks(values: Tensor) -> tuple[Tensor, ...]:
    """Return (samples, …) in blocks of limited size."""
    each = max(values[0].numel(), 1) if len(values) else 1
    return torch.split(values, max(_BLOCK // each, 1))


def _hash(*tensors: Tensor) -> str:
    """Return a hash of the tensors' types, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        for block in _blocks(tensor.detach().cpu()):
            digest.update(block.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
