"""Step 4: work that goes on beside the backward pass, one piece after another, in the same order in every process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import Tensor


class Beside:
    """Runs pieces of work on tensors beside what the caller goes on with: in a thread, or on a stream of a GPU.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pieces: SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]]] = SimpleQueue()
        if self._stream is None:
            # A daemon: it may wait for a process that is no more, and must not keep this one from ending.
            threading.Thread(target=self._work, name="exchange", daemon=True).start()

    def run(self, piece: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Begin a piece of work, and return what waits for its end and returns its result, or raises its error."""
        if self._stream is None:
            future: Future[Tensor] = Future()
            self._pieces.put((piece, future))
            return future.result
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            result = piece()

        def wait() -> Tensor:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
            return result

        return wait

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            piece, future = self._pieces.get()
            try:
                future.set_result(piece())
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
