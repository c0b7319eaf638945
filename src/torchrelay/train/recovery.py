"""Step 7: losses that went wrong: not a number, or far above those before. What happens then, `recovery` decides.

A decision depends on the losses alone, never on when somebody read them: a resumed run decides the same again.
"""

import math
from collections import deque
from statistics import median
from typing import Any

from torch import Tensor

from torchrelay.errors import RelayError

_WINDOW = 50  # losses before a step of which the median is what is usual
_FEWEST = 10  # losses that make a median worth something


class SpikeError(RelayError):
    """A step's loss or gradient isn't finite, or its loss is far above those before."""

    def __init__(self, step: int, what: str, *, finite: bool = False) -> None:
        super().__init__(f"{what}; try a lower optimizer.lr, optimizer.clip_norm=1, or run.on_spike=rollback")
        self.step = step  # counted from 1
        self.what = what
        self.finite = finite  # then the step before may have done the harm; otherwise it is this step's own


class SpikeDetector:
    """Reads each step's loss: at once on the CPU, where that is free, and elsewhere when the device has come to it.

    Args:
        threshold: a loss above this many times the median of the 50 before is a spike; None: only one that isn't
            finite.
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._unread: list[tuple[int, Tensor, Tensor | None]] = []

    def watch(self, step: int, loss: Tensor, norm: Tensor | None = None) -> None:
        """Take note of a step's mean loss and of its gradient's norm, before the update.

        Raises:
            SpikeError: on the CPU, if something is wrong with them.
        """
        if loss.is_cpu:
            self._judge(step, loss.item(), 0.0 if norm is None else norm.item())
        else:
            self._unread.append((step, loss, norm))

    def read(self) -> None:
        """Read what was noted, which waits for the device.

        Raises:
            SpikeError: of the first step with which something is wrong; what was noted after it is forgotten.
        """
        unread, self._unread = self._unread, []
        for step, loss, norm in unread:
            self._judge(step, loss.item(), 0.0 if norm is None else norm.item())

    def _judge(self, step: int, loss: float, norm: float) -> None:
        if not math.isfinite(loss):
            raise SpikeError(step, f"the loss of step {step} is {loss}")
        if not math.isfinite(norm):
            raise SpikeError(step, f"the norm of the gradient of step {step} is {norm}")
        if self.threshold is not None and len(self._recent) >= _FEWEST:
            usual = median(self._recent)
            if loss > self.threshold * usual:
                what = f"the loss of step {step} is {loss:.4g}, where {usual:.4g} was usual before"
                raise SpikeError(step, what, finite=True)
        self._recent.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses."""
        return {"recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from recent losses; what is unread belongs to steps that are taken back."""
        self._recent = deque(state["recent"], maxlen=_WINDOW)
        self._unread.clear()
