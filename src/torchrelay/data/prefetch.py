"""Step 2, on a CUDA device: the next batch is prepared while this one computes.

What prepares a batch is given to a stream of its own. The loop asks for the next batch as soon as it has given a step
to the device, long before the device has taken it: so both run side by side, and a step waits for its own batch alone.
The batches, their order and their bits are those of one stream. See "CUDA streams" in PyTorch's notes on CUDA
semantics.
"""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchrelay.data.batches import Batch

_STEPS = 2  # that may wait for the device when another batch is prepared: each holds its batch's memory
_FIRST = -1  # the stream's priority: its few small kernels go in between a step's, or they would come last


class Beside(Protocol):
    """Where batches are prepared."""

    def begin(self) -> None:
        """Let what is prepared from now on see all that the loop has done."""

    def preparing(self) -> AbstractContextManager[None]:
        """Return a context: what is given to the device in it is done before what follows it."""

    def hand_over(self, batch: "Batch") -> None:
        """Keep a batch's memory until the loop has done with it."""


class SideStream:
    """A stream beside the one on which the loop computes.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=_FIRST)  # type: ignore[no-untyped-call]
        self._asked: deque[torch.cuda.Event] = deque()  # the loop's places at which it asked for a batch

    def begin(self) -> None:
        """Wait for the loop's stream, on which the data came to the device."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Give what follows to this stream; the loop's waits for it in the end.

        The host waits where it is far ahead of the device: otherwise memory would fill with batches.
        """
        loop = torch.cuda.current_stream(self._device)
        self._asked.append(loop.record_event(torch.cuda.Event(blocking=True)))  # type: ignore[no-untyped-call]
        if len(self._asked) > _STEPS:
            self._asked.popleft().synchronize()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            loop.wait_stream(self._stream)

    def hand_over(self, batch: "Batch") -> None:
        """Tell the allocator that the loop's stream uses this memory, too."""
        loop = torch.cuda.current_stream(self._device)
        for tensor in _tensors((batch.inputs, batch.targets)):
            if tensor.is_cuda:
                tensor.record_stream(loop)


def beside(device: torch.device) -> SideStream | None:
    """Return where batches for a device are prepared; None: where the loop is."""
    return SideStream(device) if device.type == "cuda" else None


def ahead(batches: Generator["Batch"], where: Beside | None) -> Generator["Batch"]:
    """Yield the same batches, each prepared when it is asked for, but beside what the device still has to do."""
    if where is None:
        yield from batches
        return
    where.begin()
    with closing(batches):
        while True:
            with where.preparing():
                batch = next(batches, None)
            if batch is None:
                return
            where.hand_over(batch)
            yield batch


def gather(values: Tensor, index: Tensor, pin: bool) -> Tensor:
    """Return values[index], in memory from which a GPU can copy while the host goes on, if `pin` asks for it."""
    if not pin:
        return values.index_select(0, index)  # brackets take ten times as long: they allow for more than one index
    found = torch.empty((len(index), *values.shape[1:]), dtype=values.dtype, pin_memory=True)
    return torch.index_select(values, 0, index, out=found)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tensor, or of tuples, lists and dicts of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
