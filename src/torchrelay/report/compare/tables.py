"""Runs as tables for a terminal."""

import math
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from torchrelay.report.compare.facts import SEED, Facts, shown, varied
from torchrelay.report.compare.groups import Group, spread
from torchrelay.run.metrics import Headline
from torchrelay.run.terminal import duration, metric

# Where data are on this machine tells no runs apart.
_PLACES = ("data.root", "data.cache")


def of_runs(runs: Sequence[Facts], width: int = 80) -> Table:
    """Return a row for each run, with as many of the recipe keys in which they differ as fit into a width."""
    metrics = dict.fromkeys(f"{run.split} {run.headline.words}" for run in runs)
    several = len(metrics) > 1  # then each row names its own
    heads = ["run", "status", "epoch", "last" if several else next(iter(metrics), "last"), "best", "trained"]
    heads += ["metric"] * several
    rows = [_cells(run)[: len(heads)] for run in runs]
    for key in varied(runs):
        column = [shown(run.settings.get(key)) for run in runs]
        wider = [*heads, key.rpartition(".")[2]]
        cells = [[*row, cell] for row, cell in zip(rows, column, strict=True)]
        if not key.startswith(_PLACES) and _width([wider, *cells]) <= width:
            heads, rows = wider, cells
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(heads):
        table.add_column(
            name,
            justify="left" if name in ("run", "status", "metric") else "right",
            no_wrap=number > 0,
            overflow="fold",
        )
    for run, row in zip(runs, rows, strict=True):
        style = {"running": "green", "stopped": "yellow"}.get(run.status)
        table.add_row(*map(escape, row), style=style)
    return table


def _cells(run: Facts) -> list[str]:
    last, best = (_value(each, run.headline) for each in (run.at_end(run.headline.name), run.at_best(run.headline)))
    metric_name = f"{run.split} {run.headline.words}"
    return [run.name, run.status, str(run.epoch), last, best, duration(run.seconds), metric_name]


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Return how wide a table is: its columns and a gap of two between them."""
    return sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)) - 2


def of_groups(groups: Sequence[Group], headline: Headline, *, best: bool) -> Table:
    """Return a row for each group: its seeds, and its metric with the spread over them."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("seeds", f"{'best' if best else 'last'} {headline.words}", "trained", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for group in groups:
        values = [*group.values(headline, best=best).values()]
        seconds = sum(run.seconds for run in group.runs) / len(group.runs)
        note = f"{group.unfinished} not done" if group.unfinished else ""
        table.add_row(group.name, str(len(group.runs)), spread(values, headline), duration(seconds), note)
    return table


def of_differences(groups: Sequence[Group]) -> Table | None:
    """Return a row for each recipe key, package or code in which groups differ; None if they don't."""
    first = [group.runs[0] for group in groups]
    rows = {key: [shown(run.settings.get(key)) for run in first] for key in varied(first) if key != SEED}
    for name in dict.fromkeys(name for run in first for name in run.versions):
        values = [str(run.versions.get(name, "unset")) for run in first]
        if len(set(values)) > 1 and name != "started_from":
            rows[f"({name})"] = values
    if not rows:
        return None
    table = Table(box=None, pad_edge=False)
    table.add_column("differs in")
    for group in groups:
        table.add_column(group.name, overflow="fold")
    for key, values in rows.items():
        table.add_row(key, *values)
    return table


def as_json(runs: Sequence[Facts]) -> list[dict[str, Any]]:
    """Return runs as JSON can hold them."""
    return [
        {
            "run": str(run.folder),
            "status": run.status,
            "epoch": run.epoch,
            "split": run.split,
            "metric": run.headline.name,
            "last": _plain(run.at_end(run.headline.name)),
            "best": _plain(run.at_best(run.headline)),
            "seconds": round(run.seconds, 3),
            "recipe": dict(run.settings),
        }
        for run in runs
    ]


def _value(value: float, headline: Headline) -> str:
    return metric(value, headline.percent).strip() if math.isfinite(value) else "–"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
