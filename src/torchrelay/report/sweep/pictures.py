"""A sweep's pictures as SVG: learning curves, and parallel coordinates; the page's style gives them their colors."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from markupsafe import Markup

from torchrelay.report.page.svg import Points, thinned, ticks
from torchrelay.report.sweep.outcome import short_names, value_text
from torchrelay.report.sweep.rungs import Trial
from torchrelay.report.sweep.space import Parameter, Value

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 18, 14, 36
_PLANE = 1070  # of parallel coordinates: as wide as the page, or wider where there are many axes
_ENDS, _CLOSEST = 100, 130  # beside the outer axes, and between two
_NAMED = 8  # choices of an axis that are all named


def curves(series: Mapping[int, Points], grades: Mapping[int, float], show: Callable[[float], str]) -> Markup:
    """Draw the metric of each trial over the epochs, the best last, so that nothing hides it.

    Args:
        series: (epoch, value) by the trial's number.
        grades: from 0, the worst, to 1, by number.
        show: from a value to the text beside the axis.
    """
    finite = {number: [(x, y) for x, y in pairs if math.isfinite(y)] for number, pairs in series.items()}
    kept = {number: thinned(pairs) for number, pairs in finite.items() if pairs}
    if not kept:
        return Markup()
    values = [y for pairs in kept.values() for _, y in pairs]
    ys, last = ticks(min(values), max(values)), max(x for pairs in kept.values() for x, _ in pairs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / last * (_WIDTH - _LEFT - _RIGHT)
        return round(across, 1), round(_down(y, ys[0], ys[-1]), 1)

    parts = []
    for y in ys:
        down = place(0, y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 8}" y="{down + 5}">{escape(show(y))}</text>')
    whole = [x for x in ticks(0.0, last) if x <= last and (last < 1 or x == int(x))]
    parts += [f'<text class="mid" x="{place(x, 0)[0]}" y="{_HEIGHT - 12}">{x:.4g}</text>' for x in whole]
    for number in sorted(kept, key=lambda each: grades.get(each, 0.0)):
        spots = [place(x, y) for x, y in kept[number]]
        ends = f'<circle cx="{spots[-1][0]}" cy="{spots[-1][1]}" r="3.5"/>'
        parts.append(_group(number, grades, _line(spots) + ends))
    return _svg(_WIDTH, _HEIGHT, "learning curves", "".join(parts))


def parallel(
    vary: Sequence[Parameter],
    trials: Sequence[Trial],
    grades: Mapping[int, float],
    title: str,
    show: Callable[[float], str],
) -> Markup:
    """Draw each trial as a line through its values, which ends at its metric.

    Args:
        vary: an axis for each.
        trials: those that have a metric.
        grades: from 0, the worst, to 1, by number.
        title: of the last axis.
        show: from a metric to its text.
    """
    if not trials:
        return Markup()
    metrics = [each.metric for each in trials]
    low, high = min(metrics), max(metrics)
    between = max(_CLOSEST, (_PLANE - 2 * _ENDS) / len(vary))
    width = 2 * _ENDS + between * len(vary)
    across = [round(_ENDS + between * index, 1) for index in range(len(vary) + 1)]
    places, parts, lines = list[Callable[[Value], float]](), list[str](), list[str]()
    names = short_names([each.key for each in vary])
    for index, each in enumerate(vary):
        height, texts = _axis(each)
        places.append(height)
        parts.append(_drawn_axis(across[index], names[each.key], texts, first=True))
    marks = [(_down(y, low, high), show(y)) for y in ((low, high) if high > low else (low,))]
    parts.append(_drawn_axis(across[-1], title, marks, first=False))
    for trial in sorted(trials, key=lambda each: grades.get(each.number, 0.0)):
        spots = [
            (x, round(place(trial.values[each.key]), 1)) for x, each, place in zip(across, vary, places, strict=False)
        ]
        spots.append((across[-1], round(_down(trial.metric, low, high), 1)))
        lines.append(_group(trial.number, grades, _line(spots)))
    least = 0.55 * width  # on a narrow screen, which scrolls
    return _svg(width, _HEIGHT, "parallel coordinates", "".join([*lines, *parts]), f' style="min-width:{least:.0f}px"')


def _axis(each: Parameter) -> tuple[Callable[[Value], float], list[tuple[float, str]]]:
    """Return where a value stands on an axis, and what is written beside it."""
    if each.choices:
        count = max(1, len(each.choices) - 1)
        heights = {text: _down(number, 0, count) for number, text in enumerate(each.choices)}
        named = each.choices if len(each.choices) <= _NAMED else (each.choices[0], each.choices[-1])
        return (lambda value: heights[str(value)]), [(heights[text], text) for text in named]
    scale: Callable[[float], float] = math.log if each.log else float
    low, high = float(each.low or 0), float(each.high or 0)

    def place(value: Value) -> float:
        return _down(scale(float(value)), scale(low), scale(high))

    middle = math.sqrt(low * high) if each.log else (low + high) / 2
    shown = [low, high] if each.is_whole else [low, middle, high]
    return place, [(place(value), value_text(int(value) if each.is_whole else value)) for value in shown]


def _drawn_axis(x: float, name: str, marks: Sequence[tuple[float, str]], *, first: bool) -> str:
    side, css = (-8, "end") if first else (8, "start")
    parts = [f'<line class="axis" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>']
    parts.append(f'<text class="mid name" x="{x}" y="{_HEIGHT - 10}">{escape(_short(name, 18))}</text>')
    parts += [
        f'<text class="{css}" x="{x + side}" y="{y + 5:.1f}">{escape(_short(text, 11))}</text>' for y, text in marks
    ]
    return "".join(parts)


def _down(value: float, low: float, high: float) -> float:
    """Return where a value stands between the lowest, at the bottom, and the highest."""
    share = (value - low) / (high - low) if high > low else 0.5
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _line(spots: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x},{y}" for x, y in spots)
    return f'<polyline class="hit" points="{points}"/><polyline class="curve" points="{points}"/>'


def _group(number: int, grades: Mapping[int, float], inside: str) -> str:
    grade = 100 * grades.get(number, 0.0)
    return f'<g data-trial="{number}" style="--grade:{grade:.0f}%">{inside}</g>'


def _svg(width: float, height: float, label: str, inside: str, more: str = "") -> Markup:
    # Everything inside is numbers, or was escaped where it was put together.
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}"{more}>{inside}</svg>')  # noqa: S704
