"""Step 2: read a torch Dataset sample by sample, in worker processes or in this one."""

import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from torchrelay.data.labels import out_of_range, wrong_label
from torchrelay.data.sources import DatasetSource
from torchrelay.data.stream import StreamSource
from torchrelay.errors import RelayError
from torchrelay.rng import kept, reseed_everything, seed_for
from torchrelay.run.lock import around_fork

Key = tuple[int, int, int]  # epoch, position, sample index


class Seeded(Dataset[Any]):
    """A dataset whose global generators are seeded by (seed, epoch, position) right before each sample is read."""

    def __init__(self, source: DatasetSource | StreamSource, seed: int) -> None:
        self.dataset: Any = source.dataset
        self.collate = source.collate or default_collate
        self.name = source.name
        self.classes = len(source.classes)
        self.seed = seed

    def __getitems__(self, groups: list[list[Key]]) -> Any:
        """Return each group's batch, or a `RelayError`: if it were raised, a worker would turn it into text."""
        try:
            batches = [self.batch(keys) for keys in groups]
            for batch, keys in zip(batches, groups, strict=True):
                self._check_labels(batch, keys)
        except RelayError as error:
            return error
        return batches

    def get(self, epoch: int, position: int, index: int) -> Any:
        """Return a sample."""
        reseed_everything(seed_for(self.seed, "sample", epoch, position))
        return self.dataset[index]

    def checked(self, batches: list[Any]) -> list[Any]:
        """Return batches unless one of them is None."""
        if any(each is None for each in batches):
            raise RelayError(f"{self.name}: the collate function returned None: let it return the batch")
        return batches

    def pickled(self, batches: Any) -> Any:
        """Pickle batches in a worker's main thread, which also puts their tensors into shared memory.

        The queue's own thread would print an error and drop the batch, and the reader would wait for ever.
        """
        if get_worker_info() is None:
            return batches
        try:
            return _Pickled(batches)
        except RuntimeError:  # there is no shared memory left
            raise
        except Exception as error:  # noqa: BLE001 - an object of a user's own may raise anything
            return RelayError(
                f"{self.name}: a worker can't pass on a batch: {error}: give a collate function that returns what can "
                "be pickled, or set data.workers to 0"
            )

    def batch(self, keys: list[Key]) -> Any:
        """Return the samples of these keys, collated; errors name the sample."""
        samples = []
        for epoch, position, index in keys:
            try:
                samples.append(self.get(epoch, position, index))
            except RelayError:
                raise
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise RelayError(
                    f"{self.name}: sample {index} can't be read: {type(error).__name__}: {error} "
                    f"({place.filename}, line {place.lineno})"
                ) from error
        try:
            if self.collate is default_collate and isinstance(samples[0], tuple):
                # PyTorch's collate function would silently convert to the widest type.
                types = [getattr(sample[0], "dtype", None) for sample in samples]
                if (odd := _first_different(types)) is not None:
                    raise self._mismatch(keys, samples, odd)
            return self.collate(samples)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            shapes = [_described(sample) for sample in samples]
            if (odd := _first_different(shapes)) is not None:
                raise self._mismatch(keys, samples, odd) from error
            if self.collate is not default_collate or not isinstance(error, TypeError):
                raise
            raise RelayError(
                f"{self.name}: sample {keys[0][2]} is {shapes[0]}, which PyTorch can't collate: return tensors, "
                "arrays and numbers, or give a collate function"
            ) from error

    def _mismatch(self, keys: list[Key], samples: list[Any], odd: int) -> RelayError:
        """Return the error for a sample that can't be collated with the first one."""
        return RelayError(
            f"{self.name}: sample {keys[odd][2]} is {_described(samples[odd])}, but sample {keys[0][2]} is "
            f"{_described(samples[0])}: give all samples one shape and type, or give a collate function"
        )

    def _check_labels(self, batch: Any, keys: list[Key]) -> None:
        """Refuse labels that aren't the index of a class, as `ArraySource` does; here the workers check."""
        targets = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
        if not self.classes or not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            return
        if (label := wrong_label(targets, self.classes)) is not None:
            raise out_of_range(label, self.classes).of(self.name, targets, [index for _, _, index in keys])


def _first_different(values: Sequence[Any]) -> int | None:
    """Return the position of the first value that differs from values[0]."""
    return next((position for position, value in enumerate(values) if value != values[0]), None)


def _described(value: Any) -> str:
    """Return the types and shapes in a sample."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_described(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_described, value)) + ")"
    return type(value).__name__


class _Keys:
    """The batch sampler: the groups of keys that the workers read next; each epoch sets its own."""

    def __init__(self) -> None:
        self.batches: Iterator[list[list[Key]]] = iter(())

    def __iter__(self) -> Iterator[list[list[Key]]]:
        return self.batches


class Loader:
    """A DataLoader that reads given keys; its workers live as long as it does.

    The workers end as soon as its last reference is dropped. If it is part of a reference cycle, the garbage collector
    first ends the threads that would tell the workers to stop, and then PyTorch waits five seconds for each worker.
    """

    def __init__(self, source: DatasetSource, seed: int, workers: int, pin: bool) -> None:
        self._name = source.name
        self._keys = _Keys()
        self._workers = workers
        self._seeded = Seeded(source, seed)
        self._loader = DataLoader(
            self._seeded,
            batch_sampler=self._keys,
            collate_fn=self._seeded.pickled,
            num_workers=workers,
            pin_memory=pin,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # otherwise each epoch would draw from the global generator
        )

    def read(self, keys: Generator[list[list[Key]]]) -> Iterator[list[Any]]:
        """Yield lists of batches, one for each group of keys; an earlier read can't continue."""
        self._keys.batches = keys
        with closing(keys):
            try:
                with around_fork if self._workers else nullcontext():
                    batches = iter(self._loader)
            except Exception as error:
                self._explain(error)
                raise
            while True:
                if self._keys.batches is not keys:
                    raise RelayError(f"{self._name}: another epoch was started meanwhile: read one at a time")
                # PyTorch's signal handler may raise anywhere in the block, in the end of a context as well.
                try:
                    with one_thread() if self._workers == 0 else nullcontext():
                        batch = next(batches, _END)
                except Exception as error:
                    self._explain(error)
                    raise
                if isinstance(batch, RelayError):
                    self.close()
                    raise batch
                if batch is _END:
                    return
                yield self._seeded.checked(batch)  # type: ignore[arg-type]  # not _END

    def dummy(self) -> Any:
        """Return the first sample, twice, as a batch; it is read in this process."""
        with kept(torch.device("cpu")):
            return self._seeded.batch([(0, 0, 0)] * 2)

    def _explain(self, error: Exception) -> None:
        """End the workers; raise an error with the remedy if one died or couldn't pass on a batch."""
        text = self._close_after(error)
        if "shared memory" in text:
            raise RelayError(
                f"{self._name}: workers pass batches through /dev/shm, which is full: enlarge it, or use fewer "
                "data.workers or a smaller data.batch_size"
            ) from error
        if text.startswith("DataLoader worker (pid"):
            raise RelayError(
                f"{self._name}: {text.split('. ')[0].rstrip('.')}: perhaps it ran out of memory: use fewer "
                "data.workers, and resume"
            ) from error

    def _close_after(self, error: Exception) -> str:
        """End the workers and return PyTorch's description of what happened.

        A worker that died while it passed on a batch first appears as a broken connection; PyTorch's signal handler may
        only report it while we clean up.
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


_END = object()  # not None, which a collate function may return


class _Pickled:
    """An object in pickled form, which unpickling restores."""

    def __init__(self, value: Any) -> None:
        self.data = bytes(ForkingPickler.dumps(value))

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return ForkingPickler.loads, (self.data,)


@contextmanager
def one_thread() -> Iterator[None]:
    """Read with one thread, as a worker process does: with two, the mean of a tensor has different bits."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
