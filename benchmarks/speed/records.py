"""The time to an accuracy on one GPU, compared with the scripts of public records and the reference's whole training.

    python -m benchmarks.speed.records --root FOLDER [--airbench FILE] [--speedrun FILE] [--reference] [--out FILE]

FOLDER has train/CLASS/*.jpeg and test/CLASS/*.jpeg, or it is torchvision's folder of CIFAR-10, with `--data cifar10`.
Fetch the scripts yourself: airbench94_muon.py from github.com/KellerJordan/cifar10-airbench, and cifar10_speedrun.py
from github.com/hiverge/cifar10-speedrun. Each runs unchanged on the same images, which it reads from
`cifar10/train.pt` and `cifar10/test.pt` in its working directory.
"""

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from threading import Timer

import torch

from benchmarks import page
from benchmarks.page import NOT_MEASURED, Goal, Spread, Table
from torchrelay import data
from torchrelay.data.settings import DataSettings
from torchrelay.data.sources import ArraySource
from torchrelay.recipe import recipe
from torchrelay.recipe.build import build_trainer
from torchrelay.run.terminal import Terminal

TITLE = "The time to an accuracy, on a GPU"
SCRIPTS = ("airbench94_muon.py", "cifar10_speedrun.py")
ACCURACY = 0.94  # the target of the records, on CIFAR-10's own files
REFERENCE = 0.8844  # of the tutorial after 30 epochs
Cases = dict[str, tuple[str, ...]]  # row names of our recipes, and their overrides
OURS: Cases = {
    "cifar10-94": (),
    "cifar10-94, `run.exact=false`, `device.benchmark=true`": ("run.exact=false", "device.benchmark=true"),
}
FAST: Cases = {
    "cifar10-fast": (),
    **{f"cifar10-94, {n} epochs": (f"run.epochs={n}", f"run.evaluate_every={n}") for n in (2, 3, 4)},
}
RULES = """\
Seconds as the public scripts measure them: training and the last evaluation, from when the data is on the device;
without loading, decoding, and a first warm-up training. The scripts print theirs, measured by CUDA events. Ours cover
`fit()` between two device synchronizations, including its initialization and the capture of its CUDA graph. The
accuracies are those of the last evaluation, in which all use test-time augmentation with mirrored and shifted
images."""
INFINITE = " A time is infinite if the mean accuracy doesn't reach 94%,\nor on JPEG files the script's own accuracy."
HEADS = ("", "seconds", "test accuracy")
Row = Sequence[str | Spread]


@dataclass(frozen=True)
class Run:
    """The accuracy and the seconds of a training."""

    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Images:
    """The data as a recipe names it, and the folder of the cache."""

    root: Path
    name: str
    cache: Path

    @property
    def overrides(self) -> tuple[str, ...]:
        return f"data.name={self.name}", f"data.root={self.root}", f"data.cache_dir={self.cache}"


# ------------------------------------------------------------------------------------------------ the scripts

# The last line of a run: | run | eval | … | … | accuracy | seconds |
_EVAL = re.compile(r"\|[^|\n]*\|\s*eval\s*\|[^|\n]*\|[^|\n]*\|\s*([\d.]+)\s*\|\s*([\d.]+)\s*\|")


def parse(text: str) -> list[Run]:
    """Return the runs that a script has printed, without the warm-up."""
    return [Run(float(accuracy), float(seconds)) for accuracy, seconds in _EVAL.findall(text)][1:]


def write_tensors(images: Images, folder: Path) -> None:
    """Write the images to the files that the scripts read."""
    names = {"name": images.name, "root": str(images.root), "cache_dir": str(images.cache)}
    parts = data.load(DataSettings.model_validate(names), 0, log=lambda _: None)
    (folder / "cifar10").mkdir()
    for name, part in (("train", parts.train), ("test", parts.test)):
        assert isinstance(part, ArraySource)  # noqa: S101 - both kinds of data are arrays
        content = {"images": part.inputs.permute(0, 2, 3, 1).contiguous(), "labels": part.targets}
        torch.save({**content, "classes": list(part.classes)}, folder / "cifar10" / f"{name}.pt")


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process that we started, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def beside(script: Path, folder: Path, runs: int, patience: float) -> list[Run]:
    """Run a script in a folder until it has finished `runs` runs; by itself it would do two hundred.

    Raises:
        RuntimeError: it ended, or was killed after `patience` seconds, before its first run; the text is its last line.
    """
    command, said = [sys.executable, "-u", str(script.resolve())], ""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=folder, start_new_session=True, **how) as process:  # type: ignore[call-overload]
        alarm = Timer(patience, end, [process])
        alarm.start()
        try:
            for line in process.stdout:
                said += line
                if len(parse(said)) >= runs:
                    break
        finally:
            alarm.cancel()
            end(process)
    if not (found := parse(said)):
        raise RuntimeError(next((line for line in reversed(said.splitlines()) if line.strip("- ")), "it said nothing"))
    return found


# ------------------------------------------------------------------------------------------------ ours


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(name: str, overrides: Sequence[str], seed: int = 0) -> Run:
    """Train a recipe; the trainer is built before the clock starts."""
    chosen = recipe.load(name, [*overrides, f"run.seed={seed}"])
    trainer = build_trainer(chosen, terminal=Terminal(quiet=True))
    settle()
    began = time.perf_counter()
    found = trainer.fit()
    settle()
    return Run(found["accuracy"], time.perf_counter() - began)


def ours(case: str, changes: Sequence[str], runs: int) -> list[Run]:
    """Train with several seeds after a warm-up; the recipe's name is the start of the case's name."""
    name = case.partition(",")[0]
    timed(name, changes, runs)
    return [timed(name, changes, seed) for seed in range(runs)]


# ------------------------------------------------------------------------------------------------ tables

Found = list[Run] | str  # the runs, or the error


def attempt(train: Callable[[], list[Run]]) -> Found:
    """Return the runs, or their error, so that a failure doesn't lose the other rows."""
    try:
        return train()
    except Exception as error:  # noqa: BLE001 - the table reports any error
        return f"{type(error).__name__}: {error}"


def row(name: str, runs: Found) -> Row:
    if isinstance(runs, str):
        return name, "failed", " ".join(runs.replace("|", "/").split())[:150]
    each = [100 * run.accuracy for run in runs]
    return name, Spread(seconds(runs), 3), f"{mean(each):.2f}% ({min(each):.2f} to {max(each):.2f}, {len(each)})"


def seconds(runs: Sequence[Run]) -> tuple[float, ...]:
    return tuple(run.seconds for run in runs)


def time_to(accuracy: float, runs: Found) -> float:
    """Return the runs' median seconds, or infinity if their mean accuracy is below `accuracy`."""
    reached = not isinstance(runs, str) and mean(run.accuracy for run in runs) >= accuracy
    return median(seconds(runs)) if reached and not isinstance(runs, str) else math.inf


def beside_on(images: Images, script: Path, runs: int, patience: float) -> list[Run]:
    """Run a script on these images."""
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(images, Path(folder))
        return beside(script, Path(folder), runs, patience)


def records_table(
    images: Images | None,
    scripts: Sequence[Path] = (),
    runs: int = 5,
    patience: float = 400.0,
    changes: Sequence[str] = (),
) -> Table:
    """Return the table of our recipes and the scripts; without images, its figures are not measured.

    Args:
        images: the data for all of them.
        scripts: scripts that the user has fetched.
        runs: number of counted runs of each.
        patience: seconds that a script may take, including compilation and its first run.
        changes: overrides of our recipes, such as another device.
    """
    rows: list[Row] = [(name, NOT_MEASURED, "") for name in (*OURS, *SCRIPTS)]
    ratios: dict[str, float | None] = dict.fromkeys(SCRIPTS)
    if images is not None:
        found = all_of(OURS, images, runs, changes)
        for script in scripts:
            found[script.name] = theirs = attempt(partial(beside_on, images, script, runs, patience))
            if isinstance(theirs, list):
                target = ACCURACY if images.name == "cifar10" else mean(run.accuracy for run in theirs)
                ratios[script.name] = time_to(target, found["cifar10-94"]) / median(seconds(theirs))
        rows = [
            row(name, found[name]) if name in found else (name, NOT_MEASURED, "")
            for name in dict.fromkeys((*found, *ratios))
        ]
    goals = [
        Goal(f"`cifar10-94`: time relative to {name}", ratio, 1.25, 1, "{:.2f} times") for name, ratio in ratios.items()
    ]
    return Table("Compared with public records", HEADS, rows, RULES + INFINITE, goals)


def all_of(cases: Cases, images: Images, runs: int, changes: Sequence[str]) -> dict[str, Found]:
    """Train each of our cases."""
    return {
        name: attempt(partial(ours, name, (*images.overrides, *more, *changes), runs)) for name, more in cases.items()
    }


def reference_table(images: Images | None, runs: int = 5, changes: Sequence[str] = ()) -> Table:
    """Return the table of the reference's whole training and our recipes; without images, it is not measured."""
    reference = "cifar10-reference, whole"
    rows: list[Row] = [(name, NOT_MEASURED, "") for name in (reference, *FAST)]
    ratio = None
    if images is not None:
        found = all_of(FAST, images, runs, changes)
        found[reference] = whole = attempt(partial(reference_on, images, changes))
        rows = [row(name, each) for name, each in found.items()]
        fastest = min(time_to(REFERENCE, found[name]) for name in FAST)
        ratio = None if isinstance(whole, str) else whole[0].seconds / fastest
    what = f"the reference's time, relative to our fastest recipe that reaches {REFERENCE:.2%}"
    note = "By the same rules. The reference is evaluated after each epoch, as in the tutorial; ours once, at the end."
    goal = Goal(what, ratio, 100, 300, "{:.0f} times", more=True)
    return Table("Compared with the reference's whole training", HEADS, rows, note, [goal])


def reference_on(images: Images, changes: Sequence[str]) -> list[Run]:
    """Train the reference's recipe after some warm-up steps."""
    settings = (*images.overrides, *changes)
    timed("cifar10-reference", (*settings, "run.max_steps=20"))
    return [timed("cifar10-reference", settings)]


def tables(quick: bool = False) -> list[Table]:  # noqa: ARG001 - the page has no files to train on
    """Return the tables without figures: measuring needs the user's files."""
    return [records_table(None), reference_table(None)]


# ------------------------------------------------------------------------------------------------ the program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--root", type=Path, help="folder of the photographs")
    parser.add_argument(
        "--data", choices=("image-folder", "cifar10"), default="image-folder", help="kind of data in FOLDER"
    )
    parser.add_argument("--airbench", type=Path, help="a fetched airbench94_muon.py")
    parser.add_argument("--speedrun", type=Path, help="a fetched cifar10_speedrun.py")
    parser.add_argument("--reference", action="store_true", help="also train the whole reference, which takes minutes")
    parser.add_argument("--runs", type=int, default=5, help="number of counted runs of each")
    parser.add_argument("--patience", type=float, default=400, help="maximum seconds of a script")


@contextlib.contextmanager
def images_of(options: argparse.Namespace) -> Iterator[Images]:
    with tempfile.TemporaryDirectory() as cache:
        yield Images(options.root.resolve(), options.data, Path(cache))


def parts(options: argparse.Namespace) -> list[Callable[[], Table]]:
    """Return a function for each requested table."""
    if options.root is None:
        return [partial(records_table, None), partial(reference_table, None)]

    def beside_the_records() -> Table:
        with images_of(options) as images:
            scripts = [path for path in (options.airbench, options.speedrun) if path is not None]
            return records_table(images, scripts, options.runs, options.patience)

    def beside_the_reference() -> Table:
        if not options.reference:
            return reference_table(None)
        with images_of(options) as images:
            return reference_table(images, options.runs)

    return [beside_the_records, beside_the_reference]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the tables")
    add_arguments(parser)
    options = parser.parse_args()
    found = [part() for part in parts(options)]
    text = f"# {TITLE}\n\n{page.circumstances()}\n\n{page.sections(found, 2)}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
