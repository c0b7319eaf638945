"""Step 2: the iterator that joins sources, order, augmentation and device into global batches.

A batch is a pure function of (seed, epoch, place): starting at batch k reads nothing of what came before it, and which
worker read a sample makes no difference.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from torchrelay.data.augment import Pipeline
from torchrelay.data.order import Places, order
from torchrelay.data.sources import ArraySource, DatasetSource, Source, channel_statistics
from torchrelay.device import Device
from torchrelay.errors import RelayError, UsageError
from torchrelay.faults import TargetError, out_of_range, wrong_label
from torchrelay.parallel import blocks
from torchrelay.rng import reseed_everything, seed_for, words

Sampling = Literal["shuffle", "balanced", "sequential"]
_AHEAD = 16_384  # places whose order is computed at once; one call for many batches costs less than one for each
_ON_DEVICE = 4 * 2**30  # bytes; a source up to this size is kept on a CUDA device and gathered there
_Key = tuple[int, int, int]  # epoch, place, sample index


@dataclass(frozen=True, slots=True)
class Batch:
    """One global batch, on the device."""

    inputs: Any  # (batch, …) a tensor, or a tuple, list or dict of them
    targets: Tensor  # (batch, …)
    indices: Places  # (batch,) which samples of the source these are
    blocks: tuple[int, ...]  # how many samples each replica has, in order
    name: str = "data"  # what errors call the source

    def parts(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each replica's inputs and targets; the last ones may be empty."""
        if len(self.blocks) == 1:
            yield self.inputs, self.targets
            return
        start = 0
        for size in self.blocks:
            part = slice(start, start + size)
            yield _cut(self.inputs, part), self.targets[part]
            start += size


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
        pipeline: resizing, augmentation and normalisation of arrays.
        seed: the run's seed.
        train: whether to shuffle and augment.
        sampling: "shuffle": each sample once an epoch; "balanced": every class as often, with repetition;
            "sequential": in the order of the source.
        replicas: into how many parts a batch will be divided.
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
        workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.source = source
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
        self._place_samples = _sampler(source, seed, sampling if train else "sequential")
        if isinstance(source, ArraySource):
            self._inputs, self._targets = _resident(source, device.device)
        else:
            self._loader = _Loader(source, seed, workers, device.device.type == "cuda")

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

    def close(self) -> None:
        """End the worker processes, if there are any; a later epoch starts new ones."""
        if isinstance(self.source, DatasetSource):
            self._loader.close()

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, beginning with batch `start`; what comes before it is not read."""
        # To keep this method in `self` would close a cycle: see `_Loader`.
        read = self._read_arrays if isinstance(self.source, ArraySource) else self._read_dataset
        place = start * self.batch_size
        for inputs, targets, indices in read(epoch, start):
            parts = blocks(len(indices), self.replicas)
            if self.train:
                inputs, targets = self.pipeline.train(
                    inputs, targets, seed=self.seed, epoch=epoch, place=place, indices=indices, blocks=parts
                )
            else:
                inputs = self.pipeline.evaluate(inputs)
            place += len(indices)
            yield Batch(self.device.arrange(inputs), targets, indices, parts, self.name)

    def indices(self, epoch: int, batch: int) -> Places:
        """Return which samples of the source an epoch's batch has, counted from 0; nothing is read for it."""
        return next(self._indices(epoch, batch))

    def _indices(self, epoch: int, start: int) -> Iterator[Places]:
        """Yield the sample indices of each batch from `start` on."""
        end = min(self.steps * self.batch_size, self.samples)
        ahead = max(1, _AHEAD // self.batch_size) * self.batch_size
        for first in range(start * self.batch_size, end, ahead):
            found = self._place_samples(epoch, np.arange(first, min(first + ahead, end)))
            for offset in range(0, len(found), self.batch_size):
                yield found[offset : offset + self.batch_size]

    def _read_arrays(self, epoch: int, start: int) -> Iterator[tuple[Any, Tensor, Places]]:
        for indices in self._indices(epoch, start):
            index = torch.from_numpy(indices).to(self._inputs.device)
            # Brackets would do the same in ten times the time: they allow for more than one index.
            inputs, targets = self._inputs.index_select(0, index), self._targets.index_select(0, index)
            yield self.device.move(inputs), self.device.move(targets), indices

    def _read_dataset(self, epoch: int, start: int) -> Iterator[tuple[Any, Tensor, Places]]:
        asked: deque[Places] = deque()  # the loader's workers read some batches ahead of the one it gives out

        def keys() -> Generator[list[_Key]]:
            place = start * self.batch_size
            for indices in self._indices(epoch, start):
                asked.append(indices)
                yield [(epoch, place + i, int(index)) for i, index in enumerate(indices)]
                place += len(indices)

        for inputs, targets in self._loader.read(keys()):
            yield self.device.move(inputs), self.device.move(targets), asked.popleft()


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


def _sampler(source: Source, seed: int, sampling: Sampling) -> Callable[[int, Places], Places]:
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

    def balanced(epoch: int, places: Places) -> Places:
        drawn = words(seed, "balanced", epoch, torch.from_numpy(places), 2).numpy()
        chosen = present[drawn[:, 0] * len(present) >> 32]
        result: Places = members[starts[chosen] + (drawn[:, 1] * counts[chosen] >> 32)]
        return result

    return balanced


class _Seeded(Dataset[Any]):
    """A dataset whose global randomness is set by (seed, epoch, place) right before each sample is read."""

    def __init__(self, source: DatasetSource, seed: int) -> None:
        self.dataset = source.dataset
        self.collate = source.collate or default_collate
        self.name = source.name
        self.classes = len(source.classes)
        self.seed = seed

    def __getitems__(self, keys: list[_Key]) -> Any:
        """Return the batch of these keys, or the error that a person can mend: a worker would make a text of it."""
        try:
            batch = self._batch(keys)
            self._check_labels(batch, keys)
        except RelayError as error:
            return error
        return batch

    def _batch(self, keys: list[_Key]) -> Any:
        samples = []
        for epoch, place, index in keys:
            reseed_everything(seed_for(self.seed, "sample", epoch, place))
            samples.append(self.dataset[index])
        try:
            if self.collate is default_collate and isinstance(samples[0], tuple):
                kinds = [getattr(sample[0], "dtype", None) for sample in samples]  # it would silently take the widest
                if (odd := _odd(kinds)) is not None:
                    raise self._unlike(keys, samples, odd)
            return self.collate(samples)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            shapes = [_described(sample) for sample in samples]
            if (odd := _odd(shapes)) is not None:
                raise self._unlike(keys, samples, odd) from error
            if self.collate is not default_collate or not isinstance(error, TypeError):
                raise
            raise RelayError(
                f"{self.name}: sample {keys[0][2]} is {shapes[0]}, of which PyTorch makes no batch: return tensors, "
                "arrays and numbers, or give a collate function"
            ) from error

    def _unlike(self, keys: list[_Key], samples: list[Any], odd: int) -> RelayError:
        """Return the error of a sample that doesn't go into one batch with the first."""
        return RelayError(
            f"{self.name}: sample {keys[odd][2]} is {_described(samples[odd])}, but sample {keys[0][2]} is "
            f"{_described(samples[0])}: make them alike, or give a collate function"
        )

    def _check_labels(self, batch: Any, keys: list[_Key]) -> None:
        """Refuse labels that are none of the named classes, as arrays do; here it is a worker's work."""
        targets = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
        if not self.classes or not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            return
        if (label := wrong_label(targets, self.classes)) is not None:
            raise out_of_range(label, self.classes).of(self.name, targets, [index for _, _, index in keys])


def _odd(things: Sequence[Any]) -> int | None:
    """Return the place of the first that isn't like the first of all."""
    return next((place for place, thing in enumerate(things) if thing != things[0]), None)


def _described(value: Any) -> str:
    """Return the shapes and types that a sample is made of."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_described(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_described, value)) + ")"
    return type(value).__name__


class _Keys:
    """The batches of keys that the loader's workers are to read next; set anew for each epoch."""

    def __init__(self) -> None:
        self.batches: Iterator[list[_Key]] = iter(())

    def __iter__(self) -> Iterator[list[_Key]]:
        return self.batches


class _Loader:
    """A DataLoader that reads the keys it is told to; its workers live as long as it does.

    They end at once when its last reference goes. Where the garbage collector has to find it, as part of a cycle, each
    worker is waited for five seconds: the collector has ended the threads that would tell them to end.
    """

    def __init__(self, source: DatasetSource, seed: int, workers: int, pin: bool) -> None:
        self._name = source.name
        self._keys = _Keys()
        self._workers = workers
        self._loader = DataLoader(
            _Seeded(source, seed),
            batch_sampler=self._keys,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=pin,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # otherwise each epoch would draw a number from the global one
        )

    def read(self, keys: Generator[list[_Key]]) -> Iterator[tuple[Any, Tensor]]:
        """Yield the batches of these keys; whoever read before may not go on."""
        self._keys.batches = keys
        with closing(keys):
            with self._errors():
                batches = iter(self._loader)
            while True:
                if self._keys.batches is not keys:
                    raise RelayError(f"{self._name}: another epoch was begun in between: read one at a time")
                with self._errors(), _one_thread(self._workers == 0):
                    batch = next(batches, _END)
                    if isinstance(batch, RelayError):
                        raise batch
                if batch is _END:
                    return
                if not isinstance(batch, list | tuple) or len(batch) != 2:
                    raise RelayError(
                        f"{self._name}: a sample must be a pair (inputs, target): return one, or set a collate function"
                    )
                yield batch[0], batch[1]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """End the workers when something fails; say what to do when one is gone, or can't pass on what it read."""
        try:
            yield
        except Exception as error:
            text = self._close_after(error)
            if "shared memory" in text:
                raise RelayError(
                    f"{self._name}: workers pass batches through /dev/shm, which is full: enlarge it, or use fewer "
                    "data.workers or a smaller data.batch_size"
                ) from error
            if text.startswith("DataLoader worker (pid"):
                raise RelayError(
                    f"{self._name}: {text.split('. ')[0].rstrip('.')}: perhaps the memory was too small: use fewer "
                    "data.workers, and resume"
                ) from error
            raise

    def _close_after(self, error: Exception) -> str:
        """End the workers and return what happened, in PyTorch's words.

        A worker that died while it passed a batch on is first seen as a broken connection; PyTorch's handler of the
        signal may have its say only while we clean up.
        """
        text = str(error) if isinstance(error, RuntimeError) else ""
        try:
            if isinstance(error, ConnectionError | EOFError):
                for worker in getattr(self._loader._iterator, "_workers", ()):
                    worker.join(timeout=1)
                    if worker.exitcode:
                        text = f"DataLoader worker (pid {worker.pid}) exited with code {worker.exitcode}"
            self.close()
        except RuntimeError as later:
            if not str(later).startswith("DataLoader worker (pid"):
                raise
            text = str(later)
            self.close()
        return text

    def close(self) -> None:
        """End the worker processes; a later read starts new ones."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


_END = object()  # a collate function may return None


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _one_thread(here: bool) -> Iterator[None]:
    """Read with one thread, as a worker process does: a mean over a tensor has other bits with two."""
    threads = torch.get_num_threads()
    if here and threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if here and threads > 1:
            torch.set_num_threads(threads)
