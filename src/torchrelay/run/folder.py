"""Step 1: the run's folder: its lock, its log and its metrics.

Reading a run needs nothing but these files: `recipe.toml`, `log.txt`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
`curves.png`.
"""

import contextlib
import fcntl
import json
import math
import os
import shlex
import socket
import time
import tomllib
from pathlib import Path
from typing import Any, Literal, TextIO

import tomli_w
from pydantic import Field

from torchrelay.checkpoint.format import CheckpointSettings, Contents
from torchrelay.checkpoint.writer import Writer
from torchrelay.data import files
from torchrelay.errors import RelayError, UsageError
from torchrelay.report.curves import read_metrics
from torchrelay.run.plots import Drawing
from torchrelay.run.terminal import Terminal
from torchrelay.run.trackers import TensorBoard, Tracker
from torchrelay.settings import Settings
from torchrelay.train.views import Views

Line = dict[str, Any]  # one line of metrics.jsonl: step, epoch, split, and metrics by name


class RunSettings(Settings):
    """How long to train, from which seed, and how often to look."""

    epochs: int = Field(default=10, ge=1)
    """How many times to go through the training data."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """From which all randomness of the run follows: initial weights, order, augmentation, dropout."""
    exact: bool = True
    """Only deterministic kernels, and replicas in a power of two: the same bits however the run is interrupted."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps; the schedule still spans all epochs. Unset: train all epochs."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs between two evaluations; the last epoch is always evaluated."""
    train_metrics: bool = True
    """Measure accuracy and its like on the training batches, too, as they come."""
    test_views: Views = 1
    """Judge an image by the mean over views of it. 2: it and its mirror image; 6: if unsure, shifted ones, too."""
    log_every: int = Field(default=50, ge=1)
    """Steps between two lines of metrics inside an epoch."""
    on_spike: Literal["stop", "rollback"] = "stop"
    """On a spike of the loss: stop; or go back to the checkpoint before it, leave its batch out (on record), go on."""
    spike_threshold: float | None = Field(default=None, gt=1)
    """A loss above this many times the median of the 50 steps before is a spike. Unset: only one that isn't finite."""
    max_skipped: int = Field(default=20, ge=1)
    """How many batches may be left out before the run stops after all."""
    patience: int | None = Field(default=None, ge=1)
    """Stop early when the headline metric has not improved for this many evaluations. Unset: never."""


class Stopwatch:
    """Measures what people are told of the time; nothing that is computed depends on it."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin to count seconds and samples."""
        self._since, self.samples = time.perf_counter(), 0

    def lap(self) -> dict[str, float]:
        """Return the seconds since the start, and the samples of each."""
        seconds = time.perf_counter() - self._since
        return {"seconds": round(seconds, 3), "samples_per_second": round(self.samples / max(seconds, 1e-9), 1)}


class SaveSchedule:
    """When a checkpoint is due.

    Args:
        saving: how often.
        steps_per_epoch: global batches of an epoch.
        total_steps: of the whole run.
    """

    def __init__(self, saving: CheckpointSettings, steps_per_epoch: int, total_steps: int) -> None:
        self._seconds = saving.every.seconds
        self._steps = saving.every.steps(steps_per_epoch, total_steps) if self._seconds is None else 0
        self.saved()

    def saved(self) -> None:
        """Take note of a save."""
        self._saved_at = time.monotonic()

    def after_step(self, step: int) -> bool:
        """Return whether one is due by the number of steps."""
        return self._steps > 0 and step % self._steps == 0

    def by_clock(self) -> bool:
        """Return whether one is due by the clock."""
        return self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds


class Run:
    """An open run folder. One process at a time holds it.

    Args:
        folder: where the run is, or will be.
        terminal: where people read along.
        saving: which checkpoints are kept.
        resume: whether to go on with a run that is there; otherwise the folder must not hold one.

    Raises:
        UsageError: the folder holds a run already, or holds none to resume.
        RelayError: another process trains in it, or it can't be written.
    """

    def __init__(
        self,
        folder: Path,
        terminal: Terminal,
        saving: CheckpointSettings,
        *,
        resume: bool = False,
    ) -> None:
        self.folder = folder
        self.terminal = terminal
        started = (folder / "recipe.toml").exists()
        if started and not resume:
            raise UsageError(
                f"{folder} holds a run already: choose another folder, or go on with it by: "
                f"torchrelay resume {shlex.quote(str(folder))}"
            )
        if resume and not started:
            raise UsageError(f"{folder} holds no run to resume: give a folder that 'torchrelay train' made")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder / "lock")
            self._log = (folder / "log.txt").open("a", encoding="utf-8")
            self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise RelayError(
                f"can't write in the run folder {folder}: {error.strerror or error}; choose another by --run"
            ) from error
        self.tensorboard = TensorBoard(folder / "tensorboard", say=self.say)
        self.trackers: list[Tracker] = [self.tensorboard]
        self.drawing = Drawing(folder, self.say)
        self.metrics_lines = 0  # to which a resume of a checkpoint made now cuts metrics.jsonl
        # What a checkpoint counts on must be on the disk before it: a machine may lose its power.
        self._writer = Writer(self.checkpoints, saving, before=lambda: os.fsync(self._metrics.fileno()))

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def say(self, text: str) -> None:
        """Write a line to the terminal and, with the time, to log.txt."""
        self.terminal.say(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line to log.txt alone."""
        _append(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def record(self, line: Line) -> None:
        """Append a line to metrics.jsonl and hand it to the trackers."""
        # JSON has no NaN and no infinity; a reader in another language must be able to read every line.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        _append(self._metrics, json.dumps(plain, ensure_ascii=False) + "\n")
        self.metrics_lines += 1
        for tracker in self.trackers:
            tracker.write(line)

    def rewind(self, lines: int) -> None:
        """Go back to a checkpoint: cut metrics.jsonl to its lines, and let TensorBoard show no more than that."""
        path = self.folder / "metrics.jsonl"
        there = path.read_bytes().splitlines(keepends=True)
        if len(there) < lines:
            self.say(f"warning: {path} has {len(there)} lines, of the {lines} that the checkpoint knows of")
        os.truncate(path, sum(map(len, there[:lines])))
        self._metrics.seek(0, os.SEEK_END)
        self.metrics_lines = min(lines, len(there))
        self.tensorboard.rewrite(read_metrics(self.folder))

    def save(self, contents: Contents, *, goes_on: bool = False) -> None:
        """Save a checkpoint behind the training's back; with `goes_on`, `settle` is called before a weight changes.

        Raises:
            RelayError: an earlier one could not be written.
        """
        self._writer.save(contents, goes_on=goes_on)

    def settle(self, *, trained: bool = False) -> None:
        """Wait until what is saved is copied, as weights are about to change; `trained`: by a training step."""
        self._writer.settle(trained=trained)

    def wait(self) -> None:
        """Wait until all checkpoints are on the disk.

        Raises:
            RelayError: one could not be written.
        """
        self._writer.wait()

    def write_recipe(self, record: dict[str, Any]) -> None:
        """Write down what runs; from then on the folder holds a run."""
        path = self.folder / "recipe.toml"
        staging = path.with_suffix(".partial")
        staging.write_text(tomli_w.dumps(record), encoding="utf-8")
        staging.rename(path)

    def read_recipe(self) -> dict[str, Any]:
        """Return what `write_recipe` wrote down."""
        return tomllib.loads((self.folder / "recipe.toml").read_text(encoding="utf-8"))

    def write_files(self, marks: files.Marks) -> None:
        """Write down which files the data comes from, if it comes from files."""
        if marks:
            files.write(self.folder / "files.json.gz", marks)

    def read_files(self) -> files.Marks:
        """Return what `write_files` wrote down."""
        return files.read(self.folder / "files.json.gz")

    def close(self) -> None:
        """Finish what is being written, close the files and give the folder free.

        Raises:
            RelayError: a checkpoint could not be written.
        """
        try:
            self._writer.close()
        finally:
            self.drawing.finish()
            for tracker in self.trackers:
                tracker.close()
            for file in (self._metrics, self._log, self._lock):
                with contextlib.suppress(OSError):  # each line was flushed: what is left has failed, and been told of
                    file.close()


def _append(file: TextIO, line: str) -> None:
    """Write a line through to a file of the run's folder.

    Raises:
        RelayError: the disk is full, or gone.
    """
    try:
        file.write(line)
        file.flush()
    except OSError as error:
        raise RelayError(
            f"can't write {file.name}: {error.strerror or error}; make room or mend the disk, then resume the run"
        ) from error


def _lock(path: Path) -> TextIO:
    """Take the folder's lock; the system gives it back when the process ends, however it ends."""
    file = path.open("a+", encoding="utf-8")
    try:
        # lockf belongs to the process alone: a flock would live on in forked loader workers after kill -9.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RelayError(
            f"{path.parent} is in use by {holder}: wait for it, stop it, or choose another run folder"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def free_folder(name: str, parent: Path = Path("runs")) -> Path:
    """Return `parent/name`, or with the first number behind it that is free."""
    folder, number = parent / name, 2
    while folder.exists():
        folder, number = parent / f"{name}-{number}", number + 1
    return folder
