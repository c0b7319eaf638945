"""Give each reader of files a hundred thousand damaged inputs, and see what it does with them.

    python -m benchmarks.exactness.fuzz --inputs 100000 [--only NAME] [--seed 0] [--out docs/evidence/fuzz.md]

An input is a valid one with a few changes: of its structure (wrong types, missing keys, huge numbers, deep nesting) or
of its bytes. A reader either takes it or refuses it with a `RelayError` of one line. Anything else is a finding:
another exception, a crash, more than ten seconds, more than 1 GiB of memory, a process, an import or a file that the
input caused. Each finding names its input:

    python -m benchmarks.exactness.fuzz --only NAME --seed 0 --input NUMBER

shows the traceback. Inputs run in processes that are forked from this one, whose memory Linux limits.
"""

import argparse
import ctypes
import gc
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.exactness.mutations import Form, mutated
from torchrelay.cli import one_line
from torchrelay.errors import RelayError

SECONDS, BYTES = 10.0, 2**30  # that an input may take
# What the first rounds found.
FOUND = (
    (
        "a checkpoint's state",
        "two dozen kinds of `KeyError`, `TypeError` and the like; more than 5 s for 31 MB of `[]`",
        "a line",
    ),
    ("tensors of a checkpoint", "`KeyError` for one that the state names and the file lacks", "a line"),
    ("the number of threads in a state", "any number was taken", "a line"),
    (
        "recipes, a run's `recipe.toml`",
        "`RecursionError`, 5,000 digits, text that isn't Unicode, a section that is none",
        "a line",
    ),
    (
        "`--set`",
        "surrogates; control characters reached the terminal; messages of 100,000 characters",
        "escaped, shortened",
    ),
    ("`torchrelay recipe`", "keys that need quotes were written without, so that the result wasn't TOML", "quoted"),
    ("the command line", "`IndexError` for an empty argument after an option that there isn't", "a line"),
    ("`files.json.gz`", "`zlib.error`, `EOFError`; a bomb of a megabyte filled a gigabyte", "a line"),
    ("`metrics.jsonl`", "a line that is no table, or lacks its step or split", "a line"),
    ("a cache's facts", "deep nesting; positions of missing images that are none", "it is made again"),
    ("idx files", "a compressed file expands without a bound, and was held twice", "768 MiB at most, once"),
    ("images", "a PostScript file named `.png` is one for Pillow, which starts Ghostscript to read it", "refused"),
    (
        "images",
        "13,000 x 13,000 transparent pixels of a small file take more than 1 GiB",
        "120 million pixels at most, in tiles",
    ),
    ("AVIF", "`RuntimeError` from a damaged file ended a run with `on_error=skip`", "left out"),
)
_A_CHILD = 5_000  # inputs that a process runs before its memory starts afresh
_M_ARENA_MAX = -8
_PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}
_CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


@dataclass(frozen=True)
class Target:
    """A reader and valid inputs for it.

    Args:
        feed: reads an input in the folder of the target.
        corpus: valid inputs.
        form: how they become trees; None: only their bytes are changed.
        whole: inputs that are fed as they are, such as bombs.
        close: closes the reader's files.
    """

    feed: Callable[[bytes], object]
    corpus: list[bytes]
    form: Form | None = None
    whole: list[bytes] = field(default_factory=list)
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Finding:
    """What an input did that it should not.

    Attributes:
        number: of the input.
        what: such as "KeyError: 'step'".
        where: the last line of ours that ran.
    """

    number: int
    what: str
    where: str


@dataclass
class Outcome:
    """What became of a target's inputs."""

    name: str
    inputs: int
    taken: int = 0
    refused: int = 0
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def kinds(self) -> Iterator[tuple[Finding, int]]:
        """Yield one finding of each kind, and how many there are."""
        counts = Counter((each.what.partition(":")[0], each.where) for each in self.findings)
        first = {(each.what.partition(":")[0], each.where): each for each in reversed(self.findings)}
        for kind, count in counts.most_common():
            yield first[kind], count


# ------------------------------------------------------------------------------------------------ one input


def input_of(name: str, target: Target, seed: int, number: int) -> bytes:
    """Return a target's input by its number: first the valid ones, then what is made of them."""
    given = [*target.corpus, *target.whole]
    if number < len(given):
        return given[number]
    return mutated(random.Random(f"{seed}/{name}/{number}"), target.corpus, target.form)


def try_one(target: Target, data: bytes) -> tuple[str, str]:
    """Return how an input ended: "taken", "refused" or what went wrong; and where that was."""
    try:
        target.feed(data)
    except RelayError as error:
        text = one_line(str(error))
        return ("refused", "") if text.isprintable() and text else (f"an unprintable message: {text!r}", _where(error))
    except MemoryError as error:
        return "memory", _where(error)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it's a finding
        return f"{type(error).__name__}: {str(error)[:200]}", _where(error)
    return "taken", ""


def try_one_unlimited(target: Target, data: bytes) -> tuple[str, str]:
    """Likewise where the limit was met: reserved memory counts only where it is used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended, where = try_one(target, data)
    used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return (f"memory: {used:,} bytes", where) if used > BYTES or ended == "memory" else (ended, where)


def _where(error: BaseException) -> str:
    ours = [
        each for each in traceback.extract_tb(error.__traceback__) if f"{os.sep}torchrelay{os.sep}" in each.filename
    ]
    place = ours[-1] if ours else traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(place.filename).parent.name}/{Path(place.filename).name}, {place.name}"


class Forbidden(BaseException):
    """An input did what no input may; it isn't an `Exception`, so that no reader can take it for a damaged file."""


class _Guard:
    """An audit hook that stops an input from starting processes, importing by name or writing outside its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on = str(folder), False
        sys.addaudithook(self.check)

    def check(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _PROCESSES or event == "pickle.find_class" or (event == "exec" and _is_text(arguments[0])):
            raise Forbidden(f"an input ran code: {event} {str(arguments)[:100]}")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in _CHANGES or writes) and not self._is_ours(arguments[0]):
            raise Forbidden(f"an input wrote a file: {event} {str(arguments)[:100]}")

    def _is_ours(self, path: Any) -> bool:
        place = "" if isinstance(path, int) else os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - it is called often
        return not place or place.startswith((self.folder, os.devnull))


def _is_text(code: Any) -> bool:
    """Return whether code was compiled from a text; libraries that are imported late write named tuples likewise."""
    writer = sys._getframe(2).f_code.co_name
    return code.co_filename == "<string>" and writer not in ("namedtuple", "_create_fn")


# ------------------------------------------------------------------------------------------------ many inputs


def fuzz(make: Callable[[Path], Target], name: str, inputs: int, seed: int = 0) -> Outcome:
    """Feed inputs to a target in child processes, and return what became of them.

    Args:
        make: returns the target, whose files go into a folder.
        name: of the target.
        inputs: how many.
        seed: of the changes.
    """
    outcome, began = Outcome(name, inputs), time.perf_counter()
    memory = Path("/dev/shm")  # noqa: S108 - no disk is to be waited for
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        target, shared = make(Path(temporary) / "files"), mmap.mmap(-1, 24)
        done, results = 0, Path(temporary) / "findings.jsonl"
        while done < inputs:
            end = min(inputs, done + _A_CHILD)
            shared[:] = struct.pack("qqq", done, 0, 0)
            results.unlink(missing_ok=True)
            if (child := os.fork()) == 0:
                _child(target, outcome, seed, (done, end), shared, results)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            done, taken, refused = struct.unpack("qqq", shared[:])
            outcome.taken, outcome.refused = outcome.taken + taken, outcome.refused + refused
            if results.exists():
                outcome.findings += [Finding(**json.loads(line)) for line in results.read_text().splitlines()]
            if status:
                what = (
                    f"more than {SECONDS:g} s"
                    if -status in (signal.SIGALRM, signal.SIGPROF)
                    else f"the process ended with {status}"
                )
                outcome.findings.append(Finding(done, what, "a child process"))
                done += 1
        target.close()
    outcome.seconds = time.perf_counter() - began
    return outcome


def _child(
    target: Target, outcome: Outcome, seed: int, numbers: tuple[int, int], shared: mmap.mmap, results: Path
) -> None:
    """Run some inputs and end this process."""
    code = 1
    try:
        gc.freeze()  # what is imported isn't searched, and so copied, for each deep nesting
        guard = _confined(results.parent)
        found = results.open("a", buffering=1)
        for data in target.corpus:  # which import what is imported late
            try_one(target, data)
        taken = refused = 0
        for number in range(*numbers):
            shared[:] = struct.pack("qqq", number, taken, refused)
            data = input_of(outcome.name, target, seed, number)
            _alarm(SECONDS)
            guard.on = number >= len(target.corpus)
            ended, where = try_one(target, data)
            if ended == "memory":
                _alarm(SECONDS)
                ended, where = try_one_unlimited(target, data)
            guard.on = False
            _alarm(0)
            taken, refused = taken + (ended == "taken"), refused + (ended == "refused")
            if ended not in ("taken", "refused"):
                found.write(json.dumps(asdict(Finding(number, ended, where))) + "\n")
        shared[:] = struct.pack("qqq", numbers[1], taken, refused)
        code = 0
    finally:
        os._exit(code)


def _alarm(seconds: float) -> None:
    """Let this process end after so much time of a processor, or four times as much by the clock; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 4 * seconds)


def _confined(folder: Path) -> _Guard:
    """Limit this process's memory, silence what decoders print, and guard against code."""
    os.chdir(folder)  # names that are relative to a file descriptor are as harmless
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)  # an arena of each thread would count
    facts = Path("/proc/self/status").read_text()
    present = next(int(line.split()[1]) * 1024 for line in facts.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (present + BYTES, present + 8 * BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    return _Guard(folder)


# ------------------------------------------------------------------------------------------------ the page


def page(outcomes: list[Outcome], seed: int, command: str) -> str:
    """Return the page of results."""
    from benchmarks.measure import machine
    from benchmarks.page import markdown

    head = ("target", "inputs", "taken", "refused with a line", "findings", "inputs a second")
    rows = [
        (
            each.name,
            *(f"{count:,}" for count in (each.inputs, each.taken, each.refused, len(each.findings))),
            f"{each.inputs / each.seconds:,.0f}",
        )
        for each in outcomes
    ]
    found = [
        f"- {outcome.name}: {finding.what} in {finding.where}, {count:,} times; "
        f"`--only {outcome.name} --seed {seed} --input {finding.number}`"
        for outcome in outcomes
        for finding, count in outcome.kinds()
    ]
    before = (
        "# Damaged inputs\n\nEach reader gets valid inputs with a few changes, of their structure or of their bytes.\n"
        "It takes an input or refuses it with an error of one line. A finding is anything else: another\n"
        f"exception, a crash, more than {SECONDS:g} s or {BYTES // 2**20:,} MiB, code that runs, a file that is\n"
        f"written elsewhere. {machine()}; made by\n`{command}`."
    )
    now = "\n".join(found) + "\n" if found else "Now nothing is found.\n"
    past = "What the first rounds found, each with a test:\n\n" + markdown(("reader", "what happened", "now"), FOUND)
    return f"{before}\n\n{markdown(head, rows)}\n\n{now}\n{past}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs of each target (100,000)")
    parser.add_argument("--only", metavar="NAME", help="this target only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the changes (0)")
    parser.add_argument("--input", type=int, metavar="NUMBER", help="run this input of --only and show what happens")
    parser.add_argument("--out", type=Path, help="where to write the page")
    options = parser.parse_args()
    import torch

    from benchmarks.exactness.targets import TARGETS

    torch.set_num_threads(1)
    if options.input is not None:
        with tempfile.TemporaryDirectory() as folder:
            target = TARGETS[options.only](Path(folder) / "files")
            data = input_of(options.only, target, options.seed, options.input)
            print(f"{len(data):,} bytes: {data[:2_000]!r}")
            print("taken:", target.feed(data))
        return
    outcomes = []
    for name in [options.only] if options.only else TARGETS:
        outcomes.append(fuzz(TARGETS[name], name, options.inputs, options.seed))
        print(f"{name}: {outcomes[-1].taken:,} taken, {outcomes[-1].refused:,} refused", flush=True)
        for finding, count in outcomes[-1].kinds():
            print(f"  {count:,} x {finding.what} in {finding.where}: --input {finding.number}", flush=True)
    given = f" --seed {options.seed}" * bool(options.seed) + f" --only {options.only}" * bool(options.only)
    text = page(outcomes, options.seed, f"python -m benchmarks.exactness.fuzz --inputs {options.inputs}{given}")
    if options.out is not None:
        options.out.write_text(text)
    if any(outcome.findings for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
