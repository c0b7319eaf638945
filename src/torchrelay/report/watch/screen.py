"""What `torchrelay watch` shows: a head of facts and two charts for each run."""

import time
from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

from torchrelay.report.compare.facts import Facts
from torchrelay.report.watch.chart import SOFT, Curve, chart
from torchrelay.report.watch.follow import Followed
from torchrelay.run.metrics import Line, value
from torchrelay.run.terminal import clock_time, duration

# They can be read on black and on white.
_COLORS = {"train": "#3b8fd4", "validation": "#1fa37a", "test": "#e0701a"}
_OTHERS = ("#b366c2", "#8a8a1f")
_STATES = {"running": "green", "stopped": "yellow", "gone": "red"}
_LEAST, _MOST = 7, 18  # lines of a run with charts
_WINDOW = 20  # the last lines with a time, from which the time left is reckoned
_GAP = 3


def frame(runs: Sequence[Followed], size: tuple[int, int], *, plain: bool = False) -> Text:
    """Return what fits into a terminal; runs that don't fit are counted in the last line.

    Args:
        runs: as of their last refresh.
        size: columns and lines.
        plain: whether the terminal has no braille.
    """
    width, height = size
    each = min((height - len(runs) + 1) // len(runs), _MOST)
    with_charts = each >= _LEAST
    shown = runs if with_charts or len(runs) <= height else runs[: height - 1]
    lines: list[Text] = []
    for run in shown:
        if lines and with_charts:
            lines.append(Text())
        lines.append(_head(run, width))
        if with_charts:
            lines += _charts(run.facts, width, each - 1, plain)
    if len(shown) < len(runs):
        lines.append(Text(f"{len(runs) - len(shown)} more in a higher terminal"[:width], style=SOFT))
    return Text("\n").join(lines)


def _head(run: Followed, width: int) -> Text:
    """Return the line above a run's charts: what matters least is left out where it doesn't fit."""
    facts, lines = run.facts, run.facts.lines
    step, steps = max((line["step"] for line in lines), default=0), _total_steps(facts)
    epochs = facts.settings.get("run.epochs")
    has_epochs = epochs is not None and "run.steps" not in facts.settings
    entries = [Text(run.status, style=_STATES.get(run.status, "")), Text(_epoch(facts, epochs if has_epochs else None))]
    rate = next((line["samples_per_second"] for line in reversed(lines) if line.get("samples_per_second")), None)
    left = _seconds_left(lines, step, steps) if run.status == "running" else None
    last = next((line["time"] for line in reversed(lines) if line.get("time")), None)
    if left is not None:
        entries.append(Text(f"{clock_time(left)} left"))
    if rate is not None:
        entries.append(Text(f"{rate:,.0f} samples/s"))
    entries.append(Text(f"step {step:,}" + (f"/{steps:,}" if steps else "")))
    if run.status == "running" and last is not None:
        entries.append(Text(f"{duration(max(time.time() - last, 0.0))} ago", style=SOFT))
    elif facts.seconds:
        entries.append(Text(f"trained {duration(facts.seconds)}", style=SOFT))
    line = Text(_shortened(facts.name, max(width // 3, 12)), style="bold")
    for entry in entries:
        if line.cell_len + 2 + entry.cell_len <= width:
            line.append("  ", style="not bold")
            line.append_text(Text.assemble(entry, style="not bold"))
    return line


def _shortened(name: str, most: int) -> str:
    """Return a name without its start where it is too long: runs differ at their end."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _epoch(facts: Facts, epochs: int | None) -> str:
    return f"epoch {facts.epoch}" + (f"/{epochs}" if epochs else "")


def _per_epoch(lines: Sequence[Line]) -> float:
    """Return the steps of an epoch; 0 before the end of the first."""
    return max(
        (line["step"] / line["epoch"] for line in lines if line["split"] == "train" and line["epoch"]), default=0.0
    )


def _total_steps(facts: Facts) -> int:
    """Return the steps of the whole run; 0 if the end of an epoch must tell first."""
    settings = facts.settings
    epochs = settings.get("run.epochs") or 0
    total = settings.get("run.steps") or round(epochs * _per_epoch(facts.lines))
    return min(total, settings.get("run.max_steps") or total)


def _seconds_left(lines: Sequence[Line], step: int, steps: int) -> float | None:
    """Return how long the run goes on, by the time that its last steps took, evaluations included."""
    timed = [(line["time"], line["step"]) for line in lines[-_WINDOW:] if line.get("time")]
    if not steps or len(timed) < 2 or timed[-1][1] <= timed[0][1]:
        return None
    (began, before), (ended, after) = timed[0], timed[-1]
    return max((steps - step) * float((ended - began) / (after - before)), 0.0)


def _charts(facts: Facts, width: int, height: int, plain: bool) -> list[Text]:
    """Return the lines of the headline metric's chart and the loss's, side by side."""
    headline, per_epoch = facts.headline, _per_epoch(facts.lines)
    names = [headline.name, "loss"] if headline.name != "loss" else ["loss"]
    each = (width - _GAP * (len(names) - 1)) // len(names)
    drawn = [
        chart(
            headline.words if name == headline.name else name,
            _curves(facts.lines, name, per_epoch or 1.0),
            (each, height),
            percent=name == headline.name and headline.percent,
            unit="epochs" if per_epoch else "steps",
            plain=plain,
        )
        for name in names
    ]
    return [Text(" " * _GAP).join(row) for row in zip(*drawn, strict=True)]


def _curves(lines: Sequence[Line], name: str, per_epoch: float) -> list[Curve]:
    """Return the curves of a metric: of the training by steps, if it has more of them than epochs."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if name in line:
            points.setdefault(line["split"], []).append((line["step"] / per_epoch, value(line, name)))
    steps = points.pop("step", [])
    train = points.pop("train", [])
    if max(len(steps), len(train)):
        points = {"train": _middles(steps if len(steps) > len(train) else train), **points}
    others = iter(_OTHERS * len(points))
    return [Curve(split, _COLORS.get(split) or next(others), found) for split, found in points.items()]


def _middles(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return means over steps in the middle of these steps, where the network was that they describe."""
    places = pairwise([0.0, *(x for x, _ in points)])
    return [((begin + end) / 2, y) for (begin, end), (_, y) in zip(places, points, strict=True)]
