"""Kill a run, or let a call fail, at each of its file-system calls; then resume it and compare its files.

    python -m benchmarks.exactness.crash [--every N] [--errors | --power] [--out docs/evidence/crash.md]

A small run of the digits saves every ten steps. A library that is loaded before the C library counts its calls that
touch the run folder: open, write, flush, rename, delete. At each of them, in a run of its own, the process is killed
(SIGKILL), or with `--errors` the call fails with EIO. With `--power` the machine loses power there: what wasn't flushed
is cut off or zeroed, and names whose folder wasn't flushed are lost (`power.py`). Then the run is resumed (or started,
where it hadn't begun), and its checkpoints, metrics and charts are compared byte for byte with those of an undisturbed
run.

An error must end the run with one line that names a file, or be survived with a warning; its text is kept. Linux only;
it needs a C compiler.
"""

import argparse
import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.exactness.kill import differences
from benchmarks.exactness.power import LOSSES, lose, read_log
from benchmarks.measure import machine
from benchmarks.page import markdown

LIBRARY = Path(__file__).with_name("preload.c")
SETS = ("run.epochs=2", 'checkpoint.every="10 steps"', "model.options.widths=[4,8]", "data.batch_size=128")

WHAT = {"kill": "the process is killed", "errors": "a call fails with EIO", "power": "the power fails, in three ways"}

# Nothing is lost where these fail: a note in the lock, a folder that exists, a manifest that the next save reads again.
HARMLESS = re.compile(
    r"(ftruncate64|write) /lock|mkdir /(checkpoints|tensorboard)|open64 /checkpoints/step-\d+/manifest.json"
)


@dataclass
class Point:
    """What happened at a call.

    Attributes:
        call: the function and the file, such as "fsync /metrics.jsonl".
        ended: the exit code, minus the signal's number where a signal ended it.
        said: what it wrote to standard error.
        differs: the files that differ from an undisturbed run's in the end.
    """

    call: str
    ended: int
    said: str
    differs: list[str]


def build(folder: Path) -> Path:
    """Compile the library."""
    library = folder / "preload.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, LIBRARY, "-ldl"], check=True)
    return library


def command(arguments: Sequence[str], folder: Path, faults: Mapping[str, str]) -> tuple[int, str]:
    """Run a command of torchrelay in a fork of this process; return how it ended and its standard error."""
    errors = folder / "stderr.txt"
    if (child := os.fork()) == 0:
        code = 1
        try:
            code = _child(arguments, errors, faults)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text()


def _child(arguments: Sequence[str], errors: Path, faults: Mapping[str, str]) -> int:
    from torchrelay import cli

    for number, path in ((1, os.devnull), (2, str(errors))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.environ.update({"FAULT_PARENT": str(os.getppid()), **faults})
    try:
        return cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


def train(run: Path, folder: Path, faults: Mapping[str, str]) -> tuple[int, str]:
    """Train a new run, or resume it where it has begun."""
    if (run / "recipe.toml").exists():
        return command(["resume", str(run), "--quiet"], folder, faults)
    sets = [argument for setting in SETS for argument in ("--set", setting)]
    return command(["train", "digits", "--run", str(run), "--quiet", *sets], folder, faults)


def points(folder: Path, every: int, kind: str) -> Iterator[Point]:
    """Kill, fail or lose power at each call, or at each `every`-th, and yield what happened."""
    undisturbed, log = folder / "undisturbed", folder / "calls.txt"
    run = folder / "run"
    code, said = train(run, folder, {"FAULT_FOLDER": str(run), "FAULT_LOG": str(log)})
    if code:
        raise SystemExit(f"the undisturbed run failed: {said}")
    run.rename(undisturbed)
    calls = len(read_log(log))
    print(f"{calls} calls", flush=True)
    for number in range(1, calls + 1, every):
        for loss in LOSSES if kind == "power" else ("",):
            point = _at(number, kind, loss, folder)
            print(f"{number:>4} {point.call}: {point.ended} {point.said.strip()} {' '.join(point.differs)}", flush=True)
            yield point


def _at(number: int, kind: str, loss: str, folder: Path) -> Point:
    """Run into a fault at a call, resume, and return what happened."""
    run, log, backup = folder / "run", folder / "calls.txt", folder / "backup"
    for path in (run, backup):
        shutil.rmtree(path, ignore_errors=True)
    backup.mkdir()
    log.unlink()
    faults = {"FAULT_FOLDER": str(run), "FAULT_AT": str(number), "FAULT_LOG": str(log), "FAULT_BACKUP": str(backup)}
    if kind == "errors":
        faults["FAULT_ERROR"] = str(errno.EIO)
    ended, said = train(run, folder, faults)
    warnings = "\n".join(warned(run))
    calls = read_log(log)
    if loss:
        lose(run, calls[: number - 1], backup, loss)
    again, complaint = train(run, folder, {})
    undisturbed = folder / "undisturbed"
    differs = differences(undisturbed, run) if not again else [f"the resume failed: {complaint.strip()}"]
    # Two threads write, so this run's calls aren't quite in the order of the undisturbed one's.
    call = re.sub(r"\.tmp\w+|tfevents[\w.-]+(?=\.)", "…", f"{calls[number - 1].name} {calls[number - 1].path}")
    return Point(f"{call}{f' ({loss})' if loss else ''}", ended, said + warnings, differs)


def warned(run: Path) -> list[str]:
    """Return the warnings in a run's log, which `--quiet` doesn't print."""
    lines = (run / "log.txt").read_text().splitlines() if (run / "log.txt").exists() else []
    return [line[20:] for line in lines if "can't be" in line]


def is_explained(point: Point) -> bool:
    """Return whether an error ended in one line that names a file, or was survived."""
    lines = point.said.strip().splitlines()
    if point.ended == 0:
        return "Traceback" not in point.said and (bool(lines) or HARMLESS.fullmatch(point.call) is not None)
    return point.ended == 1 and len(lines) == 1 and "--debug shows where" not in lines[0] and "/run" in lines[0]


def page(found: Sequence[Point], kind: str, made_by: str) -> str:
    """Return the page of results."""
    errors = kind == "errors"
    wrong = [point for point in found if point.differs or (errors and not is_explained(point))]
    ends = Counter(point.ended for point in found)
    what = WHAT[kind]
    rows = [(f"calls at which {what}", f"{len(found)}")]
    rows += [(f"ended with {code}", f"{count}") for code, count in sorted(ends.items())]
    rows += [("resumed to other files than an undisturbed run's, or ended without an explanation", f"{len(wrong)}")]
    text = f"# A run at each of its file-system calls\n\n{machine()}; made by `{made_by}`.\n\n"
    text += markdown(("", ""), rows) + "\n"
    if errors:
        said = {re.sub(r"\S*/run\b", "RUN", point.said.strip()): point.call for point in found if point.said.strip()}
        text += "\nWhat it says:\n\n" + markdown(
            ("a call that fails", "the message"), [(b, a) for a, b in said.items()]
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each N-th call only")
    group = parser.add_mutually_exclusive_group()
    for kind, text in (("errors", "let the call fail"), ("power", "lose what wasn't flushed as well")):
        group.add_argument(f"--{kind}", action="store_const", const=kind, dest="kind", help=text)
    parser.set_defaults(kind="kill")
    parser.add_argument("--out", type=Path, help="where to write the page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-") as temporary:
        folder = Path(temporary)
        if "LD_PRELOAD" not in os.environ:
            os.environ["LD_PRELOAD"] = str(build(folder))
            with contextlib.suppress(KeyboardInterrupt):
                sys.exit(subprocess.call([sys.executable, "-m", "benchmarks.exactness.crash", *sys.argv[1:]]))
        from torchrelay.run.plots import PlotProcess

        # Plots are drawn by another process, which would take most of the time.
        PlotProcess.start = lambda *_, **__: None  # type: ignore[method-assign]
        found = list(points(folder, options.every, options.kind))
        flags = f" --{options.kind}" * (options.kind != "kill") + f" --every {options.every}" * (options.every > 1)
        text = page(found, options.kind, f"python -m benchmarks.exactness.crash{flags}")
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    if any(point.differs or (options.kind == "errors" and not is_explained(point)) for point in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
