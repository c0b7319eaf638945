"""Run the short benchmarks one after another, and write one page.

    python -m benchmarks [--only NAME…] [--quick] [--out docs/evidence/benchmarks.md]

Each runs in its own process. Long benchmarks have their own commands, which the page lists.
"""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import fresh_process
from benchmarks.page import GOAL, QUICK, Table, circumstances, markdown, sections
from tools import pictures

# In the folder `speed`.
SHORT = (
    "overhead",
    "first_step",
    "memory",
    "augment_speed",
    "startup",
    "fixed_cost",
    "order",
    "exactness",
    "gpu",
    "records",
    "photos",
    "folder_cache",
    "auto",
)
OVERHEAD, ACCURACY = "../pictures/overhead.png", "../pictures/accuracy-over-time.png"

NOTE_ON_TIME = """\
Made by `python -m tools.pictures --root FOLDER`. For this picture the fast recipe was evaluated after each epoch; its
times exclude the evaluations before the last, which the recipe doesn't run otherwise. The reference's accuracies are
those that the tutorial prints after 1, 10, 20 and 30 epochs; its times are computed from its rate on this machine."""


@dataclass(frozen=True)
class Long:
    """A benchmark that this program doesn't run."""

    what: str
    command: str
    table: str  # its page, relative to the folder of this page


LONG = (
    Long(
        "a run killed 200 times, compared byte for byte",
        "python -m benchmarks.exactness.kill --root FOLDER --epochs 20",
        "kill.md",
    ),
    Long("a run that changes its number of processes", "python -m benchmarks.exactness.elastic", "elastic.md"),
    Long(
        "several processes, compared with DistributedDataParallel",
        "python -m benchmarks.scale.parallel",
        "parallel.md",
    ),
    Long("what grows with the number of devices", "python -m benchmarks.scale", "scale-tables.md"),
    Long(
        "losses and weights, compared with a plain loop",
        "python -m benchmarks.exactness.agreement --data FOLDER",
        "agreement.md",
    ),
    Long(
        "the time to the reference's accuracy",
        "python -m benchmarks.speed.accuracy --root FOLDER",
        "accuracy.md",
    ),
    Long(
        "Fashion-MNIST, and its best baseline",
        "python -m benchmarks.speed.fashion --root FOLDER",
        "fashion-mnist.md",
    ),
    Long(
        "the time to nanoGPT's loss on a CPU",
        "python -m benchmarks.speed.nanogpt --script FOLDER --text FILE",
        "nanogpt.md",
    ),
    Long("accuracy and times of the recipes", "torchrelay train RECIPE", "results.md"),
)


def run(name: str, quick: bool) -> list[Table]:
    """Run a benchmark in a new process."""
    tables = importlib.import_module(f"benchmarks.speed.{name}").tables
    with fresh_process() as pool:
        found: list[Table] = pool.submit(tables, quick).result()
    return found


def title(name: str) -> str:
    found: str = importlib.import_module(f"benchmarks.speed.{name}").TITLE
    return found


def goals(found: Mapping[str, Sequence[Table]]) -> str:
    """Return one table of all bars, aims and measured values."""
    rows = [
        (f"{table.title}: {what}", *figures)
        for tables in found.values()
        for table in tables
        for what, *figures in (goal.row() for goal in table.goals)
    ]
    return markdown(GOAL, rows) if rows else ""


def text(found: Mapping[str, Sequence[Table]], before: str, quick: bool = False, folder: Path | None = None) -> str:
    """Return the page.

    Args:
        found: each benchmark's tables.
        before: the machine and its load before they ran.
        quick: whether the figures come from few rounds.
        folder: where the page will be written; pictures found there are shown.
    """
    how = "Made by `python -m benchmarks`, in one run. Parentheses hold the minimum and maximum of the rounds."
    parts = ["# Benchmarks", f"{before}\n{how}", *([QUICK] if quick else [])]
    if summary := goals(found):
        parts += ["## Bars and aims", "A bar must be met; an aim is a target beyond it.", summary]
    for name, tables in found.items():
        parts.append(f"## {title(name)}")
        if name == "overhead" and folder is not None and (folder / OVERHEAD).exists():
            parts.append(f"![The overhead of each framework in a training step]({OVERHEAD})")
        parts.append(sections(tables, 3))
    if folder is not None and (folder / ACCURACY).exists():
        parts += ["## Accuracy over time", f"![Test accuracy of two recipes over time]({ACCURACY})", NOTE_ON_TIME]
    rows = [(long.what, f"`{long.command}`", f"[{Path(long.table).stem}]({long.table})") for long in LONG]
    parts += [
        "## Long benchmarks",
        "Each has its own command and page.",
        markdown(("", "command", "table"), rows),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHORT, metavar="NAME", help=f"some of: {', '.join(SHORT)}")
    parser.add_argument("--quick", action="store_true", help="few rounds: only to check that it runs")
    parser.add_argument("--out", type=Path, help="where to write the page; its picture goes to `../pictures`")
    options = parser.parse_args()
    before = circumstances()
    found: dict[str, list[Table]] = {}
    for name in options.only or SHORT:
        print(f"{name} …", flush=True)
        found[name] = run(name, options.quick)
    folder = options.out.parent if options.out is not None else None
    if folder is not None and "overhead" in found:
        pictures.draw_overhead(found["overhead"][0], folder / OVERHEAD)
    page = text(found, before, options.quick, folder)
    print(page)
    if options.out is not None:
        options.out.write_text(page)


if __name__ == "__main__":
    main()
