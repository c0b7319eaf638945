"""Step 2: the iterator that joins source, order, augmentation and device into global batches.

A batch is a pure function of (seed, epoch, position). Starting at batch k reads nothing before it, and it makes no
difference which worker reads a sample. A stream alone is read in its own order: see `stream_reader`.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from torchrelay.data.augment.pipeline import Pipeline
from torchrelay.data.batch import Batch, aligned, inputs_and_targets, replica_sizes
from torchrelay.data.order import Positions
from torchrelay.data.prefetch import gather, prefetch, side_stream
from torchrelay.data.sampling import Own, Sampler, Sampling, sampler
from torchrelay.data.sources import ArraySource, DatasetSource, Source
from torchrelay.data.stream import StreamSource
from torchrelay.data.stream_reader import StreamReader
from torchrelay.data.workers import Key, Loader
from torchrelay.device.device import Device, mapped
from torchrelay.errors import RelayError, UsageError

# One call for many batches costs less than one call for each batch.
_POSITIONS_PER_CALL = 16_384  # whose order is computed in one call
_BYTES_PER_CALL = 2**18  # of small batches that are gathered in one call
_ON_DEVICE = 4 * 2**30  # bytes; a source up to this size stays on a CUDA device and is gathered there


@dataclass(frozen=True, slots=True)
class _Share:
    """The part of a global batch that this process computes."""

    indices: Positions
    position: int  # of the first of them in the epoch
    replica_sizes: tuple[int, ...]
    first_replica: int
    size: int  # of the global batch


class Batches:
    """A source as global batches.

    Args:
        source: the samples.
        batch_size: samples in a global batch; the last batch of an epoch may have fewer.
        device: the device of the batches, on which arrays are augmented.
        pipeline: resizing, augmentation and normalization of arrays.
        seed: the run's seed.
        train: whether to shuffle and augment.
        sampling: "shuffle": each sample once per epoch; "balanced": each class equally often, with replacement;
            "sequential": in the order of the source; or a function from (seed, epoch) to sample indices.
        replicas: the number of parts into which each batch is divided.
        rank: this process's rank. A process reads its own replicas' part of each training batch, and every
            `world_size`-th batch of an evaluation.
        world_size: the number of processes.
        workers: processes that read a dataset; arrays need none.
        drop_last: leave out the last batch of an epoch if it is smaller.
        limit: batches of an evaluation, whose samples are drawn by the seed, or the first of a stream; None: all. Of
            training: batches of an epoch of a stream without a length.
        dtype: of the model's parameters; inputs that are floats are converted unless it is float32.

    Attributes:
        stream: what reads the source if that is a stream; it has a state.

    Raises:
        UsageError: an argument has a value that it can't have, or nothing says where a stream ends.
        RelayError: there is no batch in an epoch, or the source has no classes to balance.
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
        world_size: int = 1,
        workers: int = 0,
        drop_last: bool = False,
        limit: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_arguments(batch_size, replicas if train else world_size, rank, world_size, workers)
        self.source = source
        self.rank, self.world_size = rank, world_size
        self.batch_size = batch_size
        self.device = device
        self.pipeline = pipeline
        self.seed = seed
        self.train, self.sampling = train, sampling
        self.dtype = dtype
        self.name = f"{source.name} ({'training' if train else 'evaluation'})"
        self.replicas = replicas
        self._sample_indices = sampler(source, seed, sampling if train else _evaluated_order(limit))
        self.samples = _count(source, self._sample_indices, limit, batch_size, train=train)
        self.has_targets = not isinstance(source, ArraySource) or source.has_targets
        self.steps = self.samples // batch_size if drop_last else -(-self.samples // batch_size)
        if self.steps == 0:
            raise RelayError(
                f"data.drop_last leaves no batch: {self.samples} samples are fewer than a batch of {batch_size}"
            )
        self._pin_memory = device.device.type == "cuda"
        # User code that runs in this process may look at the model, so it has to run on the loop's stream.
        reads_here = isinstance(source, StreamSource) or (isinstance(source, DatasetSource) and workers == 0)
        runs_user_code = not pipeline.is_built_in or reads_here
        self._stream = None if runs_user_code else side_stream(device.device)
        self.stream: StreamReader | None = None
        if isinstance(source, ArraySource):
            self._inputs, self._targets = _arrays(source, device.device)
            self._sample_bytes = max(1, source.inputs.nbytes // len(source))
        else:
            self._loader = _reader(source, seed, workers, self._pin_memory)
            self.stream = self._loader if isinstance(self._loader, StreamReader) else None
            self._collates = source.collate is not None

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.steps

    def targets_in_memory(self) -> Tensor | None:
        """Return all targets (samples, …) if the source holds them in memory, otherwise None."""
        return self.source.targets if isinstance(self.source, ArraySource) and self.has_targets else None

    def dummy_batch(self) -> Batch:
        """Return the first sample, twice, as a batch: for a process that has no samples in a step of all processes."""
        indices = np.zeros(2, dtype=np.int64)
        if isinstance(self.source, ArraySource):
            data: Any = tuple(values[:1].repeat_interleave(2, 0) for values in (self._inputs, self._targets))
        elif isinstance(self._loader, Loader):
            data = self._loader.dummy()
        else:
            data = (self.source.collate or default_collate)([self._loader.any_sample()] * 2)
        return self._batch(self.device.move(data), _Share(indices, 0, (2,), 0, 2), 0)

    def close(self) -> None:
        """End the worker processes, if there are any; a later epoch starts new ones."""
        if not isinstance(self.source, ArraySource):
            self._loader.close()

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch `start` on; only a stream reads the batches before it."""
        return prefetch(self._epoch(epoch, start), self._stream)

    def indices(self, epoch: int, batch: int) -> Positions:
        """Return the sample indices of a batch, which is counted from 0; no sample is read."""
        first = batch * self.batch_size
        return self._sample_indices(epoch, np.arange(first, min(first + self.batch_size, self.samples)))

    def _epoch(self, epoch: int, start: int) -> Generator[Batch]:
        # Keeping this method in `self` would make a reference cycle: see `Loader`.
        if isinstance(self.source, ArraySource):
            for data, share in self._read_arrays(epoch, start):
                yield self._batch(data, share, epoch)
            return
        for parts, share in self._read_dataset(epoch, start):
            if len(parts) == 1:
                yield self._batch(self.device.move(parts[0]), share, epoch)
            else:
                yield self._joined(parts, share, epoch)

    def _joined(self, parts: list[Any], share: _Share, epoch: int) -> Batch:
        """Return the batch of several replicas, each of which was collated alone, or of none."""
        found, rest, start = list[Batch](), iter(parts), 0
        for replica, size in enumerate(share.replica_sizes, share.first_replica):
            own = _Share(share.indices[start : start + size], share.position + start, (size,), replica, share.size)
            found.append(self._batch(self.device.move(next(rest)) if size else None, own, epoch))
            start += size
        first, parts_of = found[0], tuple(found) if parts else ()
        return replace(first, indices=share.indices, replica_sizes=share.replica_sizes, parts=parts_of)

    def _batch(self, data: Any, share: _Share, epoch: int) -> Batch:
        """Augment or prepare what was read, and return it as a batch."""
        inputs, targets = inputs_and_targets(data)
        is_pair = isinstance(data, list | tuple) and len(data) == 2
        if not self.has_targets:
            targets = None
        if self.train and len(share.indices):
            inputs, targets = self.pipeline.train(
                inputs,
                targets,
                seed=self.seed,
                epoch=epoch,
                position=share.position,
                indices=share.indices,
                replica_sizes=share.replica_sizes,
            )
        elif len(share.indices):
            inputs = self.pipeline.evaluate(inputs)
        if self.dtype != torch.float32:
            inputs = mapped(self._converted, inputs)
        inputs, first, size = self.device.arrange(inputs), share.first_replica, share.size
        data = None if is_pair else data
        return Batch(inputs, targets, share.indices, share.replica_sizes, self.name, first, size, data)

    def _converted(self, inputs: Any) -> Any:
        return inputs.to(self.dtype) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs

    def _shares(self, epoch: int, start: int) -> Iterator[_Share]:
        """Yield this process's share of each batch from `start` on; only the order of its own positions is computed."""
        numbers = range(start, self.steps)
        if not self.train:  # the processes take whole batches in turn
            numbers = range(start + (self.rank - start) % self.world_size, self.steps, self.world_size)
        per_call = max(1, _POSITIONS_PER_CALL // max(1, self.batch_size // (self.world_size if self.train else 1)))
        for first in range(0, len(numbers), per_call):
            shares = [self._share(number) for number in numbers[first : first + per_call]]
            positions = [np.arange(position, position + sum(sizes)) for position, sizes, *_ in shares]
            indices = self._sample_indices(epoch, np.concatenate(positions))
            ends = np.cumsum([len(each) for each in positions])
            for (position, sizes, replica, size), part in zip(shares, np.split(indices, ends[:-1]), strict=True):
                yield _Share(part, position, sizes, replica, size)

    def _share(self, number: int) -> tuple[int, tuple[int, ...], int, int]:
        """Return the first position, the replicas' sizes, the first replica and the global size of a batch's share."""
        position = number * self.batch_size
        size = min(self.batch_size, self.samples - position)
        if not self.train:
            return position, (size,), 0, size
        sizes, each = replica_sizes(size, self.replicas), self.replicas // self.world_size
        first = self.rank * each
        return position + sum(sizes[:first]), sizes[first : first + each], first, size

    def _read_arrays(self, epoch: int, start: int) -> Iterator[tuple[tuple[Tensor, Tensor], _Share]]:
        per_call = max(1, _BYTES_PER_CALL // (self._sample_bytes * self.batch_size))
        for shares in _chunks(self._shares(epoch, start), per_call):
            index = torch.from_numpy(np.concatenate([share.indices for share in shares]))
            index = index.to(self._inputs.device, non_blocking=True)
            pin = self._pin_memory and self._inputs.is_cpu
            inputs, targets = gather(self._inputs, index, pin), gather(self._targets, index, pin)
            sizes = [len(share.indices) for share in shares]
            for share, x, y in zip(shares, torch.split(inputs, sizes), torch.split(targets, sizes), strict=True):
                yield (self.device.move(aligned(x)), self.device.move(aligned(y))), share

    def _read_dataset(self, epoch: int, start: int) -> Iterator[tuple[list[Any], _Share]]:
        """Yield collated batches: one for the share, or one for each replica where the user collates."""
        requested: deque[_Share] = deque()  # the loader's workers read some batches ahead
        empty: list[_Share] = []  # in an epoch's last batch this process may have no samples

        def keys() -> Generator[list[list[Key]]]:
            for share in self._shares(epoch, start):
                if not len(share.indices):
                    empty.append(share)
                    continue
                requested.append(share)
                keys = [(epoch, share.position + i, int(index)) for i, index in enumerate(share.indices)]
                yield _divided(keys, share.replica_sizes) if self._collates else [keys]

        for parts in self._loader.read(keys()):
            yield parts, requested.popleft()
        for share in empty:
            yield [], share


def _divided(keys: list[Key], sizes: Sequence[int]) -> list[list[Key]]:
    """Divide a share's keys over its replicas: what a sample is padded to mustn't depend on the number of processes."""
    ends = list(accumulate(sizes))
    return [keys[end - size : end] for size, end in zip(sizes, ends, strict=True) if size]


def _check_arguments(batch_size: int, replicas: int, rank: int, world_size: int, workers: int) -> None:
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("world_size", world_size, 1),
        ("replicas", replicas, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise UsageError(f"{name} is {value!r}: it must be a whole number of {least} or more")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank is {rank}: {world_size} processes have ranks 0 to {world_size - 1}")
    if replicas % world_size:
        raise UsageError(f"{world_size} processes can't share {replicas} replicas: choose a multiple of {world_size}")


def _count(source: Source, sampled: Sampler, limit: int | None, batch_size: int, *, train: bool) -> int:
    """Return the number of samples in an epoch of at most `limit` batches."""
    if isinstance(sampled, Own):
        return sampled.samples
    if isinstance(source, StreamSource):
        return source.limited(limit, batch_size, train=train)
    return len(source) if limit is None else min(len(source), limit * batch_size)


def _reader(source: DatasetSource | StreamSource, seed: int, workers: int, pin: bool) -> Loader | StreamReader:
    if isinstance(source, StreamSource):
        return StreamReader(source, seed)
    return Loader(source, seed, workers, pin)


def _arrays(source: ArraySource, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and targets: on the device if it is a CUDA device with room for them, otherwise on the CPU."""
    if device.type == "cuda" and source.inputs.nbytes <= _ON_DEVICE:
        return source.inputs.to(device), source.targets.to(device)
    return source.inputs, source.targets


def _chunks(shares: Iterator[_Share], size: int) -> Iterator[list[_Share]]:
    while chunk := list(islice(shares, size)):
        yield chunk


def _evaluated_order(limit: int | None) -> Sampling:
    """Return the order of an evaluation: that of the source, or a random one of which the first samples are taken."""
    return "sequential" if limit is None else "shuffle"
