"""Draw measurements: bars of overhead, and accuracy over time.

    python -m tools.pictures --root FOLDER [--out docs/pictures]

trains `cifar10-fast` on the photographs in FOLDER, evaluates it after each epoch, and draws its accuracy over time
beside the reference's, whose times are computed from its step rate before and after. It also copies the run's plots.
`python -m benchmarks` draws the bars.
"""

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from benchmarks.page import Spread, Table
from benchmarks.speed import accuracy as measured
from torchrelay.run.metrics import read_metrics

INK, GREY, RULE, OURS, OTHERS = "#16181d", "#6b7280", "#d9dde3", "#c2410c", "#9aa3b2"
WIDTH, MARGIN, DPI = 1040, 48, 100  # pixels, pixels, pixels per inch
BAR = 40  # pixels from one bar to the next
MARKS = {1: "1 s", 10: "10 s", 30: "30 s", 60: "1 min", 180: "3 min", 600: "10 min", 1800: "30 min"}
MARKS |= {3600: "1 h", 10_800: "3 h", 36_000: "10 h"}  # seconds
TUTORIAL = {1: 0.5148, 10: 0.7652, 20: 0.8255, 30: 0.8844}  # test accuracy by epoch; the last one is its best
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
    """Remove spines and ticks."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=GREY)
    axes.set_axisbelow(True)


# ------------------------------------------------------------------------------------------------ overhead


def draw_overhead(table: Table, path: Path) -> None:
    """Draw what each framework adds to a step: the first column of figures of `benchmarks.speed.overhead`."""
    rows = [row for row in table.rows if isinstance(row[1], Spread)]
    found = sorted(((str(row[0]), row[1]) for row in rows), key=lambda row: row[1].median)  # type: ignore[union-attr]
    by_hand = median(row[3].median for row in rows if isinstance(row[3], Spread))
    height = 200 + BAR * len(found)
    figure = page(
        height, "What a framework adds to a training step", "Microseconds per step; a tiny network, one thread"
    )
    left, right, top, bottom = 300, 100, 122, 78
    place = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    axes = figure.add_axes(place)
    bare(axes)
    halo = [withStroke(linewidth=4, foreground="white")]
    for row, (name, added) in enumerate(found):
        assert isinstance(added, Spread)  # noqa: S101 - rows without figures were dropped
        ours = name.startswith("torchrelay")
        axes.barh(row, max(added.median, 0.0), height=0.62, color=OURS if ours else OTHERS)
        axes.plot((min(added.values), max(added.values)), (row, row), color=INK, linewidth=1, zorder=3)
        style: dict[str, Any] = {"fontweight": "bold" if ours else "normal", "path_effects": halo, "zorder": 4}
        end = max(*added.values, 0.0)
        axes.annotate(
            f"{added.median:+,.0f}", (end, row), (7, 0), textcoords="offset points", va="center", color=INK, **style
        )
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=10.5, pad=8)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.axvline(by_hand, color=INK, linewidth=1, dashes=(4, 3), zorder=2)
    axes.text(by_hand, -0.7, f"a whole step by hand: {by_hand:,.0f}", color=INK, fontsize=9, ha="left", va="bottom")
    note = "Medians of several rounds; thin lines: minimum to maximum. Settings: docs/evidence/benchmarks.md."
    figure.text(left / WIDTH, 28 / height, note, fontsize=9, color=GREY, va="center")
    save(figure, path)


# ------------------------------------------------------------------------------------------------ accuracy over time


def of_tutorial(rate: float) -> Points:
    """Return the tutorial's evaluations, at times computed from the images per second of its step."""
    return [(epoch * 50_000 / rate, accuracy) for epoch, accuracy in TUTORIAL.items()]


def of_run(lines: Sequence[Mapping[str, Any]], began: float) -> Points:
    """Return a run's evaluations, at the seconds since its start minus the earlier evaluations.

    Args:
        lines: lines of its metrics.jsonl.
        began: start of its process, in seconds of the clock.
    """
    found, left_out = [], 0.0
    trained = {line["epoch"]: line["time"] for line in lines if line["split"] == "train"}
    for line in (line for line in lines if line["split"] == "test"):
        found.append((line["time"] - began - left_out, line["accuracy"]))
        left_out += line["time"] - trained[line["epoch"]]
    return found


def draw_accuracy(reference: Points, fast: Points, path: Path) -> None:
    """Draw two trainings on a logarithmic time axis, from seconds to hours."""
    figure = page(
        520,
        "Accuracy over time",
        "CIFAR-10, two CPU cores. Reference: the tutorial's accuracies, at the rate of its step on this machine",
    )
    axes = figure.add_axes((0.09, 0.13, 0.79, 0.66))
    bare(axes)
    for name, points, colour in (("reference", reference, GREY), ("fast", fast, OURS)):
        seconds, accuracy = zip(*points, strict=True)
        axes.plot(seconds, accuracy, color=colour, linewidth=2, marker="o", markersize=4, clip_on=False)
        axes.annotate(
            f"{name}\n{max(accuracy):.2%}", points[-1], (10, -4), textcoords="offset points", color=colour, va="top",
            fontsize=10, fontweight="bold",
        )  # fmt: skip
    times = [seconds for seconds, _ in (*reference, *fast)]
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 1.2, max(times) * 1.05)
    shown = {place: name for place, name in MARKS.items() if min(times) / 1.2 <= place <= max(times) * 1.05}
    axes.xaxis.set_major_locator(FixedLocator(list(shown)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(list(shown.values()))
    accuracies = [accuracy for _, accuracy in (*reference, *fast)]
    axes.set_ylim(min(accuracies) - 0.03, max(accuracies) + 0.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(color=RULE, linewidth=0.8)
    _compare(axes, reference, fast)
    save(figure, path)


def _compare(axes: Axes, reference: Points, fast: Points) -> None:
    """Draw how much sooner the fast training reaches the reference's best accuracy, if it does."""
    latest, goal = max(reference, key=lambda point: point[1])
    sooner = next((seconds for seconds, accuracy in fast if accuracy >= goal), None)
    if sooner is None:
        axes.axhline(goal, color=GREY, linewidth=1, dashes=(4, 3))
        return
    height = goal + 0.022  # above both curves
    axes.annotate("", (latest, height), (sooner, height), arrowprops={"arrowstyle": "<->", "color": INK, "lw": 1})
    text = f"the reference's best accuracy in 1/{latest / sooner:,.0f} of its time"
    middle = math.sqrt(sooner * latest)
    axes.annotate(text, (middle, height), (0, 5), textcoords="offset points", ha="center", fontsize=9.5, color=INK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the photographs, as an image folder")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    rates = [measured.reference_rate()]
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        measured.fast(options.root.resolve(), 0, Path(folder), evaluate_every=1)
        rates.append(measured.reference_rate())
        run = Path(folder) / measured.RUN
        draw_accuracy(
            of_tutorial(fmean(rates)), of_run(read_metrics(run), began), options.out / "accuracy-over-time.png"
        )
        for name in ("curves.png", "confusion.png"):
            shutil.copyfile(run / name, options.out / name)


if __name__ == "__main__":
    main()
