"""The results of a benchmark as Markdown: tables, and figures with the bar they must pass and the aim beyond it.

A benchmark is a module with `TITLE` and `tables(quick)`. Its own command and `python -m benchmarks`, which runs all of
them, print the same tables.
"""

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.measure import machine, shown

NOT_MEASURED = "not measured"
QUICK = "**Made with `--quick`: few rounds. It only shows that everything runs; don't quote its figures or verdicts.**"
GOAL = ("", "measured", "bar", "aim")


@dataclass(frozen=True)
class Spread:
    """The values of several rounds, shown as their median with minimum and maximum."""

    values: tuple[float, ...]
    digits: int = 1

    @property
    def median(self) -> float:
        return median(self.values)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.median:,.{self.digits}f}"
        return shown(list(self.values), 1, self.digits)


@dataclass(frozen=True)
class Goal:
    """A figure, the bar it must pass and the aim beyond it; None where there is no such limit."""

    what: str
    found: float | None  # None: not measured
    bar: float | None
    aim: float | None
    form: str  # format of the figures, such as "{:+.1%}"
    more: bool = False  # whether more is better

    def verdict(self, limit: float | None) -> str:
        """Return a limit, and whether the unrounded figure meets it."""
        if limit is None:
            return ""
        if self.found is None:
            return f"{self.form.format(limit)}: {NOT_MEASURED}"
        met = self.found >= limit if self.more else self.found <= limit
        return f"{self.form.format(limit)}: {'met' if met else '**not met**'}"

    def row(self) -> tuple[str, str, str, str]:
        """Return the name, the figure, the bar and the aim."""
        figure = NOT_MEASURED if self.found is None else self.form.format(self.found)
        return self.what, figure, self.verdict(self.bar), self.verdict(self.aim)


@dataclass(frozen=True)
class Table:
    """A table of results."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str | Spread]]
    note: str = ""  # what was measured and how
    goals: Sequence[Goal] = ()

    def text(self) -> str:
        """Return it as Markdown, without its title."""
        parts = [self.note, markdown(self.heads, self.rows)]
        if self.goals:
            parts.append(markdown(GOAL, [goal.row() for goal in self.goals]))
        return "\n\n".join(part for part in parts if part)


def sections(tables: Sequence[Table], level: int) -> str:
    """Return tables as Markdown, each under its title; a single table has none."""
    if len(tables) == 1:
        return tables[0].text()
    return "\n\n".join(f"{'#' * level} {table.title}\n\n{table.text()}" for table in tables)


def circumstances() -> str:
    """Return what the figures depend on: the machine, the versions and the load."""
    return f"{machine()}, Python {platform.python_version()}; load at the start: {os.getloadavg()[0]:.1f}."


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str | Spread]]) -> str:
    """Return a table: the first column holds names, the others figures."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def main(description: str, title: str, tables: Callable[[bool], Sequence[Table]]) -> None:
    """Run one benchmark as a command: print its tables, and write them to `--out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: only to check that it runs")
    parser.add_argument("--out", type=Path, help="where to write the tables")
    options = parser.parse_args()
    before = f"# {title}\n\n{circumstances()}" + (f"\n\n{QUICK}" if options.quick else "")
    text = f"{before}\n\n{sections(tables(options.quick), 2)}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)
