"""A run's plots: its curves (the headline metric, the loss and the learning rate by epoch) and its confusion matrix.

They use matplotlib's objects directly, without pyplot: they need no display, leave no global state behind, and the same
metrics give the same bytes. A run has them drawn by a process of their own: `python -m torchrelay.report.plots FOLDER
PARENT HEADLINE [--confusion]`.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from torchrelay.distributed.process import end_with
from torchrelay.run.metrics import SPLITS, Headline, Line, best_line, headline_of, read_metrics, value
from torchrelay.run.terminal import metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

_LONGEST_TITLE = 70  # characters that fit
# Okabe and Ito's palette, which color-blind people can tell apart.
COLORS = {"train": "#0072B2", "validation": "#009E73", "test": "#D55E00"}
INK, SOFT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
DPI = 200
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a plot looks the same everywhere
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": "#bdbdbd",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a $ in a run's or a class's name is a $
}


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Draw letters that the font lacks as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@without_glyph_warnings()
def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


# ------------------------------------------------------------------------------------------------ curves


def curves(folder: Path, headline: Headline | None = None) -> Path:
    """Draw a run's curves into its curves.png.

    Args:
        folder: the run's folder.
        headline: the metric of the left panel; guessed from the metrics if not given.

    Returns:
        The file, which is replaced atomically.
    """
    import matplotlib as mpl

    lines = read_metrics(folder)
    path, unfinished = folder / "curves.png", folder / "curves.png.tmp"
    with mpl.rc_context(STYLE):
        save(draw_curves(lines, folder.resolve().name, headline), unfinished)
    return unfinished.replace(path)


def draw_curves(lines: Sequence[Line], title: str, headline: Headline | None = None) -> "Figure":
    """Return the figure of `curves`, under a title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    headline = headline or headline_of(lines)
    per_epoch = _steps_per_epoch(lines)
    best = best_line(lines, headline)
    rates = _points(lines, ("step", "train"), "lr", per_epoch)
    names = [headline.name, "loss"] if headline.name != "loss" else ["loss"]
    has_rates = len({rate for _, rate in rates}) > 1
    figure = Figure(figsize=(11, 4.8), dpi=DPI)
    FigureCanvasAgg(figure)
    margins = {"left": 0.06, "right": 0.97, "top": 0.8, "bottom": 0.1, "wspace": 0.16, "hspace": 0.3}
    grid = figure.add_gridspec(2, len(names), height_ratios=(5, 1), **margins)
    last_epoch = max((line["step"] / per_epoch for line in lines), default=1.0)
    for column, name in enumerate(names):
        above_rates = has_rates and name == "loss"
        axes = figure.add_subplot(grid[0, column] if above_rates else grid[:, column])
        axes.set_title(headline.words if name == headline.name else name, loc="left", fontsize=10, pad=8)
        _set_epochs(axes, last_epoch, labeled=not above_rates)
        _draw_panel(axes, lines, name, per_epoch, headline, best)
        if above_rates:
            _draw_rates(figure.add_subplot(grid[1, column]), rates, last_epoch)
    title = title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1]}…"
    figure.text(0.06, 0.945, title, fontsize=14, fontweight="bold", va="center")
    figure.text(0.06, 0.89, _subtitle(lines, best, headline), fontsize=9.5, color=SOFT, va="center")
    return figure


def _steps_per_epoch(lines: Sequence[Line]) -> float:
    """Return the steps of a full epoch; an epoch that was cut short has fewer."""
    return max((line["step"] / line["epoch"] for line in lines if line["split"] == "train"), default=0.0) or 1.0


def _points(lines: Sequence[Line], splits: Sequence[str], name: str, per_epoch: float) -> list[tuple[float, float]]:
    """Return (epoch, value) wherever lines of these splits have a metric; the value may be NaN."""
    return [(line["step"] / per_epoch, value(line, name)) for line in lines if line["split"] in splits and name in line]


def _set_epochs(axes: "Axes", last_epoch: float, *, labeled: bool) -> None:
    """Give a panel its grid and its axis of epochs, whose labels may stand below another panel."""
    from matplotlib.ticker import MaxNLocator

    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(length=0, labelbottom=labeled)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, last_epoch)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    if labeled:
        axes.set_xlabel("epoch", loc="left", fontsize=8.5)


def _draw_panel(
    axes: "Axes", lines: Sequence[Line], name: str, per_epoch: float, headline: Headline, best: Line | None
) -> None:
    """Draw a metric of all splits, its last values in the legend, and a ring at the best of the headline metric."""
    points = {split: _points(lines, (split,), name, per_epoch) for split in SPLITS}
    points = {split: pairs for split, pairs in points.items() if any(math.isfinite(y) for _, y in pairs)}
    percent = name == headline.name and headline.percent
    steps = _points(lines, ("step",), name, per_epoch)
    # Fewer of them than of epochs would be joined to a line that contradicts the epochs' own.
    if len(steps) <= len(points.get("train", ())):
        steps = []
    values = [y for pairs in points.values() for _, y in pairs if math.isfinite(y)]
    _set_scale(axes, values, [y for _, y in steps if math.isfinite(y)], percent=percent)
    if not points:
        axes.text(0.5, 0.5, "no finished epoch yet", transform=axes.transAxes, ha="center", color=SOFT)
    if steps:
        axes.plot(*zip(*steps, strict=True), color=COLORS["train"], alpha=0.25, linewidth=0.8, label="within epochs")
    for split, pairs in points.items():
        style: dict[str, Any] = {"color": COLORS[split], "linewidth": 1.8, "markersize": 3.5, "clip_on": False}
        label = f"{split} {metric(pairs[-1][1], percent).strip()}"
        axes.plot(*zip(*pairs, strict=True), marker="o" if len(pairs) <= 12 else None, label=label, **style)
    if best is not None and name == headline.name:
        _mark_best(axes, best, headline, per_epoch)
    if points or steps:
        axes.legend(loc="best", frameon=False, fontsize=8.5)


def _set_scale(axes: "Axes", values: Sequence[float], steps: Sequence[float], *, percent: bool) -> None:
    """Set the range of values: all of epochs, and those of steps that aren't so far off that they squash the rest."""
    most = 2 * max(values, default=math.inf)
    shown = sorted([*values, *(y for y in steps if y <= most)])
    if not shown:
        axes.set_yticks([])
        return
    low, high = shown[0], shown[-1]
    is_log = low > 0 and high / low > 1000 and not percent
    axes.set_yscale("log" if is_log else "linear")
    axes.minorticks_off()
    if percent:
        axes.yaxis.set_major_formatter(lambda y, _: f"{round(100 * y, 6):g}%")
    elif is_log:
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    if is_log:
        axes.set_ylim(low / 1.5, high * 1.5)
        return
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    lowest = 0.0 if 0 <= low < 0.25 * high else low - margin
    axes.set_ylim(lowest, min(high + margin, 1.0) if percent and high <= 1 else high + margin)


def _mark_best(axes: "Axes", best: Line, headline: Headline, per_epoch: float) -> None:
    """Put a ring around the best point of the headline metric."""
    x, y = best["step"] / per_epoch, value(best, headline.name)
    ring: dict[str, Any] = {"markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.8, "clip_on": False}
    label = f"best {metric(y, headline.percent).strip()}"
    axes.plot([x], [y], "o", color=COLORS[best["split"]], zorder=4, label=label, **ring)


def _draw_rates(axes: "Axes", rates: Sequence[tuple[float, float]], last_epoch: float) -> None:
    """Draw the learning rate as a thin strip."""
    _set_epochs(axes, last_epoch, labeled=True)
    axes.grid(visible=False)
    xs, ys = zip(*rates, strict=True)
    axes.plot(xs, ys, color=SOFT, linewidth=1.0)
    axes.fill_between(xs, ys, color=SOFT, alpha=0.12, linewidth=0)
    axes.set_ylim(0, max(ys) * 1.05)
    axes.set_yticks([max(ys)], [f"{max(ys):.2g}"])
    axes.set_title("learning rate", loc="left", fontsize=8.5, color=SOFT, pad=4)


def _subtitle(lines: Sequence[Line], best: Line | None, headline: Headline) -> str:
    """Return in words what the run has reached."""
    if best is not None:
        text = metric(value(best, headline.name), headline.percent).strip()
        return f"best {best['split']} {headline.words} {text} at epoch {best['epoch']}"
    epochs = max((line["epoch"] for line in lines if line["split"] == "train"), default=0)
    return f"{epochs} epoch{'s' * (epochs != 1)}, nothing evaluated"


# ------------------------------------------------------------------------------------------------ the confusion matrix

_MOST_COUNTED = 20  # classes up to which the cells show their counts
_MOST_NAMED = 50  # class names that fit along a side


@without_glyph_warnings()
def confusion_matrix(matrix: "Tensor | npt.NDArray[np.int64]", classes: Sequence[str] = (), when: str = "") -> "Figure":
    """Draw which classes the model confuses.

    Colors are shares of the true class, on a scale that shows an error of one in a hundred; numbers are samples.

    Args:
        matrix: int64 (classes, classes), on the CPU; rows are true classes, columns predicted ones.
        classes: class names; without one per class, their indices are shown.
        when: which network it is of, such as "after epoch 3".
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = len(counts)
    side = min(max(0.45 * size, 3.2), 9.0)  # inches of the square
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
        figure = Figure(figsize=(side + 2.6, side + 1.9), dpi=DPI, layout=layout)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        norm = mpl.colors.PowerNorm(0.5, 0, 1)
        image = axes.imshow(shares, cmap="Blues", norm=norm)
        _name_classes(axes, list(classes) if len(classes) == size else [str(index) for index in range(size)])
        right = counts.trace() / max(counts.sum(), 1)
        title = f"{metric(right, percent=True).strip()} of {counts.sum():,} samples right {when}"
        axes.set_title(title.strip(), loc="left", pad=12)
        if size <= _MOST_COUNTED:
            for (row, column), count in np.ndenumerate(counts):
                color = "white" if norm(shares[row, column]) > 0.6 else INK if count else "#c4c4c4"
                axes.text(column, row, f"{count:,}", color=color, ha="center", va="center", fontsize=7.5)
        bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=25, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.ax.set_yticklabels(["0", "1%", "10%", "25%", "50%", "100%"])
        bar.outline.set_visible(False)
        bar.set_label("share of the true class", color=SOFT)
        # Creates the ticks, which take their style from the current context.
        figure.draw_without_rendering()
    return figure


def _name_classes(axes: "Axes", names: Sequence[str]) -> None:
    """Label both sides of a matrix with class names, as many as fit."""
    ticks = range(0, len(names), math.ceil(len(names) / _MOST_NAMED))
    shown = [names[tick] if len(names[tick]) <= 24 else f"{names[tick][:23]}…" for tick in ticks]
    upright = max(map(len, shown), default=0) <= (3 if len(ticks) > 10 else 5)
    rotation, alignment = (0, "center") if upright else (45, "right")
    axes.set_xticks(ticks, shown, rotation=rotation, ha=alignment, rotation_mode="anchor")
    axes.set_yticks(ticks, shown)
    axes.tick_params(length=0, labelsize=8 if len(ticks) <= 30 else 6)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


# ------------------------------------------------------------------------------------------------ their own process

# The lowest priority: training threads wait for each other, so one that is held up briefly holds up all of them.
_NICENESS = 19


def draw(folder: Path, headline: Headline, *, confusion: bool) -> None:
    """Draw curves.png and, if asked to, confusion.png."""
    curves(folder, headline)
    if confusion:
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        matrix = np.array(evaluation["confusion_matrix"], np.int64)
        names = list(evaluation.get("accuracy_by_class", {}))
        when = f"after epoch {evaluation['epoch']}" if "epoch" in evaluation else ""
        save(confusion_matrix(matrix, names, when), folder / "confusion.png")


def main() -> None:
    """Draw what the command line asks for."""
    folder, parent, headline, *confusion = sys.argv[1:]
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    end_with(int(parent))  # a resumed run may draw into the same files
    draw(Path(folder), Headline(**json.loads(headline)), confusion=bool(confusion))


if __name__ == "__main__":
    main()
