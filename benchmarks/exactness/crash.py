"""Kill a process, or let a call fail, at each of its file-system calls; then go on and compare the files.

    python -m benchmarks.exactness.crash [--only run] [--fault kill] [--every N] [--out docs/evidence/crash.md]
    python -m benchmarks.exactness.crash --only run --fault error --record FILE --seconds 100    # again and again

A small run of the digits saves every ten steps; other processes decode images into a cache, and export a run
(`subjects.py`). A library that is loaded before the C library counts the calls that touch the folder: open, write,
flush, rename, delete. At each of them, in a process of its own, the process is killed (SIGKILL), or the call fails with
EIO, or the machine loses power: what wasn't flushed is cut off or zeroed, and names whose folder wasn't flushed are
lost (`power.py`). Then the run is resumed, or started where it hadn't begun, and its checkpoints, metrics and charts
are compared byte for byte with those of an undisturbed run; likewise the cache and the export.

An error must end the process with one line that names a file, or be survived with a warning; its text is kept. The
processes are forks of this one, which has imported all they need: the source may change meanwhile. They run in a
folder without a git repository, whose commit a run would record. Linux only; it needs a C compiler.

All of it takes hours. With `--record`, what happened at each call is kept in a file, and another start goes on with the
calls that aren't in it; `--seconds` ends a start early.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.exactness.power import LOSSES, lose, read_log
from benchmarks.measure import machine
from benchmarks.page import markdown

if TYPE_CHECKING:
    from benchmarks.exactness.subjects import Subject

LIBRARY = Path(__file__).with_name("preload.c")
FAULTS = {"kill": "the process is killed", "error": "the call fails with EIO", "power": "the power fails, in 3 ways"}


@dataclass
class Point:
    """What happened at a call.

    Attributes:
        call: the function and the file, such as "fsync /metrics.jsonl".
        ended: the exit code, minus the signal's number where a signal ended it.
        said: what it wrote to standard error.
        differs: the files that differ from an undisturbed run's in the end.
        is_explained: whether an error ended in one line that names a file, or was survived.
    """

    call: str
    ended: int
    said: str
    differs: list[str]
    is_explained: bool = True

    @property
    def is_wrong(self) -> bool:
        return bool(self.differs) or not self.is_explained


class Record:
    """What happened at the calls so far, in a file with a line for each, by subject, fault and number of the call.

    Args:
        file: which may hold those of earlier starts; None: nothing is kept.
        seconds: from the first call on, after which no other one is struck at.
    """

    def __init__(self, file: Path | None, seconds: float | None = None) -> None:
        self.points: dict[tuple[str, str, int], list[Point]] = {}
        self._file, self._seconds, self._began = file, seconds, 0.0
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                (name, fault, number), points = json.loads(line)
                self.points[name, fault, number] = [Point(**each) for each in points]

    def is_over(self) -> bool:
        self._began = self._began or time.monotonic()
        return self._seconds is not None and time.monotonic() > self._began + self._seconds

    def keep(self, key: tuple[str, str, int], points: list[Point]) -> None:
        self.points[key] = points
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                print(json.dumps([key, [asdict(point) for point in points]]), file=file)


def build(folder: Path) -> Path:
    """Compile the library."""
    library = folder / "preload.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, LIBRARY, "-ldl"], check=True)
    return library


def in_child(act: Callable[[Path], int], target: Path, faults: Mapping[str, str]) -> tuple[int, str]:
    """Do something in a fork of this process; return how it ended and its standard error."""
    errors = target.parent / "stderr.txt"
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.chdir(target.parent)
            for number, path in ((1, os.devnull), (2, str(errors))):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            os.environ.update({"FAULT_PARENT": str(os.getppid()), **faults})
            code = act(target)
        except SystemExit as end:
            code = int(end.code or 0)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the process
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text()


class Attack:
    """Faults of one kind at each call of a subject.

    Args:
        subject: what is attacked.
        fault: one of `FAULTS`.
        target: the folder that the subject makes, in an empty one.
        record: keeps what happened, for the next start.
    """

    def __init__(self, subject: "Subject", fault: str, target: Path, record: "Record | None" = None) -> None:
        self.subject, self.fault, self.target = subject, fault, target
        self.record = record or Record(None)
        self.log, self.backup = target.parent / "calls.txt", target.parent / "backup"
        self.undisturbed = target.parent / "undisturbed"

    def points(self, every: int) -> Iterator[Point]:
        """Strike at each call, or at each `every`-th, and yield what happened."""
        code, said = in_child(self.subject.act, self.target, self._faults())
        if code:
            raise SystemExit(f"what isn't disturbed failed: {said}")
        self.target.rename(self.undisturbed)
        calls = len(read_log(self.log))
        print(f"{self.target.name}, {self.fault}: {calls} calls", flush=True)
        for number in range(1, calls + 1, every):
            key = self.target.name, self.fault, number
            if (points := self.record.points.get(key)) is None:
                if self.record.is_over():
                    return
                self.record.keep(key, points := list(self._at(number)))
                for point in points:
                    print(f"{number:>4} {point.call}: {point.ended} {point.said.strip()} {point.differs}", flush=True)
            yield from points

    def _faults(self) -> dict[str, str]:
        return {"FAULT_FOLDER": str(self.target), "FAULT_LOG": str(self.log), "FAULT_BACKUP": str(self.backup)}

    def _at(self, number: int) -> Iterator[Point]:
        """Run into a fault at a call, go on, and yield what happened: for a loss of power, after each kind."""
        left = self.target.parent / "left"
        for path in (self.target, self.backup, left):
            shutil.rmtree(path, ignore_errors=True)
        self.backup.mkdir()
        self.log.write_text("")
        faults = self._faults() | {"FAULT_AT": str(number)}
        if self.fault == "error":
            faults["FAULT_ERROR"] = str(errno.EIO)
        ended, said = in_child(self.subject.act, self.target, faults)
        said += "\n".join(warned(self.target))
        calls = read_log(self.log)
        # Two threads write, so this run's calls aren't quite in the order of the undisturbed one's.
        call = f"{calls[number - 1].name} {calls[number - 1].path}" if number <= len(calls) else "none"
        if self.fault != "power":
            point = Point(_plain(call), ended, said, self._go_on())
            point.is_explained = self.fault == "kill" or self._is_explained(point)
            yield point
            return
        if self.target.exists():
            self.target.rename(left)
        for loss in LOSSES:
            shutil.rmtree(self.target, ignore_errors=True)
            if left.exists():
                shutil.copytree(left, self.target)
                lose(self.target, calls[: number - 1], self.backup, loss)
            yield Point(f"{_plain(call)} ({loss})", ended, said, self._go_on())

    def _go_on(self) -> list[str]:
        """Go on after a fault, and return what differs in the end."""
        ended, said = in_child(self.subject.act, self.target, {})
        return (
            [f"going on failed: {said.strip()}"] if ended else self.subject.differences(self.undisturbed, self.target)
        )

    def _is_explained(self, point: Point) -> bool:
        lines = point.said.strip().splitlines()
        if point.ended == 0:
            harmless = point.call == "none" or re.match(self.subject.harmless, point.call) is not None
            return "Traceback" not in point.said and (bool(lines) or harmless)
        names_it = len(lines) == 1 and f"/{self.target.name}" in lines[0]
        return point.ended == 1 and names_it and "--debug shows" not in lines[0]


def warned(run: Path) -> list[str]:
    """Return the warnings in a run's log, which `--quiet` doesn't print."""
    lines = (run / "log.txt").read_text().splitlines() if (run / "log.txt").exists() else []
    return [line[20:] for line in lines if "can't be" in line]


def _plain(text: str, name: str = "run") -> str:
    """Return a text without what is another in each run: its folder, random names and numbers of bytes."""
    text = re.sub(r"\b[0-9a-f]{32}\b|\.tmp\w+|tfevents[\w.-]+(?=\.)", "…", text)
    return re.sub(r"\b\d[\d,]{3,}(?= bytes| are free)", "…", re.sub(rf"\S*/{name}\b", name.upper(), text))


def page(found: Mapping[tuple[str, str], Sequence[Point]], made_by: str) -> str:
    """Return the page of results, by subject and fault."""
    head = (
        "",
        "at each of its calls",
        "points",
        "survived",
        "ended with a line",
        "killed",
        "other files, or no reason",
    )
    rows = []
    for (name, fault), points in found.items():
        killed = sum(point.ended < 0 for point in points)
        survived = sum(point.ended == 0 for point in points)
        wrong = sum(point.is_wrong for point in points)
        counts = (len(points), survived, len(points) - survived - killed, killed, wrong)
        rows.append((name, FAULTS[fault], *(f"{count:,}" for count in counts)))
    text = (
        "# A fault at each file-system call\n\nA run is resumed afterwards, a cache made again; its files are compared "
        f"with an undisturbed one's, byte for byte.\nWhere a call fails, the process ends with one line that names the "
        f"file, or goes on with a warning.\n{machine()}; made by\n`{made_by}`.\n\n{markdown(head, rows)}\n"
    )
    wrong_ones = [
        f"- {name}, {fault}: {each.call}" for (name, fault), p in found.items() for each in p if each.is_wrong
    ]
    text += "\n".join(["\nWrong:\n", *wrong_ones, ""]) if wrong_ones else ""
    said = {
        _plain(point.said.strip().replace("\n", " "), name): point.call
        for (name, fault), points in found.items()
        for point in points
        if fault == "error" and point.said.strip()
    }
    if said:
        lines = [(call, message) for message, call in said.items()]
        text += "\nWhat is said:\n\n" + markdown(("such as at", "the message"), lines) + "\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each N-th call only")
    parser.add_argument("--only", metavar="SUBJECT", help="run, cache or export; unset: all")
    parser.add_argument("--fault", choices=FAULTS, help="this one only")
    parser.add_argument("--record", type=Path, metavar="FILE", help="keep what happened there, and go on from it")
    parser.add_argument("--seconds", type=float, help="after this time, strike at no other call")
    parser.add_argument("--out", type=Path, help="where to write the page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-") as temporary:
        if "LD_PRELOAD" not in os.environ:
            os.environ |= {"LD_PRELOAD": str(build(Path(temporary))), "OMP_NUM_THREADS": "1"}
            with contextlib.suppress(KeyboardInterrupt):
                sys.exit(subprocess.call([sys.executable, "-m", "benchmarks.exactness.crash", *sys.argv[1:]]))
        is_right = strike_all(options, Path(temporary))
    sys.stdout.flush()
    os._exit(not is_right)  # what was imported takes seconds to take down


def strike_all(options: argparse.Namespace, folder: Path) -> bool:
    """Attack each subject with each fault; return whether nothing was wrong."""
    from benchmarks.exactness.subjects import SUBJECTS, draw_images
    from torchrelay.run.plots import PlotProcess

    server: Any = import_module("tests.fork_server")
    server.preload()
    # Plots are drawn by another process, which would take most of the time.
    PlotProcess.start = lambda *_, **__: None  # type: ignore[method-assign]
    PlotProcess.prepare = lambda *_, **__: None  # type: ignore[method-assign]
    flags = [
        f" --{name} {value}"
        for name in ("only", "fault", "every")
        if (value := getattr(options, name)) not in (None, 1)
    ]
    found: dict[tuple[str, str], list[Point]] = {}
    record = Record(options.record, options.seconds)
    for name in [options.only] if options.only else SUBJECTS:
        for fault in [options.fault] if options.fault else FAULTS:
            place = folder / f"{name}-{fault}"
            draw_images(place)
            code, said = in_child(SUBJECTS[name].prepare, place / name, {})
            if code:
                raise SystemExit(f"there is nothing to strike at: {said}")
            found[name, fault] = list(Attack(SUBJECTS[name], fault, place / name, record).points(options.every))
            text = page(found, f"python -m benchmarks.exactness.crash{''.join(flags)}")
            if options.out is not None:
                options.out.write_text(text)
    print(text)
    return not any(point.is_wrong for points in found.values() for point in points)


if __name__ == "__main__":
    main()
