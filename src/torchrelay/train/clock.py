"""Step 7: what the clock decides: the times that people are shown, and when a line is written; nothing computed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures the times that people are shown; nothing that is computed depends on it."""

    def __init__(self) -> None:
        self.total = 0
        self.start()

    def start(self) -> None:
        """Start to count seconds and samples."""
        self._since, self._samples = time.perf_counter(), 0

    def count(self, samples: int) -> None:
        """Count trained samples."""
        self._samples += samples
        self.total += samples

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no time meanwhile."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """Return the seconds since the start, and the samples per second."""
        seconds = time.perf_counter() - self._since
        return {"seconds": round(seconds, 3), "samples_per_second": round(self._samples / max(seconds, 1e-9), 1)}


class Lines:
    """When a line of metrics is written within an epoch: every so many steps, or by rank 0's clock.

    Args:
        steps: between two lines; 0: the clock decides.
        seconds: between two lines.

    Attributes:
        by_clock: whether rank 0's clock decides.
        due: whether a line is written after this step; the same on all processes, which add up what was logged.
        asked: whether rank 0 has asked for a line, as all processes have learned.
    """

    def __init__(self, steps: int = 50, seconds: float = 0.0) -> None:
        self._steps, self._seconds, self.by_clock = steps, seconds, seconds > 0
        self._asked_at, self.due, self.asked = time.monotonic(), False, False

    def ask(self) -> bool:
        """Return, once, whether a line is due by the clock."""
        if not self.by_clock or time.monotonic() - self._asked_at < self._seconds:
            return False
        self._asked_at = time.monotonic()
        return True

    def count(self, step: int) -> bool:
        """Decide whether a line is due after this step."""
        self.due, self.asked = step % self._steps == 0 if self._steps else self.asked, False
        return self.due
