"""Step 1: the run folder: its lock, log, metrics and recipe.

A run can be read from these files alone: `recipe.toml`, `log.txt`, `metrics.jsonl`, `receipt.jsonl`, `tensorboard/`,
`checkpoints/`, `curves.png`.
"""

import contextlib
import gzip
import json
import math
import os
import shlex
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import tomli_w
from portalocker import AlreadyLocked, LockException

from torchrelay.errors import RelayError, UsageError, explained, intact
from torchrelay.run import disk
from torchrelay.run.lock import lock
from torchrelay.run.metrics import ASKED, Line, read_metrics
from torchrelay.run.named import TENSORBOARD, Named, factories
from torchrelay.run.plots import PlotProcess
from torchrelay.run.receipt import NAME as RECEIPT
from torchrelay.run.receipt import Receipt
from torchrelay.run.record import read_files, read_record
from torchrelay.run.requests import REQUESTS, file_of
from torchrelay.run.terminal import Terminal
from torchrelay.run.trackers import TensorBoard, Tracker

# What a run writes into its folder; a start that failed may have left some of it behind.
_OWN = {"lock", "log.txt", "logs", "metrics.jsonl", "tensorboard", "checkpoints", "curves.png", "confusion.png"}
_OWN |= {"evaluation.json", "model.txt", "files.json.gz", "elastic.json", "elastic.json.partial"}
_OWN |= {
    RECEIPT,
    "samples.safetensors",
    "report.html",
    "wandb",
    "mlflow.db",
    "trackio",
    *(file_of(Path(), request).name for request in REQUESTS),
}


def check_free(path: Path) -> None:
    """Refuse a folder for a new run that holds a run already, or files of somebody's.

    Raises:
        UsageError: it does.
    """
    if (path / "recipe.toml").exists():
        if has_only_begun(path):
            return
        by_script = 'started_from = "python"' in (path / "recipe.toml").read_text(encoding="utf-8", errors="replace")
        way = "trainer.resume(), in place of fit()" if by_script else f"torchrelay resume {shlex.quote(str(path))}"
        raise UsageError(f"{path} holds a run already: choose another folder, or resume it by: {way}")
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    others = [name for name in names if not name.startswith((".", "spike-step-")) and name not in _OWN]
    if others:
        raise UsageError(
            f"{path} isn't empty and holds no run, but {others[0]}: choose a new or an empty folder for the run"
        )


def has_only_begun(path: Path) -> bool:
    """Return whether a run has taken no step on record, as one that failed in its first: it may begin again."""
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    saved = {each.name for each in checkpoints.iterdir()} if checkpoints.is_dir() else set()
    is_empty = not metrics.exists() or not metrics.stat().st_size
    return is_empty and saved <= {"step-00000000", "last", "best"}


class RunFolder:
    """An open run folder, held by one process at a time.

    Args:
        path: the folder, which is created if it doesn't exist.
        terminal: where messages are also shown.
        resume: whether the folder must hold a run already; otherwise it must not.
        trackers: names of trackers; None: TensorBoard.
        settings: of the run, for trackers, by dotted names.

    Raises:
        UsageError: there is no such tracker; the folder already holds a run or other files, or holds no run to resume.
        RelayError: another process is training in it, or it can't be written.
    """

    def __init__(
        self,
        path: Path,
        terminal: Terminal,
        *,
        resume: bool = False,
        trackers: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        trackers = (TENSORBOARD,) if trackers is None else trackers
        made = factories(trackers)
        self.path = path
        self.terminal = terminal
        if not resume:
            check_free(path)
        elif not (path / "recipe.toml").exists():
            raise UsageError(f"{path} holds no run to resume: give a folder that 'torchrelay train' made")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _take(path / "lock")
            if not resume and self.checkpoints.exists():
                shutil.rmtree(self.checkpoints)  # of step 0: see `check_free`
            self._log = (path / "log.txt").open("a", encoding="utf-8")
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
            self.receipt = Receipt(path / RECEIPT, fresh=not resume)
        except OSError as error:
            raise RelayError(
                f"can't write in the run folder {path}: {error.strerror or error}; choose another by --run"
            ) from error
        self.tensorboard = TensorBoard(path / "tensorboard", say=self.say, on=TENSORBOARD in trackers)
        self._named = [Named(name, partial(make, path, settings or {}), self.say) for name, make in made.items()]
        self.trackers: list[Tracker] = [self.tensorboard, *self._named]
        for tracker in self._named if not resume else ():  # a resume rewinds
            tracker.rewrite([])
        self.plots = PlotProcess(path, self.say)
        # What a checkpoint records, so that resuming it can truncate metrics.jsonl; the lines that people asked for, by
        # which no checkpoint changes, don't count.
        self.metrics_lines = 0

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    def say(self, text: str) -> None:
        """Write a line to the terminal and, with a timestamp, to log.txt."""
        self.terminal.say(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line to log.txt only."""
        _append(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def record(self, line: Line) -> None:
        """Append a line to metrics.jsonl and pass it to the trackers."""
        # JSON has no NaN and no infinity; readers in other languages must be able to parse every line.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        _append(self._metrics, json.dumps(plain, ensure_ascii=False) + "\n")
        self.metrics_lines += ASKED not in line
        for tracker in [*self.trackers]:
            try:
                tracker.write(line)
            except Exception as error:  # noqa: BLE001 - one of the user's own may raise anything; no chart is worth a run
                self.trackers.remove(tracker)
                self._warn_of(tracker, error)
                with contextlib.suppress(Exception):
                    tracker.close()

    def _warn_of(self, tracker: Tracker, error: Exception) -> None:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        self.say(
            f"warning: the tracker {type(tracker).__name__} failed ({cause}): it is left out of the rest of the run"
        )

    def rewind(self, lines: int) -> None:
        """Return to a checkpoint: truncate metrics.jsonl to the lines it records, and the trackers' charts with it."""
        path = self.path / "metrics.jsonl"
        with explained(f"cut {path} to the checkpoint's lines"):
            written = path.read_bytes().splitlines(keepends=True)
            counted = [place for place, text in enumerate(written) if f'"{ASKED}": true'.encode() not in text]
            kept = written[: counted[lines]] if lines < len(counted) else written
            os.truncate(path, sum(map(len, kept)))
            self._metrics.seek(0, os.SEEK_END)
        if len(counted) < lines:
            self.say(f"warning: {path} has {len(counted)} lines, fewer than the {lines} that the checkpoint records")
        self.metrics_lines = min(lines, len(counted))
        lines_kept = read_metrics(self.path)
        with intact(path, "remove its damaged lines, or move the file away to resume without charts of the past"):
            self.tensorboard.rewrite(lines_kept)
            for tracker in self._named:
                tracker.rewrite(lines_kept)

    def flush(self) -> None:
        """Wait until metrics and receipt are on disk: a checkpoint that relies on their lines must not outlive them."""
        with explained(f"flush {self._metrics.name} before a checkpoint, which isn't saved"):
            os.fsync(self._metrics.fileno())
            self.receipt.flush()

    def write_recipe(self, record: dict[str, Any]) -> None:
        """Record what runs, in recipe.toml; from then on the folder holds a run."""
        path = self.path / "recipe.toml"
        with explained(f"write {path}", "no checkpoint is touched: make room or repair the disk, then start again"):
            disk.write(path, tomli_w.dumps(record))

    def read_recipe(self) -> dict[str, Any]:
        """Return what `write_recipe` recorded."""
        return read_record(self.path)

    def write_files(self, marks: Mapping[str, str]) -> None:
        """Record the files that the data comes from, in files.json.gz: by name, what tells their content apart."""
        if marks:
            path, staging = self.path / "files.json.gz", self.path / ".files.json.gz.partial"
            with explained(f"write {path}"):
                with gzip.open(staging, "wt", encoding="utf-8", compresslevel=1) as file:
                    json.dump(dict(marks), file)
                disk.replace(path, staging)

    def read_files(self) -> dict[str, str]:
        """Return what `write_files` recorded; empty if the data comes from no files."""
        return read_files(self.path)

    def close(self) -> None:
        """Finish the plots, close the files and release the folder."""
        self.plots.close()
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - likewise
                with contextlib.suppress(RelayError):
                    self._warn_of(tracker, error)
        try:
            self.receipt.close()
        except (OSError, RelayError) as error:  # of the last checkpoint's line
            with contextlib.suppress(RelayError):
                self.say(f"warning: {self.path / RECEIPT} can't be finished ({error}): a resume does it")
        for file in (self._metrics, self._log, self._lock):
            # Each line was flushed when written; a failure was reported then.
            with contextlib.suppress(OSError):
                file.close()


def _append(file: TextIO, line: str) -> None:
    """Append a line to a file of the run folder and flush it.

    Raises:
        RelayError: the disk is full or unavailable.
    """
    with explained(f"write {file.name}"):
        file.write(line)
        file.flush()


def _take(path: Path) -> TextIO:
    """Take the folder's lock, which the operating system releases when the process ends, however it ends.

    Raises:
        RelayError: another process holds it, or the file system has no locks.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        lock(file, wait=False)
    except AlreadyLocked as error:
        holder = _holder(file)
        file.close()
        raise RelayError(
            f"{path.parent} is in use by {holder}: wait for it, stop it, or choose another run folder"
        ) from error
    except LockException as error:
        file.close()
        raise RelayError(f"can't lock {path}: {error}; put the run folder on a file system with locks") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _holder(file: TextIO) -> str:
    """Return who holds a lock, as its file says; Windows doesn't let others read a locked file."""
    with contextlib.suppress(OSError):
        file.seek(0)
        return file.read().strip() or "another process"
    return "another process"


def free_folder(name: str, parent: Path = Path("runs")) -> Path:
    """Return `parent/name`, or `parent/name-N` with the first free N from 2 if that exists."""
    folder, number = parent / name, 2
    while folder.exists():
        folder, number = parent / f"{name}-{number}", number + 1
    return folder
