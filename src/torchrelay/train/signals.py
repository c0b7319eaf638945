"""Step 7: a stop by a signal, which only sets a flag; the loop looks at it between two steps.

Nothing is saved inside a handler: it may interrupt a half-done update. A second signal ends the process at once.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Windows has no SIGUSR1.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignal:
    """A context in which SIGINT, SIGTERM and SIGUSR1 set `received` instead of ending the process.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A signal ends a session, and not what follows it.
        self.received = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature is Python's
        if self.received is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                return  # an agent repeats the signal when another process has stopped; it kills us if it must
            os._exit(128 + number)  # asked twice: the earlier checkpoints are whole, so leave at once
        self.received = signal.Signals(number)
