"""A run's files as they grow: of its metrics only what was appended is read."""

import json
import math
import time
from pathlib import Path

from torchrelay.errors import RelayError
from torchrelay.report.compare.facts import Facts, read_facts
from torchrelay.run.metrics import Line
from torchrelay.run.record import read_record

_RECENT = 60.0  # seconds: a run that has grown in them is running, even where its lock can't be seen


class Followed:
    """A run that may go on.

    Args:
        folder: its own.

    Attributes:
        facts: of the run, as of the last `refresh`.
        status: running, done or stopped; or gone, if its files can't be read.

    Raises:
        UsageError: the folder isn't a run.
        RelayError: a file of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.facts, self.status = read_facts(folder), ""
        self._path = folder / "metrics.jsonl"
        self._lines: list[Line] = []
        self._offset, self._tail = 0, b""  # how many bytes are read, and the last ones of them
        self._grown_at = -math.inf
        self.refresh()

    def refresh(self) -> None:
        """Read what was appended; all of it, if the run was resumed from an earlier checkpoint."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._tail))
                if file.read(len(self._tail)) != self._tail:
                    self._lines, self._offset, self._tail = [], 0, b""
                    file.seek(0)
                    self._reread()
                found = file.read()
        except (OSError, RelayError):
            self.status = "gone"
            return
        whole = found[: found.rfind(b"\n") + 1]
        if whole:
            self._offset += len(whole)
            self._tail = whole[-256:]
            self._lines += [line for text in whole.splitlines() if (line := _parsed(text)) is not None]
            if self.status:  # what was there at first may be old
                self._grown_at = time.monotonic()
        old = self.facts
        self.facts = Facts(old.folder, old.name, old.settings, old.versions, self._lines)
        self.status = self.facts.status
        if self.status == "stopped" and time.monotonic() - self._grown_at < _RECENT:
            self.status = "running"  # on another machine, whose locks this one doesn't see

    def _reread(self) -> None:
        """Read the recipe again, which may ask for more epochs."""
        record = read_record(self.facts.folder)
        versions = record.pop("environment", {})
        settings = {f"{section}.{key}": each for section, values in record.items() for key, each in values.items()}
        self.facts = Facts(self.facts.folder, self.facts.name, settings, versions, self._lines)


def _parsed(text: bytes) -> Line | None:
    """Return a line of metrics; None for a damaged one."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and {"split", "step", "epoch"} <= line.keys() else None
