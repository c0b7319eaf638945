"""Step 4: why processes failed: each writes a report, from which the launcher finds the first failure."""

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

# Errors that only follow from another process's end.
_LOST = re.compile("(closed|reset) by peer|broken pipe|lost another process", re.IGNORECASE)
# How close a report is to the cause: an error of its own, an end without a report, a stop by a signal, or an error that
# followed from another process's end.
_OWN, _SILENT, _STOP, _FOLLOWS = range(4)
_AT_ONCE = 2  # seconds; a process that ended later than this after the first one was ended by torch's agent


class LaunchError(RelayError):
    """Processes that our launcher started have failed; the text is the error of the first one.

    Args:
        text: the error of the process that failed first.
        exit_code: that process's exit code.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class End:
    """How and when a process ended."""

    exit_code: int  # the signal's number, negated, if a signal ended it
    time: float  # seconds since the epoch


@dataclass(frozen=True)
class Report:
    """Why a process failed."""

    rank: int
    distance: int  # from the cause: _OWN, _SILENT, _STOP or _FOLLOWS
    time: float
    text: str
    exit_code: int

    @property
    def follows(self) -> bool:
        """Whether the process only failed because another one had ended."""
        return self.distance == _FOLLOWS


def report(error: BaseException, text: str, exit_code: int) -> bool:
    """Write why this process fails to the file that our launcher, or torchrun for its summary, has named.

    Args:
        error: the exception.
        text: the message for people.
        exit_code: of this process.

    Returns:
        Whether our launcher will print the message, so that this process needn't.
    """
    if (path := os.environ.get(ERROR)) is not None:
        now = time.time()
        details = {"rank": rank(), "exit_code": exit_code, "time": now, "follows": _follows(error)}
        message = {"message": text, "extraInfo": {"timestamp": str(int(now))}}  # torch's own format
        with contextlib.suppress(OSError):
            staging = Path(f"{path}.partial")
            staging.write_text(json.dumps({"message": message, "torchrelay": details}), encoding="utf-8")
            staging.replace(path)
    return started_by_launcher() and rank() == 0


def _follows(error: BaseException | None) -> bool:
    """Return whether an error only follows from another process's end."""
    while error is not None:
        if _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_reports(folder: Path) -> list[Report]:
    """Return the reports of the last attempt's processes."""
    attempts = sorted(folder.rglob("attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    reports = []
    for path in attempts[-1].rglob("error.json") if attempts else ():
        content = json.loads(path.read_text(encoding="utf-8"))
        details, code = content["torchrelay"], content["torchrelay"]["exit_code"]
        distance = _FOLLOWS if details["follows"] else _STOP if code == STOPPED else _OWN
        reports.append(Report(details["rank"], distance, details["time"], content["message"]["message"], code))
    return reports


def first_failure(folder: Path, ends: Mapping[int, End]) -> LaunchError:
    """Return the error of the process that failed first.

    Args:
        folder: where the processes write their reports.
        ends: how they ended, by rank, as far as known.
    """
    reports = read_reports(folder)
    heard = {report.rank for report in reports}
    earliest = min((end.time for end in ends.values()), default=0.0)
    for number, end in ends.items():
        if number not in heard:
            by_agent = end.exit_code == -signal.SIGTERM or end.time > earliest + _AT_ONCE
            reports.append(
                Report(number, _FOLLOWS if by_agent else _SILENT, end.time, _describe(number, end.exit_code), 1)
            )
    first = min(reports, key=lambda report: (report.distance, report.time))
    return LaunchError(first.text, first.exit_code)


def _describe(number: int, code: int) -> str:
    """Return an error for a process that left no report."""
    if code >= 0:
        how = f"exited with code {code} and no error message"
    else:
        memory = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
        how = f"was killed by {signal.Signals(-code).name}{memory}"
    log = f"; its output is in logs/rank-{number}.log" if number else ""
    return f"process {number} {how}{log}; torchrelay resume continues from the last checkpoint"
