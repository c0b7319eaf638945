"""Curves in a terminal: each cell of braille has two by four dots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

from torchrelay.run.terminal import metric

_LABELS = 7  # columns of the numbers beside a chart
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell, by column and row
_LOG = 30.0  # from this ratio of the largest to the smallest value on, the axis is logarithmic
SOFT = "#808080"  # readable on black and on white


@dataclass(frozen=True)
class Curve:
    """A curve with its name in the legend, and its color."""

    name: str
    color: str
    points: Sequence[tuple[float, float]]  # the second may be NaN


@dataclass(frozen=True)
class _Axis:
    """The values from the bottom to the top of a chart."""

    low: float
    high: float
    is_log: bool

    def place(self, y: float) -> float:
        """Return where a value stands, from 0 to 1."""
        low, high, y = map(math.log, (self.low, self.high, y)) if self.is_log else (self.low, self.high, y)
        return (y - low) / (high - low)

    def at(self, place: float) -> float:
        """Return the value at a place."""
        if self.is_log:
            return math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low)))
        return self.low + place * (self.high - self.low)


def chart(
    title: str, curves: Sequence[Curve], size: tuple[int, int], *, percent: bool, unit: str, plain: bool = False
) -> list[Text]:
    """Return the lines of a chart: a legend with the last values, the curves, and the axis below them.

    Args:
        title: what is drawn.
        curves: those without a finite value are left out.
        size: columns and lines of all of it.
        percent: whether the values are shares.
        unit: of the axis below.
        plain: whether the terminal has no braille.
    """
    width, height = size
    drawn = [Curve(each.name, each.color, _finite(each.points)) for each in curves]
    drawn = [each for each in drawn if each.points]
    if not drawn:
        empty = Text(title, style="bold"), Text("nothing yet", style=SOFT)
        return [_padded(text, width) for text in (*empty, *[Text()] * (height - 2))]
    axis = _axis([y for curve in drawn for _, y in curve.points], percent)
    left, right = 0.0, max(x for curve in drawn for x, _ in curve.points)
    columns, rows = max(width - _LABELS - 1, 1), max(height - 2, 1)
    cells = [[(0, "")] * columns for _ in range(rows)]
    for curve in drawn:
        for x, y in _trace(curve.points, axis, right or 1.0, (2 * columns, 4 * rows)):
            dots, _ = cells[y // 4][x // 2]
            cells[y // 4][x // 2] = dots | _DOTS[x % 2][y % 4], curve.color
    lines = [_legend(title + " (log)" * axis.is_log, drawn, percent, width)]
    for number, row in enumerate(cells):
        label = metric(axis.at(1 - number / max(rows - 1, 1)), percent).strip() if number in _labeled(rows) else ""
        line = Text(f"{label:>{_LABELS}} ", style=SOFT)
        for dots, color in row:
            line.append(" " if not dots else "*" if plain else chr(0x2800 + dots), style=color)
        lines.append(_padded(line, width))
    end = f"{right:g} {unit}" if right < 1e6 else f"{right:.3g} {unit}"
    below = f"{' ' * (_LABELS + 1)}{left:g}"
    return [*lines, _padded(Text(f"{below}{end:>{width - len(below)}}", style=SOFT), width)]


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _axis(values: Sequence[float], percent: bool) -> _Axis:
    low, high = min(values), max(values)
    if low == high:
        margin = 0.005 if percent else abs(low) / 10 or 1.0
        return _Axis(low - margin, high + margin, is_log=False)
    return _Axis(low, high, is_log=not percent and low > 0 and high / low > _LOG)


def _labeled(rows: int) -> set[int]:
    """Return the lines that have a number."""
    return {0, rows // 2, rows - 1} if rows >= 5 else {0, rows - 1}


def _trace(
    points: Sequence[tuple[float, float]], axis: _Axis, right: float, dots: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the dots of a curve, from the top left: the mean in each column, joined by lines."""
    across, down = dots
    columns: dict[int, list[float]] = {}
    for x, y in points:
        columns.setdefault(min(int(x / right * across), across - 1), []).append(y)
    means = [(column, math.fsum(ys) / len(ys)) for column, ys in sorted(columns.items())]
    ends = [(column, round((1 - axis.place(mean)) * (down - 1))) for column, mean in means]
    found = [*ends]
    if len(ends) == 1:  # a dot would be overlooked
        ((column, row),) = ends
        found += [(x, y) for x in (column - 1, column) for y in (row, row + 1) if x >= 0 and y < down]
    for (x, y), (to_x, to_y) in pairwise(ends):
        steps = max(to_x - x, abs(to_y - y))
        found += [(x + round(i * (to_x - x) / steps), y + round(i * (to_y - y) / steps)) for i in range(1, steps)]
    return found


def _legend(title: str, curves: Sequence[Curve], percent: bool, width: int) -> Text:
    line = Text(title, style="bold")
    for curve in curves:
        value = metric(curve.points[-1][1], percent).strip()
        entry = Text.assemble("  ", (curve.name, curve.color), " ", value, style="not bold")
        if line.cell_len + entry.cell_len <= width:
            line.append_text(entry)
    return _padded(line, width)


def _padded(line: Text, width: int) -> Text:
    """Return a line that is as wide as its chart."""
    line = line.copy()
    line.truncate(width, overflow="ellipsis", pad=True)
    return line
