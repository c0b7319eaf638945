"""Charts as SVG: they take their colors from the page's style, and scale with it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup

from torchrelay.report.page.facts import Column

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 14, 14, 36
_MOST = 400  # points of a curve: two for each pixel's column would be more than a screen shows


def curves(series: Mapping[str, Points], label: str, show: Callable[[float], str], *, floor: bool = False) -> Markup:
    """Draw curves over the epochs; a pointer over the chart shows their values, by the page's script.

    Args:
        series: (epoch, value) of each curve, by a name that is also a class of the page's style.
        label: what the chart shows, for screen readers.
        show: from a value to the text beside the axis.
        floor: whether the axis begins at 0.
    """
    finite = {name: [(x, y) for x, y in pairs if math.isfinite(y)] for name, pairs in series.items()}
    kept = {name: thinned(pairs) for name, pairs in finite.items() if pairs}
    if not kept:
        return Markup()
    # Of the steps' noise, the extremes may leave the chart; those of epochs may not.
    calm = [y for name, pairs in kept.items() if name != "steps" for _, y in pairs]
    most = 2 * max(calm, default=math.inf)
    shown = calm + [y for _, y in kept.get("steps", ()) if y <= most]
    ys = ticks(0.0 if floor else min(shown), max(shown))
    last = max(max(x for pairs in kept.values() for x, _ in pairs), 1e-9)
    first = 0.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
        down = _HEIGHT - _BOTTOM - (min(y, ys[-1]) - ys[0]) / (ys[-1] - ys[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    parts = [_grid(ys, show, place), _epochs(last, place)]
    hover = {}
    for name, pairs in kept.items():
        spots = [place(x, y) for x, y in pairs]
        path = " ".join(f"{x},{y}" for x, y in spots)
        css = escape(name, quote=True)
        if len(spots) > 1:
            parts.append(f'<polyline class="curve {css}" points="{path}"/>')
        if len(spots) <= 12 and name != "steps":
            parts += [f'<circle class="dot {css}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in spots]
        hover[name] = [[*spot, _epoch(x), show(y)] for spot, (x, y) in zip(spots, pairs, strict=True)]
    data = escape(json.dumps(hover, separators=(",", ":")), quote=True)
    return _svg(_WIDTH, _HEIGHT, label, "".join(parts), f' class="chart" data-curves="{data}"')


def thinned(pairs: Points) -> Points:
    """Return at most so many points, of which those between two kept ones lie between the lowest and the highest."""
    if len(pairs) <= _MOST:
        return pairs
    kept = []
    for part in np.array_split(np.arange(len(pairs)), _MOST // 2):
        inside = sorted(part.tolist(), key=lambda i: pairs[i][1])
        kept += sorted({inside[0], inside[-1]})
    kept = sorted({0, *kept, len(pairs) - 1})
    return [pairs[i] for i in kept]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round values from below the lowest to above the highest."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _grid(
    ys: Sequence[float], show: Callable[[float], str], place: Callable[[float, float], tuple[float, float]]
) -> str:
    parts = []
    for y in ys:
        down = place(0, y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{down + 4}">{escape(show(y))}</text>')
    return "".join(parts)


def _epochs(last: float, place: Callable[[float, float], tuple[float, float]]) -> str:
    whole = [x for x in ticks(0.0, last) if x <= last + 1e-9 and (last < 1 or x == int(x))]
    texts = [f'<text class="tick mid" x="{place(x, 0)[0]}" y="{_HEIGHT - 14}">{_epoch(x)}</text>' for x in whole]
    return "".join(texts)


def _epoch(x: float) -> str:
    return f"{x:.4g}"


def _svg(width: float, height: float, label: str, inside: str, more: str = "") -> Markup:
    text = escape(label, quote=True)
    # Everything inside is numbers, or was escaped where it was put together.
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text}"{more}>{inside}</svg>')  # noqa: S704


def confusion(matrix: Column, classes: Sequence[str]) -> Markup:
    """Draw a confusion matrix: the darker a cell, the larger the share of its row."""
    size, cell, named = len(matrix), 34 if len(matrix) <= 20 else 22, [_short(each) for each in classes]
    left = 18 + 7 * max(map(len, named), default=1)
    upright = max(map(len, named), default=0) <= 3
    bottom = 34 if upright else 24 + 5 * max(map(len, named))
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    parts = []
    for (i, j), count in np.ndenumerate(matrix):
        x, y, strength = left + j * cell, 8 + i * cell, float(shares[i, j]) ** 0.5
        kind = "hit" if i == j else "miss"
        title = f"<title>{escape(classes[i])} taken for {escape(classes[j])}: {int(count):,}</title>"
        parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
            f'fill-opacity="{strength:.3f}">{title}</rect>'
        )
        if count and size <= 20 and count < 1000:
            css = "tick mid" + " strong" * (strength > 0.6)
            parts.append(f'<text class="{css}" x="{x + cell / 2 - 0.5}" y="{y + cell / 2 + 4}">{int(count)}</text>')
    for i, name in enumerate(named):
        middle = 8 + i * cell + cell / 2 + 4
        parts.append(f'<text class="tick end" x="{left - 8}" y="{middle}">{escape(name)}</text>')
        x, y = left + i * cell + cell / 2, 8 + size * cell + 18
        turn = "" if upright else f' transform="rotate(-45 {x} {y - 6})"'
        parts.append(f'<text class="tick {"mid" if upright else "end"}" x="{x}" y="{y}"{turn}>{escape(name)}</text>')
    width, height = left + size * cell + 8, 8 + size * cell + bottom
    return _svg(
        width,
        height,
        "confusion matrix",
        "".join(parts),
        f' class="matrix" style="max-width:{width}px;min-width:{0.7 * width:.0f}px"',
    )


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def reliability(bins: Sequence[Mapping[str, Any]], number: int) -> Markup:
    """Draw the accuracy of each bin of confidence beside the diagonal, on which it would be if the model knew."""
    side, left, top = 260, 46, 10

    def place(x: float, y: float) -> tuple[float, float]:
        return round(left + x * side, 1), round(top + (1 - y) * side, 1)

    parts = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(value, value)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{left - 7}" y="{y + 4}">{100 * value:g}%</text>')
        parts.append(f'<text class="tick mid" x="{x}" y="{top + side + 18}">{100 * value:g}%</text>')
    width = round(side / number - 2, 1)
    for each in bins:
        x, y = place(each["bin"] / number, each["accuracy"])
        text = f"{each['count']:,} samples: confidence {each['confidence']:.1%}, right {each['accuracy']:.1%}"
        height = round(top + side - y, 1)
        parts.append(
            f'<rect class="bar" x="{x + 1}" y="{y}" width="{width}" height="{height}"><title>{text}</title></rect>'
        )
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    parts.append(f'<line class="ideal" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')
    return _svg(left + side + 24, top + side + 30, "accuracy by confidence", "".join(parts), ' class="square"')
