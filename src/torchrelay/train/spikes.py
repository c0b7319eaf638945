"""Step 7: loss spikes: a loss or gradient that isn't finite, or a loss far above those before it.

Whether a step is one depends on the losses alone and never on when they were read, so a resumed run decides the same
again. What happens then, `recovery.py` decides.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

# A loss is compared with the median of up to so many losses before it, from so many losses on.
_WINDOW, _FEWEST = 50, 10


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient went wrong.

    Attributes:
        step: counted from 1.
        what: went wrong.
        finite: whether the loss is merely high; then the step before may have done the harm.
    """

    step: int
    what: str
    finite: bool = False


class SpikeDetector:
    """Looks for spikes: at once on the CPU, where reading a loss is free, elsewhere when `read` is called.

    Args:
        threshold: a loss above this many times the median of the 50 before it is a spike; None: only a loss that isn't
            finite.
        norms: whether a gradient's norm that isn't finite is a spike.
    """

    def __init__(self, threshold: float | None = None, *, norms: bool = True) -> None:
        self.threshold, self.norms = threshold, norms
        self._recent: dict[str, deque[float]] = {}
        self._unread: list[tuple[int, Tensor, Tensor | None, str]] = []

    def check(self, step: int, loss: Tensor, grad_norm: Tensor | None = None, update: str = "model") -> Spike | None:
        """Look at a step's mean loss and gradient norm before an update; on a GPU, keep them for `read`."""
        if loss.is_cpu:
            return self._judge(step, loss.item(), 0.0 if grad_norm is None else grad_norm.item(), update)
        self._unread.append((step, loss, grad_norm, update))
        return None

    def read(self) -> Spike | None:
        """Look at the steps kept since the last call, which waits for the device; return the first spike of them."""
        unread, self._unread = self._unread, []
        for step, loss, grad_norm, update in unread:
            spike = self._judge(step, loss.item(), 0.0 if grad_norm is None else grad_norm.item(), update)
            if spike is not None:
                return spike
        return None

    def _judge(self, step: int, loss: float, grad_norm: float, update: str) -> Spike | None:
        if not math.isfinite(loss):
            return Spike(step, f"the loss of step {step} is {loss}")
        if self.norms and not math.isfinite(grad_norm):
            return Spike(step, f"the norm of the gradient of step {step} is {grad_norm}")
        recent = self._recent.get(update)
        if recent is None:
            recent = self._recent[update] = deque(maxlen=_WINDOW)
        if self.threshold is not None and len(recent) >= _FEWEST:
            usual = median(recent)
            if loss > self.threshold * usual:
                return Spike(step, f"the loss of step {step} is {loss:.4g}; the median before was {usual:.4g}", True)
        recent.append(loss)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses: a list, or of several updates one each."""
        recent = {update: list(losses) for update, losses in self._recent.items()}
        return {"recent": next(iter(recent.values()), []) if len(recent) < 2 else recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from recent losses; unread ones belong to steps that are rolled back."""
        recent = state["recent"]
        by_update: dict[str, list[float]] = recent if isinstance(recent, dict) else {"model": recent}
        self._recent = {update: deque(losses, maxlen=_WINDOW) for update, losses in by_update.items()}
        self._unread.clear()
