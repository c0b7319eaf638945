"""Step 2, on a CUDA device: prepare the next batch while the device computes the current step.

Batches are prepared on a side stream. The loop asks for the next batch as soon as it has queued a step, long before the
device has finished that step, so both run at the same time and a step waits for its own batch only. The batches, their
order and their bits are the same as on one stream. See "CUDA streams" in PyTorch's notes on CUDA semantics.
"""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from torchrelay.data.batch import Batch

_QUEUED_STEPS = 2  # that may wait for the device when another batch is prepared: each holds its batch's memory
_HIGH_PRIORITY = -1  # lets the few small kernels of a batch run between a step's kernels, not after all of them


class SideStream:
    """A CUDA stream beside the one on which the loop computes.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=_HIGH_PRIORITY)  # type: ignore[no-untyped-call]
        self._requests: deque[torch.cuda.Event] = deque()  # where the loop's stream was at each request for a batch

    def begin(self) -> None:
        """Wait for the loop's stream, on which the data was copied to the device."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Queue the work of this context on the side stream; the loop's stream waits for it at the end.

        The host waits if it is far ahead of the device: otherwise batches would fill the memory.
        """
        loop = torch.cuda.current_stream(self._device)
        self._requests.append(loop.record_event(torch.cuda.Event(blocking=True)))  # type: ignore[no-untyped-call]
        if len(self._requests) > _QUEUED_STEPS:
            self._requests.popleft().synchronize()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            loop.wait_stream(self._stream)

    def hand_over(self, batch: Batch) -> None:
        """Tell the allocator that the loop's stream uses the batch's memory, too."""
        loop = torch.cuda.current_stream(self._device)
        for tensor in _tensors([(each.inputs, each.targets, each.data) for each in (batch, *batch.parts)]):
            if tensor.is_cuda:
                tensor.record_stream(loop)


def side_stream(device: torch.device) -> SideStream | None:
    """Return the stream on which batches for a device are prepared; None stands for the loop's own."""
    return SideStream(device) if device.type == "cuda" else None


def prefetch(batches: Generator[Batch], stream: SideStream | None) -> Generator[Batch]:
    """Yield the same batches, each prepared on the side stream when the loop asks for it."""
    if stream is None:
        yield from batches
        return
    stream.begin()
    with closing(batches):
        while True:
            with stream.preparing():
                batch = next(batches, None)
            if batch is None:
                return
            stream.hand_over(batch)
            yield batch


def gather(values: Tensor, index: Tensor, pin: bool) -> Tensor:
    """Return values[index]; `pin` asks for pinned memory, from which a GPU copies without blocking the host."""
    if not pin:
        return values.index_select(0, index)  # ten times as fast as brackets, which allow for more than one index
    selected = torch.empty((len(index), *values.shape[1:]), dtype=values.dtype, pin_memory=True)
    return torch.index_select(values, 0, index, out=selected)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
