"""Step 2: read a stream in its own order, and say from where it goes on.

A stream is read in the training's process, a batch when the loop asks for it: what a checkpoint holds of it is where
the last batch ended that was trained. Each process reads the whole stream and keeps the samples of its own replicas, so
the number of processes changes nothing.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

from torchrelay.data.stream import StreamSource
from torchrelay.data.workers import Key, Seeded, one_thread
from torchrelay.errors import RelayError, UsageError
from torchrelay.rng import reseed_everything, seed_for

_END = object()


@dataclass(frozen=True)
class _Place:
    """How far a stream was read."""

    epoch: int
    reading: int = 0  # how often it has ended in this epoch, and begun again
    began: int = 0  # the position of this reading's first sample
    read: int = 0  # samples of the epoch so far


class StreamReader(Seeded):
    """Reads the samples at increasing positions of an epoch; those between them are other processes'.

    The global generators of PyTorch, NumPy and Python are seeded by (seed, "stream", epoch) when the stream begins and
    for each sample. A stream without a length that ends begins again.

    A dataset with `state_dict` and `load_state_dict`, or an iterator with them, goes on from its state. Any other one
    is read again from its beginning to where it was. At the beginning of an epoch a dataset gets back the state that it
    had at first, so that an epoch depends on nothing before it.

    Args:
        source: the stream.
        seed: the run's seed.
    """

    def __init__(self, source: StreamSource, seed: int) -> None:
        super().__init__(source, seed)
        self._length, self._keeps_state = source.length, source.keeps_state
        self._iterator: Iterator[Any] | None = None
        self._place = _Place(0)
        self._saved: dict[str, Any] = {}  # where to go on
        self._first_state: Any = _END
        self._sample: Any = _END  # the last one, of any kind

    def read(self, keys: Generator[list[list[Key]]]) -> Iterator[list[Any]]:
        """Yield lists of batches, one for each group of keys; an earlier read can't continue."""
        self.close()
        with closing(keys):
            for groups in keys:
                with one_thread():
                    batches = self.__getitems__(groups)
                if isinstance(batches, RelayError):
                    raise batches
                yield self.checked(batches)

    def get(self, epoch: int, position: int, index: int) -> Any:  # noqa: ARG002 - the index is the position
        """Return the sample at a position."""
        if self._iterator is None:
            self._begin(epoch, position)
        while self._place.read < position:
            self._next()
        return self._next()

    def any_sample(self) -> Any:
        """Return any sample: the last one, or the first."""
        if self._sample is _END:
            self.get(0, 0, 0)
            self._iterator = None
        return self._sample

    def close(self) -> None:
        """Let go of what is being read; a later read starts anew, or goes on from here."""
        self._saved, self._iterator = self._state(), None

    def state_dict(self, epoch: int, end: int) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on after a global batch.

        Args:
            epoch: that of the batch.
            end: the position after the batch's last sample, to which the samples of other processes are read.
        """
        if self._iterator is not None and self._place.epoch != epoch:
            return {}
        with one_thread():
            while self._iterator is not None and self._place.read < end:
                self._next()
        return self._state()

    def _state(self) -> dict[str, Any]:
        if self._iterator is None:
            return self._saved
        place, holder = self._place, self._holder()
        if holder is None:  # read again from the last beginning
            return asdict(replace(place, read=place.began))
        return {**asdict(place), "dataset": deepcopy(holder.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch whose end `state_dict` was given."""
        self._saved, self._iterator = state, None

    @property
    def has_state(self) -> bool:
        """Whether the stream can go on without being read again, as far as is known before it is read."""
        return self._is_stateful(self.dataset)

    def _is_stateful(self, value: Any) -> bool:
        return self._keeps_state and hasattr(value, "state_dict") and hasattr(value, "load_state_dict")

    def _holder(self) -> Any:
        """Return what has the stream's state: the dataset or its iterator; None: neither."""
        return next((each for each in (self.dataset, self._iterator) if self._is_stateful(each)), None)

    def _begin(self, epoch: int, position: int) -> None:
        """Go on from what was saved if that is before a position of the epoch, otherwise from the epoch's start."""
        if self._is_stateful(self.dataset) and self._first_state is _END:
            self._first_state = deepcopy(self.dataset.state_dict())
        saved = dict(self._saved)
        state = saved.pop("dataset", None)
        if saved and saved["epoch"] == epoch and saved["read"] <= position:
            self._open(_Place(**saved), state)
        else:
            self._open(_Place(epoch))

    def _open(self, place: _Place, state: Any = None) -> None:
        self._place = place
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(place.epoch + place.reading)
        if self._is_stateful(self.dataset):
            self.dataset.load_state_dict(deepcopy(self._first_state if state is None else state))
        reseed_everything(seed_for(self.seed, "stream", place.epoch, place.reading))
        self._iterator = iter(self.dataset)
        if state is not None and self._holder() is self._iterator:
            self._iterator.load_state_dict(deepcopy(state))

    def _next(self) -> Any:
        """Return the next sample."""
        place = self._place
        reseed_everything(seed_for(self.seed, "stream", place.epoch, place.reading, place.read))
        sample = next(self._iterator, _END)  # type: ignore[arg-type]
        if sample is _END:
            if self._length is not None:
                raise RelayError(
                    f"{self.name} ended after {place.read:,} samples, and its length is {self._length:,}: give the "
                    "number of samples that it yields as its __len__, or as tr.data.stream(dataset, length=…)"
                )
            if place.read == place.began:
                raise RelayError(f"{self.name} yields no samples when it is read from the start")
            self._open(_Place(place.epoch, place.reading + 1, place.read, place.read))
            return self._next()
        self._place, self._sample = replace(place, read=place.read + 1), sample
        return sample


def check_apart(training: StreamReader | None, others: Iterable[StreamReader | None]) -> None:
    """Check that no evaluation reads the very object in which the training's place is kept.

    Raises:
        UsageError: one does.
    """
    if training is None or not training.has_state:
        return
    if any(other is not None and other.dataset is training.dataset for other in others):
        raise UsageError(
            f"{training.name} is training and evaluation data at once, and its one state can't say where each stands: "
            "give two objects"
        )
