"""Step 2: a source that can only be read in its own order: a torch IterableDataset."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

from torchrelay.errors import UsageError


@dataclass(frozen=True)
class StreamSource:
    """Samples that can only be read in their own order, again from the start at each epoch.

    If the dataset has a method `fingerprint()`, its result identifies the content.
    """

    dataset: Any  # an IterableDataset, or anything else that can be iterated again and again
    length: int | None = None  # samples of an epoch; None: unknown, or without end
    classes: tuple[str, ...] = ()
    name: str = "stream"
    collate: Callable[[list[Any]], Any] | None = None  # from samples to a batch; None: PyTorch's
    keeps_state: bool = True  # whether its `state_dict` says all that is needed to go on
    files: None = None

    def __post_init__(self) -> None:
        if isinstance(self.dataset, Iterator):
            raise UsageError(
                f"a {self.name} can be read only once, and a run reads again where it resumes: give an "
                "IterableDataset, whose __iter__ starts from the beginning"
            )
        if not hasattr(self.dataset, "__iter__"):
            raise UsageError(f"{self.name} is no stream, as it has no __iter__: give an IterableDataset")
        if self.length is not None and self.length < 1:
            raise UsageError(f"{self.name}: the length is {self.length}: it must be 1 or more")

    def __len__(self) -> int:
        """Return the number of samples in an epoch; 0 if it is unknown."""
        return self.length or 0

    def fingerprint(self) -> str:
        """Return the dataset's own fingerprint, or what is known without reading it: its class and its length."""
        fingerprint = getattr(self.dataset, "fingerprint", None)
        known = f"{type(self.dataset).__name__} of {self.length or 'unknown length'}"
        return str(fingerprint()) if callable(fingerprint) else known

    def limited(self, batches: int | None, batch_size: int, *, train: bool) -> int:
        """Return how many samples are read in an epoch of at most so many batches.

        Raises:
            UsageError: nothing says where it ends.
        """
        if batches is not None:
            return min(self.length or batches * batch_size, batches * batch_size)
        if self.length is not None:
            return self.length
        end = "steps=…" if train else "evaluate_batches in RunSettings"
        raise UsageError(
            f"{self.name} has no __len__, so nothing says where its {'training' if train else 'evaluation'} ends: "
            f"give {end}, or tr.data.stream(dataset, length=…) with the samples of an epoch"
        )


def stream(
    data: Any,
    length: int | None = None,
    classes: Sequence[str] = (),
    collate: Callable[[list[Any]], Any] | None = None,
    keeps_state: bool | None = None,
) -> StreamSource:
    """Return a source that is read in its own order, such as a torch IterableDataset.

    Args:
        data: the dataset; its samples may be anything that can be collated, see `data.batch.inputs_and_targets`.
        length: samples of an epoch; None: its `__len__`, if it has one. Without a length, a run needs `steps`.
        classes: names of the classes; by default those that the dataset has as `classes`.
        collate: turns a list of samples into a batch, each replica's own; None: `torch.utils.data.default_collate`.
        keeps_state: whether its `state_dict`, if it has one, says all that is needed to go on; otherwise it is read
            again. None: unless it has a shuffle buffer of Hugging Face's datasets, whose content isn't in the state.

    Raises:
        UsageError: the data can't be read again from the start.
    """
    try:
        length = len(data) if length is None else length
    except (TypeError, NotImplementedError):
        length = None
    named = tuple(classes or getattr(data, "classes", ()))
    keeps_state = not _has_buffer(data) if keeps_state is None else keeps_state
    return StreamSource(data, length, named, type(data).__name__, collate, keeps_state)


def _has_buffer(data: Any) -> bool:
    """Return whether a stream of Hugging Face's datasets, or one that it is made of, has a shuffle buffer."""
    parts = [getattr(data, name, None) for name in ("_ex_iterable", "ex_iterable")]
    parts += getattr(data, "ex_iterables", [])
    return type(data).__name__.startswith("BufferShuffled") or any(
        _has_buffer(part) for part in parts if part is not None
    )


def is_stream(data: Any) -> bool:
    """Return whether data can only be read in its own order."""
    return isinstance(data, IterableDataset)
