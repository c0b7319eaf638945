"""Pictures of what was measured: bars of overhead, and accuracy over time.

    python -m benchmarks.pictures REFERENCE.json FAST.json [--out docs/pictures/accuracy-over-time.png]

draws two trainings, each a JSON list of [seconds, accuracy] pairs, an evaluation each. `python -m benchmarks` draws
the bars.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from benchmarks.page import Spread, Table

INK, GREY, RULE, OURS, OTHERS = "#16181d", "#6b7280", "#d9dde3", "#c2410c", "#9aa3b2"
WIDTH, MARGIN, DPI = 1040, 48, 100  # pixels, pixels, pixels an inch
BAR = 40  # pixels from a bar to the next
Points = Sequence[tuple[float, float]]  # seconds, accuracy in [0, 1]


def page(height: int, title: str, subtitle: str) -> Figure:
    """Return a figure with a heading."""
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI)
    figure.text(MARGIN / WIDTH, 1 - 42 / height, title, fontsize=17, fontweight="bold", color=INK, va="center")
    figure.text(MARGIN / WIDTH, 1 - 74 / height, subtitle, fontsize=10.5, color=GREY, va="center")
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(path, dpi=2 * DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})


def bare(axes: Axes) -> None:
    """Take away what says nothing."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=GREY)
    axes.set_axisbelow(True)


# ------------------------------------------------------------------------------------------------ overhead


def draw_overhead(table: Table, path: Path) -> None:
    """Draw what each framework adds to a step: the first column of figures of `benchmarks.overhead`."""
    found = sorted(
        ((str(name), added, beside) for name, added, _, beside, _ in table.rows if isinstance(added, Spread)),
        key=lambda row: row[1].median,
    )
    height = 190 + BAR * len(found)
    figure = page(
        height, "What a framework adds to a training step", "Microseconds a step, one CPU thread, a tiny network"
    )
    left, top, bottom = 240, 118, 72
    place = (left / WIDTH, bottom / height, (WIDTH - left - MARGIN - 90) / WIDTH, (height - top - bottom) / height)
    axes = figure.add_axes(place)
    bare(axes)
    by_hand = next(beside.median for _, _, beside in found if isinstance(beside, Spread))
    for row, (name, added, _) in enumerate(found):
        ours = name.startswith("torchrelay")
        axes.barh(row, max(added.median, 0.0), height=0.62, color=OURS if ours else OTHERS)
        axes.plot((min(added.values), max(added.values)), (row, row), color=INK, linewidth=1, zorder=3)
        axes.text(
            max(*added.values, 0.0), row, f"  +{added.median:,.0f}", va="center", color=INK, fontsize=10,
            fontweight="bold" if ours else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(found)), [name for name, *_ in found])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=10.5, pad=8)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.axvline(by_hand, color=INK, linewidth=1, dashes=(4, 3), zorder=2)
    axes.text(by_hand, -0.62, f"a whole step by hand: {by_hand:,.0f}", color=INK, fontsize=9, ha="left", va="bottom")
    figure.text(
        left / WIDTH, 24 / height, "Medians of several rounds; the thin lines are the least and the most of them.",
        fontsize=9, color=GREY, va="center",
    )  # fmt: skip
    save(figure, path)


# ------------------------------------------------------------------------------------------------ accuracy over time


def read(path: Path) -> Points:
    """Return the points of a training.

    Raises:
        SystemExit: the file isn't a list of pairs of numbers.
    """
    try:
        return [(float(seconds), float(accuracy)) for seconds, accuracy in json.loads(path.read_text())]
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {path} holds no list of [seconds, accuracy] pairs: {error}") from None


def draw_accuracy(reference: Points, fast: Points, path: Path) -> None:
    """Draw two trainings on a logarithmic axis of time: from seconds to hours."""
    height = 520
    best, goal = max(fast, key=lambda point: point[1]), max(accuracy for _, accuracy in reference)
    figure = page(height, "Accuracy over time", "CIFAR-10, test accuracy after each evaluation, on the same machine")
    axes = figure.add_axes((0.09, 0.13, 0.8, 0.66))
    bare(axes)
    for name, points, colour in (("reference", reference, GREY), ("fast", fast, OURS)):
        seconds, accuracy = zip(*points, strict=True)
        axes.plot(seconds, accuracy, color=colour, linewidth=2, marker="o", markersize=4, clip_on=False)
        axes.text(seconds[-1], accuracy[-1], f"  {name}\n  {max(accuracy):.1%}", color=colour, va="center", fontsize=10)
    axes.axhline(goal, color=GREY, linewidth=1, dashes=(4, 3))
    axes.set_xscale("log")
    first, last = min(p[0] for p in (*reference, *fast)), max(p[0] for p in (*reference, *fast))
    marks = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h"}
    shown = {place: name for place, name in marks.items() if first / 10 <= place <= 10 * last}
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(list(shown.values()))
    axes.set_xlim(first / 1.2, last * 1.2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(color=RULE, linewidth=0.8)
    sooner = [seconds for seconds, accuracy in fast if accuracy >= goal]
    if sooner:
        latest = next(seconds for seconds, accuracy in reference if accuracy >= goal)
        note = f"the reference's best, {latest / sooner[0]:,.0f} times as soon"
        axes.text(sooner[0], goal, f"{note}\n", color=INK, fontsize=9, ha="left", va="center")
    else:
        axes.text(best[0], goal, "the reference's best\n", color=INK, fontsize=9, ha="left", va="center")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the accuracy of two trainings over time.")
    parser.add_argument("reference", type=Path)
    parser.add_argument("fast", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/accuracy-over-time.png"))
    options = parser.parse_args()
    draw_accuracy(read(options.reference), read(options.fast), options.out)


if __name__ == "__main__":
    main()
