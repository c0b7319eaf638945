"""Step 2: the iterator that joins sources, order, augmentation and device into global batches.

A batch is a pure function of (seed, epoch, place): starting at batch k reads nothing of what came before it, and which
worker read a sample makes no difference.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from torchrelay.data.augment import Pipeline
from torchrelay.data.order import Positions, order
from torchrelay.data.prefetch import ahead, beside, gather
from torchrelay.data.sources import ArraySource, DatasetSource, Source, channel_statistics
from torchrelay.data.workers import Key, Loader
from torchrelay.device.device import Device
from torchrelay.distributed.replicas import blocks
from torchrelay.errors import RelayError, UsageError
from torchrelay.rng import words
from torchrelay.tasks.targets import TargetError

Sampling = Literal["shuffle", "balanced", "sequential"]
_AHEAD = 16_384  # places whose order is computed at once; one call for many batches costs less than one for each
_AT_ONCE = 2**18  # bytes of small batches that are gathered at once: one call for many costs less than one for each
_ON_DEVICE = 4 * 2**30  # bytes; a source up to this size is kept on a CUDA device and gathered there


@dataclass(frozen=True, slots=True)
class Batch:
    """One global batch, or what this process computes of it, on the device."""

    inputs: Any  # (samples, …) a tensor, or a tuple, list or dict of them; None where there are no samples
    targets: Tensor  # (samples, …)
    indices: Positions  # (samples,) which samples of the source these are
    blocks: tuple[int, ...]  # how many samples each replica of this process has, in order
    name: str = "data"  # what errors call the source
    first: int = 0  # the first of these replicas
    size: int = 0  # samples of the global batch

    def parts(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each replica's inputs and targets; the last ones may be empty."""
        if len(self.blocks) == 1:
            yield self.inputs, self.targets
            return
        start = 0
        for size in self.blocks:
            part = slice(start, start + size)
            yield None if self.inputs is None else _cut(self.inputs, part), self.targets[part]
            start += size


@dataclass(frozen=True, slots=True)
class _Own:
    """What this process has of a global batch."""

    indices: Positions
    place: int  # of the first of them, in the epoch
    blocks: tuple[int, ...]
    first: int
    size: int


def _cut(value: Any, part: slice) -> Any:
    if isinstance(value, dict):
        return {key: _cut(item, part) for key, item in value.items()}
    if isinstance(value, list | tuple) and all(isinstance(item, Tensor | dict | list | tuple) for item in value):
        items = [_cut(item, part) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # the first: a named tuple
    return value[part]  # a tensor, or a list with one thing a sample


class Batches:
    """A source as global batches.

    Args:
        source: the samples.
        batch_size: samples of a global batch; the last of an epoch may have fewer.
        device: where the batches go, and where arrays are augmented.
        pipeline: resizing, augmentation and normalization of arrays.
        seed: the run's seed.
        train: whether to shuffle and augment.
        sampling: "shuffle": each sample once an epoch; "balanced": every class as often, with repetition;
            "sequential": in the order of the source.
        replicas: into how many parts a batch will be divided.
        rank: which of the processes this is; it reads its own replicas' part of each training batch, or, where nothing
            is trained, every `ranks`-th batch.
        ranks: how many processes there are.
        workers: processes that read a dataset; arrays need none.
        drop_last: leave out an epoch's last batch where it is smaller.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        device: Device,
        pipeline: Pipeline,
        *,
        seed: int = 0,
        train: bool = True,
        sampling: Sampling = "shuffle",
        replicas: int = 1,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.source = source
        self.rank, self.ranks = rank, ranks
        self.batch_size = batch_size
        self.device = device
        self.pipeline = pipeline
        self.seed = seed
        self.train = train
        self.name = f"{source.name} ({'training' if train else 'evaluation'})"
        self.replicas = replicas
        self.samples = len(source)
        if batch_size < 1:
            raise UsageError(f"the batch size is {batch_size}: choose 1 or more samples")
        self.steps = self.samples // batch_size if drop_last else -(-self.samples // batch_size)
        if self.steps == 0:
            raise RelayError(
                f"data.drop_last leaves nothing: {self.samples} samples are fewer than a batch of {batch_size}"
            )
        self._pins = device.device.type == "cuda"  # memory of the host's, so that copies don't wait
        # What runs here of the user's own may look at the model: it stays where the loop is.
        own = not pipeline.is_ours or (isinstance(source, DatasetSource) and workers == 0)
        self._beside = None if own else beside(device.device)
        self._place_samples = _sampler(source, seed, sampling if train else "sequential")
        if isinstance(source, ArraySource):
            self._inputs, self._targets = _resident(source, device.device)
            self._bytes = max(1, source.inputs.nbytes // self.samples)  # of a sample
        else:
            self._loader = Loader(source, seed, workers, self._pins)

    def __len__(self) -> int:
        """Return how many batches an epoch has."""
        return self.steps

    def check_targets(self, check: Callable[[Tensor, str], None]) -> None:
        """Have a task look at all targets, if they are held in memory.

        Raises:
            RelayError: one can't be learnt; the text names its sample.
        """
        if isinstance(self.source, ArraySource):
            try:
                check(self.source.targets, self.name)
            except TargetError as error:
                raise error.of(self.name, self.source.targets, range(self.samples)) from None

    def some(self) -> Batch:
        """Return the first sample, twice, as a batch: for a process that has no samples, and whom the others need."""
        indices = np.zeros(2, dtype=np.int64)
        if isinstance(self.source, ArraySource):
            inputs, targets = (values[:1].repeat_interleave(2, 0) for values in (self._inputs, self._targets))
        else:
            inputs, targets = (self.source.collate or default_collate)([self.source.dataset[0]] * 2)
        inputs, targets = self.device.move(inputs), self.device.move(targets)
        return self._batch(inputs, targets, _Own(indices, 0, (2,), 0, 2), 0)

    def close(self) -> None:
        """End the worker processes, if there are any; a later epoch starts new ones."""
        if isinstance(self.source, DatasetSource):
            self._loader.close()

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, beginning with batch `start`; what comes before it is not read."""
        return ahead(self._epoch(epoch, start), self._beside)

    def _epoch(self, epoch: int, start: int) -> Generator[Batch]:
        # To keep this method in `self` would close a cycle: see `Loader`.
        read = self._read_arrays if isinstance(self.source, ArraySource) else self._read_dataset
        for inputs, targets, own in read(epoch, start):
            yield self._batch(inputs, targets, own, epoch)

    def _batch(self, inputs: Any, targets: Tensor, own: "_Own", epoch: int) -> Batch:
        """Return what was read as the batch that the model sees."""
        if self.train and len(own.indices):
            inputs, targets = self.pipeline.train(
                inputs,
                targets,
                seed=self.seed,
                epoch=epoch,
                place=own.place,
                indices=own.indices,
                blocks=own.blocks,
            )
        elif len(own.indices):
            inputs = self.pipeline.evaluate(inputs)
        return Batch(self.device.arrange(inputs), targets, own.indices, own.blocks, self.name, own.first, own.size)

    def indices(self, epoch: int, batch: int) -> Positions:
        """Return which samples of the source an epoch's batch has, counted from 0; nothing is read for it."""
        first = batch * self.batch_size
        return self._place_samples(epoch, np.arange(first, min(first + self.batch_size, self.samples)))

    def _own(self, epoch: int, start: int) -> "Iterator[_Own]":
        """Yield what this process has of each batch from `start` on; only the order of its own places is computed."""
        numbers = range(start, self.steps)
        if not self.train:  # whole batches, in turns
            numbers = range(start + (self.rank - start) % self.ranks, self.steps, self.ranks)
        ahead = max(1, _AHEAD // max(1, self.batch_size // (self.ranks if self.train else 1)))
        for first in range(0, len(numbers), ahead):
            shares = [self._share(number) for number in numbers[first : first + ahead]]
            places = [np.arange(place, place + sum(own)) for place, own, *_ in shares]
            found = self._place_samples(epoch, np.concatenate(places))
            ends = np.cumsum([len(each) for each in places])
            for (place, own, replica, size), indices in zip(shares, np.split(found, ends[:-1]), strict=True):
                yield _Own(indices, place, own, replica, size)

    def _share(self, number: int) -> tuple[int, tuple[int, ...], int, int]:
        """Return this process's first place in a batch, its replicas' sizes, the first of them, and the whole size."""
        place = number * self.batch_size
        size = min(self.batch_size, self.samples - place)
        if not self.train:
            return place, (size,), 0, size
        parts, each = blocks(size, self.replicas), self.replicas // self.ranks
        first = self.rank * each
        return place + sum(parts[:first]), parts[first : first + each], first, size

    def _read_arrays(self, epoch: int, start: int) -> "Iterator[tuple[Any, Tensor, _Own]]":
        for some in _batched(self._own(epoch, start), max(1, _AT_ONCE // (self._bytes * self.batch_size))):
            index = torch.from_numpy(np.concatenate([own.indices for own in some]))
            index = index.to(self._inputs.device, non_blocking=True)
            pin = self._pins and self._inputs.is_cpu
            inputs, targets = gather(self._inputs, index, pin), gather(self._targets, index, pin)
            sizes = [len(own.indices) for own in some]
            for own, x, y in zip(some, torch.split(inputs, sizes), torch.split(targets, sizes), strict=True):
                yield self.device.move(x), self.device.move(y), own

    def _read_dataset(self, epoch: int, start: int) -> "Iterator[tuple[Any, Tensor, _Own]]":
        asked: deque[_Own] = deque()  # the loader's workers read some batches ahead of the one it gives out
        empty: list[_Own] = []  # the last batch of an epoch may have no samples for this process

        def keys() -> Generator[list[Key]]:
            for own in self._own(epoch, start):
                if not len(own.indices):
                    empty.append(own)
                    continue
                asked.append(own)
                yield [(epoch, own.place + i, int(index)) for i, index in enumerate(own.indices)]

        for inputs, targets in self._loader.read(keys()):
            yield self.device.move(inputs), self.device.move(targets), asked.popleft()
        for own in empty:
            yield None, torch.empty(0, device=self.device.device), own


def statistics(source: Source) -> dict[str, Any]:
    """Return the channel means and deviations of images: the published ones, or those of this data."""
    if not isinstance(source, ArraySource) or source.inputs.ndim != 4:
        return {}
    if source.mean is not None and source.std is not None:
        return {"mean": source.mean, "std": source.std}
    mean, std = channel_statistics(source.inputs)
    return {"mean": mean, "std": std}


def _resident(source: ArraySource, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the arrays, on the device if that is CUDA and they are small enough to stay there."""
    if device.type == "cuda" and source.inputs.nbytes <= _ON_DEVICE:
        return source.inputs.to(device), source.targets.to(device)
    return source.inputs, source.targets


def _batched(items: Iterator[_Own], size: int) -> Iterator[list[_Own]]:
    while some := list(islice(items, size)):
        yield some


def _sampler(source: Source, seed: int, sampling: Sampling) -> Callable[[int, Positions], Positions]:
    """Return the function from (epoch, places) to sample indices."""
    samples = len(source)
    if sampling == "sequential":
        return lambda _epoch, places: places
    if sampling == "shuffle":
        return lambda epoch, places: order(seed, epoch, places, samples)
    if not isinstance(source, ArraySource) or source.targets.ndim != 1 or source.targets.is_floating_point():
        raise RelayError("data.sampling 'balanced' needs one class a sample, held in memory: use 'shuffle'")
    targets = source.targets.numpy()
    members = np.argsort(targets, kind="stable")
    counts = np.bincount(targets)
    present = np.flatnonzero(counts)
    starts = np.cumsum(counts) - counts

    def balanced(epoch: int, places: Positions) -> Positions:
        drawn = words(seed, "balanced", epoch, torch.from_numpy(places), 2).numpy()
        chosen = present[drawn[:, 0] * len(present) >> 32]
        result: Positions = members[starts[chosen] + (drawn[:, 1] * counts[chosen] >> 32)]
        return result

    return balanced
