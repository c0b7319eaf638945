"""`torchrelay runs [FOLDER]`: a table of the runs in a folder."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from operator import eq, ge, gt, le, lt, ne
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrelay.errors import UsageError, nearest

if TYPE_CHECKING:
    from torchrelay.report.compare.facts import Facts

HELP = "list the runs in a folder, with their metrics and what tells them apart"
_CONDITION = re.compile(r"([\w.]+)(<=|>=|!=|=|<|>)(.*)")
_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {"=": eq, "!=": ne, "<": lt, ">": gt, "<=": le, ">=": ge}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "root", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="that holds the runs (runs)"
    )
    parser.add_argument(
        "--sort", default="name", metavar="BY", help="name, status, epoch, last, best, trained or a recipe's key (name)"
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="CONDITION",
        help="of a recipe's key, such as 'optimizer.lr<0.1'; can be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    from rich.console import Console

    from torchrelay.report.compare.facts import read_all
    from torchrelay.report.compare.tables import as_json, of_runs

    found, damaged = read_all(options.root)
    if not found and not damaged:
        raise UsageError(f"{options.root} holds no run: give a folder with runs, or train one: torchrelay train digits")
    chosen = _sorted([each for each in found if _passes(each, options.filter, found)], options.sort, found)
    if options.json:
        print(json.dumps(as_json(chosen), ensure_ascii=False, indent=1))
    elif chosen:
        console = Console(highlight=False)
        console.print(of_runs(chosen, console.width))
    else:
        print(f"none of {len(found)} runs passes the filter")
    for text in damaged:
        print(f"left out: {text}", file=sys.stderr)


def _passes(run: "Facts", conditions: Sequence[str], runs: Sequence["Facts"]) -> bool:
    for condition in conditions:
        match = _CONDITION.fullmatch(condition)
        if match is None:
            raise UsageError(f"--filter {condition}: write a key, one of {' '.join(_RELATIONS)} and a value")
        key, relation, text = match.groups()
        _check_key(key, runs, "--filter")
        try:
            if not _RELATIONS[relation](*_comparable(run.settings.get(key), text)):
                return False
        except TypeError:  # an unset value is neither smaller nor larger
            return False
    return True


def _comparable(setting: Any, text: str) -> tuple[Any, Any]:
    """Return a setting and a text both as numbers where both are, else as texts."""
    from torchrelay.report.compare.facts import shown

    if isinstance(setting, int | float) and not isinstance(setting, bool):
        try:
            return float(setting), float(text)
        except ValueError:
            pass
    return (None if setting is None else shown(setting)), text


def _sorted(runs: Sequence["Facts"], by: str, known: Sequence["Facts"]) -> list["Facts"]:
    """Return runs sorted: the best first where it is by a metric, else the smallest."""
    places: dict[str, Callable[[Facts], Any]] = {
        "name": lambda run: run.name,
        "status": lambda run: run.status,
        "epoch": lambda run: run.epoch,
        "trained": lambda run: run.seconds,
        "last": lambda run: _rank(run, run.at_end(run.headline.name)),
        "best": lambda run: _rank(run, run.at_best(run.headline)),
    }
    if by not in places:
        _check_key(by, known, "--sort", places)
        places[by] = lambda run: _order(run.settings.get(by))
    return sorted(runs, key=places[by])


def _rank(run: "Facts", value: float) -> tuple[bool, float]:
    return value != value, -value if run.headline.higher_is_better else value


def _order(setting: Any) -> tuple[int, Any]:
    """Return what sorts settings of all types: numbers, texts, others, unset ones."""
    if isinstance(setting, int | float):
        return 0, setting
    return (1, setting) if isinstance(setting, str) else (3, "") if setting is None else (2, str(setting))


def _check_key(key: str, runs: Sequence["Facts"], option: str, more: Sequence[str] | Any = ()) -> None:
    keys = [*more, *dict.fromkeys(each for run in runs for each in run.settings)]
    if key not in keys:
        raise UsageError(f"{option}: no run has a key '{key}' in its recipe{nearest(key, keys)}")
