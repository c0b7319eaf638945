"""Stop when a loss is not a number, before a checkpoint can hold what it led to."""

import json
import math
from pathlib import Path

from torch import Tensor

from torchrelay.data.order import Places
from torchrelay.errors import RelayError


class FiniteGuard:
    """Reads each step's loss: at once on the CPU, where that is free, and elsewhere when the device has come to it.

    Args:
        folder: where the sample indices of a bad batch are written down, if anywhere.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._unread: list[tuple[int, Tensor, Places]] = []

    def watch(self, step: int, loss: Tensor, indices: Places) -> None:
        """Take note of a step's mean loss, before its update.

        Raises:
            RelayError: on the CPU, if it isn't finite.
        """
        self._unread.append((step, loss, indices))
        if loss.device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Read what was noted, which waits for the device.

        Raises:
            RelayError: a loss wasn't finite; the text names the step, and the folder has the batch's sample indices.
        """
        for step, loss, indices in self._unread:
            if not math.isfinite(value := loss.item()):
                self._unread.clear()
                raise RelayError(self._report(step, value, indices))
        self._unread.clear()

    def _report(self, step: int, value: float, indices: Places) -> str:
        where = ""
        if self.folder is not None:
            path = self.folder / f"nonfinite-step-{step:08d}.json"
            path.write_text(json.dumps({"step": step, "loss": str(value), "samples": indices.tolist()}) + "\n")
            where = f"; its sample indices are in {path}"
        return (
            f"the loss of step {step} is {value}: nothing of it is saved, and the last checkpoint is finite"
            f"{where}; try a lower optimizer.lr, or optimizer.clip_norm=1"
        )
