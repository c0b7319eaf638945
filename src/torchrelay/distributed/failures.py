"""Step 4: why a process failed: what each writes down, and which of them failed first."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchrelay.distributed.process import ERROR, rank, started_by_launcher
from torchrelay.errors import STOPPED, RelayError

_LOST = re.compile("(closed|reset) by peer|broken pipe|lost another process", re.IGNORECASE)  # what follows from an end
_OWN, _SILENT, _STOP, _FOLLOWS = range(4)  # how near to the cause a report is, the nearest first
_AT_ONCE = 2  # seconds: what ended later than this after the first end was ended by torch's agent


class LaunchError(RelayError):
    """Processes that we started ended early; the text is that of the one that failed first.

    Args:
        text: its error.
        exit_code: its exit code.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class End:
    """How and when a process ended: its exit code, minus the signal's number where one ended it."""

    exit_code: int
    time: float


@dataclass(frozen=True)
class Report:
    """Why a process failed.

    Attributes:
        worth: how near to the cause that is: an error of its own, an end without a word, a stop by a signal, or what
            followed from another process's end.
    """

    rank: int
    worth: int
    time: float
    text: str
    exit_code: int

    @property
    def follows(self) -> bool:
        """Whether it says nothing of the cause."""
        return self.worth == _FOLLOWS


def report(error: BaseException, text: str, exit_code: int) -> bool:
    """Write down why this process fails, where somebody asked for it: our launcher, or torchrun for its summary.

    Args:
        error: what was raised.
        text: what people read.
        exit_code: this process's.

    Returns:
        Whether our launcher will print it, so that this process needn't.
    """
    if (path := os.environ.get(ERROR)) is not None:
        now = time.time()
        own = {"rank": rank(), "exit_code": exit_code, "time": now, "follows": _follows(error)}
        words = {"message": text, "extraInfo": {"timestamp": str(int(now))}}  # as torch writes and reads it
        with contextlib.suppress(OSError):
            staging = Path(f"{path}.partial")
            staging.write_text(json.dumps({"message": words, "torchrelay": own}), encoding="utf-8")
            staging.rename(path)
    return started_by_launcher() and rank() == 0


def _follows(error: BaseException | None) -> bool:
    """Return whether an error only followed from another process's end."""
    while error is not None:
        if _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def reported(folder: Path) -> list[Report]:
    """Return what the processes of the last attempt have reported."""
    attempts = sorted(folder.rglob("attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    found = []
    for path in attempts[-1].rglob("error.json") if attempts else ():
        content = json.loads(path.read_text(encoding="utf-8"))
        own, code = content["torchrelay"], content["torchrelay"]["exit_code"]
        worth = _FOLLOWS if own["follows"] else _STOP if code == STOPPED else _OWN
        found.append(Report(own["rank"], worth, own["time"], content["message"]["message"], code))
    return found


def first_failure(folder: Path, ends: Mapping[int, End]) -> LaunchError:
    """Return the error of the process that failed first.

    Args:
        folder: where the processes report.
        ends: how they ended, by rank, as far as it is known.
    """
    found = reported(folder)
    spoke = {each.rank for each in found}
    earliest = min((end.time for end in ends.values()), default=0.0)
    for number, end in ends.items():
        if number not in spoke:
            followed = end.exit_code == -signal.SIGTERM or end.time > earliest + _AT_ONCE  # the agent's own doing
            found.append(
                Report(number, _FOLLOWS if followed else _SILENT, end.time, _in_words(number, end.exit_code), 1)
            )
    first = min(found, key=lambda each: (each.worth, each.time))
    return LaunchError(first.text, first.exit_code)


def _in_words(number: int, code: int) -> str:
    if code >= 0:
        how = f"ended with exit code {code} and without a word"
    else:
        memory = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        how = f"was ended by {signal.Signals(-code).name}{memory}"
    log = f"; what it wrote is in logs/rank-{number}.log" if number else ""
    return f"process {number} {how}{log}; torchrelay resume goes on from the last checkpoint"
