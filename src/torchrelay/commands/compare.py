"""`torchrelay compare RUN RUN…`: whether one recipe is better than another, or whether it may be luck."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchrelay.errors import UsageError, explained, nearest

if TYPE_CHECKING:
    from torchrelay.report.compare.groups import Group
    from torchrelay.run.metrics import Headline

HELP = "compare runs: what differs, their curves on one picture, and whether the difference may be luck"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a folder with the runs of several seeds"
    )
    parser.add_argument("--metric", metavar="NAME", help="the metric to compare (the first run's own)")
    parser.add_argument("--best", action="store_true", help="compare each run's best evaluation instead of its last")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.png"), metavar="FILE", help="the picture of the curves (compare.png)"
    )


def run(options: argparse.Namespace) -> None:
    """Print what differs, a table and a verdict, and draw the curves."""
    from rich.console import Console

    from torchrelay.report.compare import picture, tables
    from torchrelay.report.compare.groups import read_groups, verdict

    groups = read_groups(options.runs)
    if len(groups) == 1 and len(groups[0].runs) == 1:
        raise UsageError(f"{groups[0].name} is one run: give another one to compare it with")
    headline = _headline(groups, options.metric)
    console = Console(highlight=False)
    differing = tables.of_differences(groups) if len(groups) > 1 else None
    if differing is not None:
        console.print(differing, "")
    elif len(groups) > 1:
        console.print("the recipes and the versions of packages and code are equal\n")
    console.print(tables.of_groups(groups, headline, best=options.best), "")
    for other in groups[1:]:
        for text in verdict(groups[0], other, headline, best=options.best):
            console.print(text, soft_wrap=not sys.stdout.isatty(), markup=False)
    with explained(f"write {options.out}"):
        picture.draw(groups, headline, options.out)
    console.print(f"the curves are in {options.out}", markup=False)


def _headline(groups: "Sequence[Group]", name: str | None) -> "Headline":
    """Return the metric to compare."""
    from torchrelay.run.metrics import SPLITS, headline_named

    runs = [run for group in groups for run in group.runs]
    if name is None:
        return next((run.headline for run in runs if run.lines), runs[0].headline)
    known = dict.fromkeys(key for run in runs for line in run.lines if line["split"] in SPLITS for key in line)
    if name not in known:
        raise UsageError(f"--metric {name}: no run measured it{nearest(name, known)}")
    return headline_named(name)
