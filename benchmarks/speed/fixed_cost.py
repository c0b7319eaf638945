"""What a run's folder costs beside its steps: opening, TensorBoard, checkpoints, plots, closing.

    python -m benchmarks.speed.fixed_cost [--quick] [--out FILE]

A run of 1,500 tiny steps (64-64-64-10, batches of 32, one thread) with a folder takes turns with the same run without
one, in one process that has imported all that either needs; what is imported is stated apart.
"""

import functools
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

import torchrelay as tr
from benchmarks import page
from benchmarks.measure import side_by_side
from benchmarks.page import Goal, Spread, Table
from benchmarks.speed import peers

TITLE = "The fixed cost of a run"
STEPS, ROUNDS = 1500, 7
QUICK_STEPS, QUICK_ROUNDS = 60, 1
AIM = 0.25  # seconds

NOTE = """\
Seconds, medians of {rounds} rounds of {steps:,} steps with minimum and maximum, on a folder in {root}. The difference
is that of the same round. With test data, a run also evaluates 1,600 samples, and draws confusion.png. "The first run"
is what the first one in a process takes longer than the later ones, as it imports TensorBoard's packages; torch itself
and torchrelay are imported before."""

PARTS_NOTE = """\
Milliseconds of the thread that trains, of one run with test data; a part's own time, without that of the other parts
that it calls. What the checkpoint writer and the drawing process do meanwhile holds nothing up until the run waits."""


def tables(quick: bool = False) -> list[Table]:
    """Return the tables: the cost, and where it goes."""
    steps, rounds = (QUICK_STEPS, QUICK_ROUNDS) if quick else (STEPS, ROUNDS)
    torch.set_num_threads(1)
    pairs = peers.made(steps)
    with tempfile.TemporaryDirectory() as root:
        train = functools.partial(_train, pairs, Path(root))
        train(folder=False, test=True)
        began = time.perf_counter()
        train(folder=True, test=True)
        first = time.perf_counter() - began
        rows: list[Sequence[str | Spread]] = []
        goals = []
        for name, test in (("training data alone", False), ("with test data", True)):
            cases: dict[str, Callable[[], object]] = {
                "without": functools.partial(train, folder=False, test=test),
                "with": functools.partial(train, folder=True, test=test),
            }
            found = side_by_side(cases, rounds)
            added = [b - a for a, b in zip(found["without"], found["with"], strict=True)]
            rows.append((name, *(Spread(tuple(each), 2) for each in (found["without"], found["with"], added))))
            goals.append(Goal(name, median(added), None, AIM, "{:.2f} s"))
            if test:
                rows.append(("the first run with a folder adds", "", "", f"{first - median(found['with']):.2f}"))
        heads = ("", "without a folder", "with a folder", "difference")
        note = NOTE.format(rounds=rounds, steps=steps, root="the temporary folder")
        return [Table("With and without a folder", heads, rows, note, goals), _parts(train)]


def _train(pairs: peers.Pairs, root: Path, *, folder: bool, test: bool) -> None:
    """Train once; the folder is removed outside of what is timed by the next run, if at all."""
    inputs, targets = peers.arrays(pairs)
    held_out: dict[str, Any] = {"test": (inputs[:1600], targets[:1600])} if test else {}
    with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as made:
        peers.trainer(
            pairs,
            task=tr.Classification(classes=peers.CLASSES),
            schedule=tr.optim.Cosine(),
            run=Path(made) / "run" if folder else None,
            **held_out,
        ).fit()


# ------------------------------------------------------------------------------------------------ where it goes


def _timed() -> dict[str, list[tuple[Any, str]]]:
    """Return the functions of each part, on the thread that trains."""
    from torchrelay.run.folder import RunFolder
    from torchrelay.run.plots import PlotProcess
    from torchrelay.run.receipt import Receipt
    from torchrelay.run.trackers import TensorBoard
    from torchrelay.train import logs
    from torchrelay.train.session import Session
    from torchrelay.train.state import TrainingState

    boards = ("write", "rewrite", "images", "figure", "hyperparameters", "close")
    return {
        "opening the folder, its lock and files": [(RunFolder, "__init__")],
        "recipe.toml and files.json.gz": [(RunFolder, "write_recipe"), (RunFolder, "write_files")],
        "identity and facts": [(TrainingState, "facts")],
        "the model's summary": [(logs, "summarize")],
        "metrics.jsonl": [(RunFolder, "record")],
        "receipt.jsonl": [(Receipt, "add"), (Receipt, "begin"), (Receipt, "close")],
        "TensorBoard": [(TensorBoard, name) for name in boards],
        "checkpoints: staging": [(Session, "save")],
        "checkpoints: waiting until they are on disk": [(Session, "wait")],
        "plots: starting their process": [(PlotProcess, "prepare"), (PlotProcess, "start")],
        "plots: waiting until they are drawn": [(PlotProcess, "finish")],
        "closing": [(RunFolder, "close"), (Session, "_close")],
    }


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Time the parts in this context: seconds by name."""
    found: dict[str, float] = defaultdict(float)
    inner: list[float] = []  # of each call that is running, the seconds of parts within it
    thread, originals = threading.get_ident(), []

    def clock(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **more: Any) -> Any:
            if threading.get_ident() != thread:
                return function(*arguments, **more)
            inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                took = time.perf_counter() - began
                found[part] += took - inner.pop()
                if inner:
                    inner[-1] += took

        return timed

    for part, functions in _timed().items():
        for owner, name in functions:
            originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, clock(part, getattr(owner, name)))
    try:
        yield found
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def _parts(train: Callable[..., None]) -> Table:
    with _clocks() as found:
        train(folder=True, test=True)
    rows = [(part, f"{1000 * found[part]:.1f}") for part in _timed()]
    rows.append(("all of these", f"{1000 * sum(found.values()):.1f}"))
    return Table("Where it goes", ("", "ms"), rows, PARTS_NOTE)


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
