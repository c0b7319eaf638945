"""Step 3: when checkpoints are saved, and how many are kept."""

import time

from pydantic import Field, field_validator

from torchrelay.duration import Duration
from torchrelay.settings import Settings


class CheckpointSettings(Settings):
    """When checkpoints are saved and which are kept."""

    every: Duration = Duration("1 epoch")
    """How often to save: "1 epoch", "500 steps" or "10 min". The end of the run is always saved."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest to keep."""
    keep_best: int = Field(default=1, ge=0)
    """How many of the best, by the task's headline metric, to keep as well."""

    @field_validator("every")
    @classmethod
    def _check(cls, every: Duration) -> Duration:
        if not every.amount:
            raise ValueError(f"'{every}' is no interval: write '1 epoch', '500 steps' or '10 min'")
        return every


class SaveSchedule:
    """Decides when a checkpoint is due.

    Args:
        settings: the interval.
        steps_per_epoch: global batches per epoch.
        total_steps: steps of the whole run.
    """

    def __init__(self, settings: CheckpointSettings, steps_per_epoch: int, total_steps: int) -> None:
        self._seconds = settings.every.seconds
        self._steps = settings.every.steps(steps_per_epoch, total_steps) if self._seconds is None else 0
        self.saved()

    def saved(self) -> None:
        """Restart the wall-clock interval."""
        self._saved_at = time.monotonic()

    def due_after(self, step: int) -> bool:
        """Return whether a checkpoint is due by the number of steps done."""
        return self._steps > 0 and step % self._steps == 0

    def due_by_clock(self) -> bool:
        """Return whether a checkpoint is due by wall-clock time."""
        return self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds
