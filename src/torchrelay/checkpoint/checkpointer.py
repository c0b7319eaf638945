"""Step 3: the `Checkpointer`, all that a training loop needs: is a checkpoint due, save it, restore it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator

from torchrelay.checkpoint import retention
from torchrelay.checkpoint.format import Contents, Manifest, read_manifest, step_of
from torchrelay.checkpoint.writer import Writer
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


class Checkpointer:
    """Saves and restores the checkpoints of a folder.

    Checkpoints are written on a background thread, which starts at the first `save` and ends with `close`. Reading
    needs no thread, so processes that only read may have a checkpointer as well.

    Example::

        with Checkpointer(folder, CheckpointSettings(), steps_per_epoch=100, total_steps=1000) as checkpointer:
            if (contents := checkpointer.newest(print)) is not None:
                model.load_state_dict(contents.model)
            ...
            if checkpointer.due_after(step) or checkpointer.due_by_clock():
                checkpointer.save(Contents(step, model.state_dict(), {"optimizer": optimizer.state_dict()}))

    Args:
        folder: the folder of checkpoints.
        settings: when to save and what to keep.
        steps_per_epoch: global batches per epoch.
        total_steps: steps of the whole run.
        before_write: called on the background thread before each write.
        after_write: called on the background thread with the manifest of each checkpoint that is on disk.
        warn: called with a message about an old checkpoint that can't be deleted, once for each.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        *,
        steps_per_epoch: int,
        total_steps: int,
        before_write: Callable[[], None] = lambda: None,
        after_write: Callable[[Manifest], None] = lambda _: None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self._seconds = settings.every.seconds
        self._steps = settings.every.steps(steps_per_epoch, total_steps) if self._seconds is None else 0
        self._saved_at = time.monotonic()
        self._before_write, self._after_write = before_write, after_write
        self._warn = warn
        self._warned: set[str] = set()
        self._writer: Writer | None = None

    def due_after(self, step: int) -> bool:
        """Return whether a checkpoint is due by the number of steps done."""
        return self._steps > 0 and step % self._steps == 0

    def due_by_clock(self) -> bool:
        """Return whether a checkpoint is due by wall-clock time."""
        return self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds

    def save(self, contents: Contents, *, training_continues: bool = False) -> None:
        """Stage `contents` in memory and return; the background thread writes the files.

        Args:
            contents: what to save.
            training_continues: the caller calls `settle` before it changes weights, averages or the optimizer's
                state; so large tensors may be staged in the background, too.

        Raises:
            RelayError: an earlier checkpoint could not be written.
        """
        self._saved_at = time.monotonic()
        if self._writer is None:
            keep, keep_best = self.settings.keep, self.settings.keep_best
            self._writer = Writer(self.folder, keep, keep_best, self._before_write, self._after_write)
        self._writer.save(contents, training_continues=training_continues)
        self._warn_once(self._writer.undeleted)

    def settle(self, *, trained: bool = False) -> None:
        """Wait until everything is staged; call this before weights change.

        Args:
            trained: whether a training step's forward and backward pass ran since the last save.
        """
        if self._writer is not None:
            self._writer.settle(trained=trained)

    def wait(self) -> None:
        """Wait until all checkpoints are on disk.

        Raises:
            RelayError: one could not be written.
        """
        if self._writer is not None:
            self._writer.wait()
            self._warn_once(self._writer.undeleted)

    def close(self) -> None:
        """Finish writing and end the background thread; a later `save` starts a new one.

        Raises:
            RelayError: a checkpoint could not be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            self._warn_once(writer.undeleted)

    def _warn_once(self, messages: list[str]) -> None:
        for message in messages:
            if message not in self._warned:
                self._warned.add(message)
                self._warn(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def newest(self, warn: Callable[[str], None], before: int | None = None) -> Contents | None:
        """Read the newest intact checkpoint; see `retention.newest`."""
        return retention.newest(self.folder, warn, before)

    def find(self, which: str) -> Path:
        """Return the checkpoint called "best", "last" or by its step; see `retention.find`."""
        return retention.find(self.folder, which)

    def manifest(self, step: int) -> Manifest:
        """Read the manifest of a step's checkpoint; see `format.read_manifest`."""
        return read_manifest(self.find(str(step)))

    def tidy(self, step: int) -> None:
        """Finish what a process that died may have left undone: delete what the settings don't keep.

        Args:
            step: of the checkpoint that was restored. If a later one is damaged, nothing is deleted.
        """
        paths = retention.complete(self.folder)
        if paths and step_of(paths[-1]) == step:
            retention.clean(self.folder)
            self._warn_once(retention.prune(self.folder, self.settings.keep, self.settings.keep_best))

    def remove_after(self, step: int) -> None:
        """Delete the checkpoints of more steps than this, as a rollback does."""
        retention.remove_after(self.folder, step)
