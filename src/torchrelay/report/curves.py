"""Tables and plots from a run's folder: whatever is shown of a run is read from its metrics.jsonl.

The plots use matplotlib's objects directly, without pyplot, so they need no display and leave no state behind; the same
metrics give the same bytes.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from torchrelay.run.metrics import Headline, Line, read_metrics
from torchrelay.run.terminal import duration, metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from torch import Tensor

_SPLITS = ("train", "validation", "test")
_COLOURS = {
    "train": "#0072B2",
    "validation": "#009E73",
    "test": "#D55E00",
}  # Okabe and Ito: colour-blind people see three
_INK, _SOFT, _GRID = "#222222", "#6b6b6b", "#e4e4e4"
_NOT_METRICS = {"step", "epoch", "split", "time", "seconds", "lr", "samples_per_second", "loss"}
_SHARES = ("accuracy", "f1", "precision", "recall", "auroc", "iou", "dice")  # metrics that people read as percentages
_DPI = 200
_LONGEST_TITLE = 70  # characters that fit
_MOST_COUNTED = 20  # classes up to which a confusion matrix has its numbers written in
_MOST_NAMED = 50  # classes whose names fit along a side
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a plot looks the same everywhere
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": "#bdbdbd",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a $ in a run's or a class's name is a $
}


def headline_of(lines: Sequence[Line]) -> Headline:
    """Guess by which metric a run is judged: accuracy, otherwise the first beside the loss, otherwise the loss."""
    names = [name for line in lines if line["split"] in _SPLITS for name in line if name not in _NOT_METRICS]
    name = "accuracy" if "accuracy" in names else next(iter(names), "loss")
    is_share = any(word in name for word in _SHARES)
    return Headline(name, percent=is_share, higher_is_better=is_share)


# ---------------------------------------------------------------------------------------------------------- the table


def metrics_table(lines: Sequence[Line], headline: Headline | None = None) -> str:
    """Return a table with a row an epoch: the headline metric and the loss of each split, the rate, the time.

    The best epoch, by the validation part where there is one, otherwise by the test part, is marked with a star.
    """
    headline = headline or headline_of(lines)
    splits = [split for split in _SPLITS if any(line["split"] == split for line in lines)]
    columns = [(split, name) for name in dict.fromkeys((headline.name, "loss")) for split in splits]
    best = best_line(lines, headline)
    rows = [["", "epoch", *(f"{split} {name.replace('_', ' ')}" for split, name in columns), "lr", "samples/s", "time"]]
    by_epoch: dict[int, dict[str, Line]] = {}
    for line in lines:
        if line["split"] in splits:
            by_epoch.setdefault(line["epoch"], {})[line["split"]] = line
    for epoch, of_split in sorted(by_epoch.items()):
        train = of_split.get("train", {})
        cells = ["*" if best is not None and best["epoch"] == epoch else "", str(epoch)]
        cells += [_cell(of_split.get(split, {}), name, headline) for split, name in columns]
        cells += [f"{train['lr']:.4g}" if train.get("lr") is not None else ""]
        cells += [f"{train['samples_per_second']:,.0f}" if train.get("samples_per_second") is not None else ""]
        cells += [duration(train["seconds"]) if train.get("seconds") is not None else ""]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cell(line: Mapping[str, Any], name: str, headline: Headline) -> str:
    if name not in line:
        return ""
    return metric(_value(line, name), headline.percent and name == headline.name)


def best_line(lines: Sequence[Line], headline: Headline) -> Line | None:
    """Return the line of the best evaluation, the first of several; None if nothing was evaluated."""
    for split in ("validation", "test"):
        found = [line for line in lines if line["split"] == split and math.isfinite(_value(line, headline.name))]
        if found:
            sign = -1.0 if headline.higher_is_better else 1.0
            return min(found, key=lambda line: sign * _value(line, headline.name))
    return None


def _value(line: Mapping[str, Any], name: str) -> float:
    """Return a metric of a line; what isn't there, and what JSON could only call null, is not a number."""
    value = line.get(name)
    return math.nan if value is None else float(value)


# ---------------------------------------------------------------------------------------------------------- the curves


@contextmanager
def _silent_about_letters() -> Iterator[None]:
    """Draw letters that the font lacks as boxes, without a warning about each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def curves(folder: Path, headline: Headline | None = None) -> Path:
    """Draw a run's curves into its curves.png: the headline metric, the loss, and the learning rate below them.

    Args:
        folder: the run's folder.
        headline: the metric of the left panel; guessed from the metrics if not given.

    Returns:
        The file, which appears whole or not at all.
    """
    import matplotlib as mpl

    lines = read_metrics(folder)
    path, unfinished = folder / "curves.png", folder / "curves.png.tmp"
    with mpl.rc_context(_STYLE):
        figure = draw_curves(lines, folder.resolve().name, headline)
        save(figure, unfinished)
    return unfinished.replace(path)


@_silent_about_letters()
def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def draw_curves(lines: Sequence[Line], title: str, headline: Headline | None = None) -> "Figure":
    """Return the figure of `curves`, under a title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    headline = headline or headline_of(lines)
    per_epoch = _steps_per_epoch(lines)
    best = best_line(lines, headline)
    rates = _points(lines, ("step", "train"), "lr", per_epoch)
    names = [headline.name, "loss"] if headline.name != "loss" else ["loss"]
    has_strip = len({rate for _, rate in rates}) > 1
    figure = Figure(figsize=(11, 4.8), dpi=_DPI)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, len(names), height_ratios=(5, 1), left=0.06, right=0.86, top=0.8, bottom=0.1, wspace=0.62, hspace=0.16
    )
    last_epoch = max((line["step"] / per_epoch for line in lines), default=1.0)
    for column, name in enumerate(names):
        with_strip = has_strip and name == "loss"
        axes = figure.add_subplot(grid[0, column] if with_strip else grid[:, column])
        axes.set_title(headline.words if name == headline.name else name, loc="left", fontsize=10, pad=8)
        _finish(axes, last_epoch, labelled=not with_strip)
        _draw_panel(axes, lines, name, per_epoch, headline, best)
        if with_strip:
            _draw_rates(figure.add_subplot(grid[1, column]), rates, last_epoch)
    title = title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1]}…"
    figure.text(0.06, 0.945, title, fontsize=14, fontweight="bold", va="center")
    figure.text(0.06, 0.89, _subtitle(lines, best, headline), fontsize=9.5, color=_SOFT, va="center")
    return figure


def _steps_per_epoch(lines: Sequence[Line]) -> float:
    """Return the steps of a whole epoch: an epoch that was cut short has fewer."""
    return max((line["step"] / line["epoch"] for line in lines if line["split"] == "train"), default=0.0) or 1.0


def _points(lines: Sequence[Line], splits: Sequence[str], name: str, per_epoch: float) -> list[tuple[float, float]]:
    """Return (epoch, value) where lines of these splits have a metric; the value may be NaN."""
    return [
        (line["step"] / per_epoch, _value(line, name)) for line in lines if line["split"] in splits and name in line
    ]


def _finish(axes: "Axes", last_epoch: float, *, labelled: bool) -> None:
    """Give a panel its grid and an axis of epochs, whose numbers may stand below another panel."""
    from matplotlib.ticker import MaxNLocator

    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(length=0, labelbottom=labelled)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, last_epoch)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    if labelled:
        axes.set_xlabel("epoch", loc="left", fontsize=8.5)


def _draw_panel(
    axes: "Axes", lines: Sequence[Line], name: str, per_epoch: float, headline: Headline, best: Line | None
) -> None:
    """Draw a metric of all splits, labelled at its end, and the best point of the headline metric."""
    drawn = {split: _points(lines, (split,), name, per_epoch) for split in _SPLITS}
    drawn = {split: points for split, points in drawn.items() if any(math.isfinite(value) for _, value in points)}
    percent = name == headline.name and headline.percent
    inside = _points(lines, ("step",), name, per_epoch)
    values = [value for points in drawn.values() for _, value in points if math.isfinite(value)]
    _scale(axes, values, [value for _, value in inside if math.isfinite(value)], percent=percent)
    if not drawn:
        axes.text(0.5, 0.5, "no finished epoch yet", transform=axes.transAxes, ha="center", color=_SOFT)
    if inside:
        axes.set_title("thin: within the epochs", loc="right", fontsize=8, color=_SOFT, pad=8)
        axes.plot(*zip(*inside, strict=True), color=_COLOURS["train"], alpha=0.25, linewidth=0.8)
    for split, points in drawn.items():
        style: dict[str, Any] = {"color": _COLOURS[split], "linewidth": 1.8, "markersize": 3.5, "clip_on": False}
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= 12 else None, **style)
    _label_ends(axes, drawn, percent=percent)
    if best is not None and name == headline.name:
        _mark_best(axes, best, headline, per_epoch, last=drawn[best["split"]][-1][0])


def _scale(axes: "Axes", values: Sequence[float], inside: Sequence[float], *, percent: bool) -> None:
    """Set the range of values: of all epochs, and of the steps unless they are so far off that they squash the rest."""
    most = 2 * max(values, default=math.inf)
    shown = sorted([*values, *(value for value in inside if value <= most)])
    if not shown:
        axes.set_yticks([])
        return
    low, high = shown[0], shown[-1]
    is_log = low > 0 and high / low > 1000 and not percent
    axes.set_yscale("log" if is_log else "linear")
    axes.minorticks_off()
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g}%")
    elif is_log:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if is_log:
        axes.set_ylim(low / 1.5, high * 1.5)
        return
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    lowest = 0.0 if 0 <= low < 0.25 * high else low - room
    axes.set_ylim(lowest, min(high + room, 1.0) if percent and high <= 1 else high + room)


def _label_ends(axes: "Axes", drawn: Mapping[str, Sequence[tuple[float, float]]], *, percent: bool) -> None:
    """Write each split's name and last value at the end of its line, moved apart where they would overlap."""
    line_height = 14 / axes.bbox.height * axes.figure.dpi / 72  # 14 points as a share of the panel's height
    ends = {split: [value for _, value in points if math.isfinite(value)][-1] for split, points in drawn.items()}
    upwards = sorted(ends, key=lambda split: ends[split])
    heights: list[float] = []
    for split in upwards:
        at_end = axes.transAxes.inverted().transform(axes.transData.transform((0, ends[split])))[1]
        heights.append(max(at_end, heights[-1] + line_height) if heights else at_end)
    ceiling = 1.0
    for split, height in zip(reversed(upwards), reversed(heights), strict=True):
        place = min(height, ceiling)
        ceiling = place - line_height
        text = f"{split} {metric(drawn[split][-1][1], percent).strip()}"
        style: dict[str, Any] = {"color": _COLOURS[split], "fontweight": "bold", "va": "center"}
        axes.text(1.03, place, text, transform=axes.transAxes, **style)


def _mark_best(axes: "Axes", best: Line, headline: Headline, per_epoch: float, last: float) -> None:
    """Put a ring around the best point and write beside it, where no curve is in the way; at the end, all is said."""
    from matplotlib.patheffects import withStroke

    x, y = best["step"] / per_epoch, _value(best, headline.name)
    colour = _COLOURS[best["split"]]
    ring: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.8}
    axes.plot([x], [y], marker="o", markersize=8, clip_on=False, zorder=4, **ring)
    if x == last:
        return
    text = axes.annotate(
        f"best {metric(y, headline.percent).strip()}",
        (x, y),
        (0, 0),
        textcoords="offset points",
        color=colour,
        fontsize=8.5,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )
    sides = (("center", 0), ("right", -9), ("left", 9))
    places = [(dx, 8 * up, side, "bottom" if up > 0 else "top") for side, dx in sides for up in (-1, 1)]

    def put(place: tuple[float, float, str, str]) -> int:
        text.set(position=place[:2], horizontalalignment=place[2], verticalalignment=place[3])
        return _in_the_way(axes, text)

    put(min(places, key=put))


def _in_the_way(axes: "Axes", text: "Text") -> int:
    """Return how much of the curves lies under a text; very much if it reaches out of the panel."""
    box = text.get_window_extent().padded(2)
    panel = axes.bbox
    if box.x0 < panel.x0 or box.x1 > panel.x1 or box.y0 < panel.y0 or box.y1 > panel.y1:
        return 10**6
    under = 0
    for line in axes.lines:
        points = axes.transData.transform(line.get_xydata())
        dense = np.linspace(0, len(points) - 1, 50 * len(points))
        xs, ys = (np.interp(dense, np.arange(len(points)), points[:, side]) for side in (0, 1))
        under += int(((xs > box.x0) & (xs < box.x1) & (ys > box.y0) & (ys < box.y1)).sum())
    return under


def _draw_rates(axes: "Axes", rates: Sequence[tuple[float, float]], last_epoch: float) -> None:
    """Draw the learning rate as a thin strip."""
    _finish(axes, last_epoch, labelled=True)
    axes.grid(visible=False)
    xs, ys = zip(*rates, strict=True)
    axes.plot(xs, ys, color=_SOFT, linewidth=1.0)
    axes.fill_between(xs, ys, color=_SOFT, alpha=0.12, linewidth=0)
    axes.set_ylim(0, max(ys) * 1.05)
    axes.set_yticks([max(ys)], [f"{max(ys):.2g}"])
    axes.text(1.03, 0.5, "learning rate", transform=axes.transAxes, color=_SOFT, va="center", fontsize=8.5)


def _subtitle(lines: Sequence[Line], best: Line | None, headline: Headline) -> str:
    """Return what the run has reached, in words."""
    if best is not None:
        value = metric(_value(best, headline.name), headline.percent).strip()
        return f"best {best['split']} {headline.words} {value} at epoch {best['epoch']}"
    epochs = max((line["epoch"] for line in lines if line["split"] == "train"), default=0)
    return f"{epochs} epoch{'s' * (epochs != 1)}, nothing evaluated"


# ------------------------------------------------------------------------------------------------ the confusion matrix


@_silent_about_letters()
def confusion_matrix(matrix: "Tensor | npt.NDArray[np.int64]", classes: Sequence[str] = ()) -> "Figure":
    """Draw what the network took for what.

    Colours are shares of the true class, on a scale that shows an error of one in a hundred; the numbers are samples.

    Args:
        matrix: int64 (classes, classes), on the CPU; the row is what a sample is, the column what the network said.
        classes: their names; their numbers are shown if these are missing.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    counts = np.asarray(matrix)
    of_class = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(of_class, 1)
    size = len(counts)
    side = min(max(0.45 * size, 3.2), 9.0)  # inches of the square
    with mpl.rc_context(_STYLE):
        figure = Figure(
            figsize=(side + 2.6, side + 1.9), dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
        )
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        norm = mpl.colors.PowerNorm(0.5, 0, 1)
        shown = axes.imshow(shares, cmap="Blues", norm=norm)
        _name_classes(axes, list(classes) if len(classes) == size else [str(index) for index in range(size)])
        right = counts.trace() / max(counts.sum(), 1)
        axes.set_title(f"{metric(right, percent=True).strip()} of {counts.sum():,} samples right", loc="left", pad=12)
        if size <= _MOST_COUNTED:
            for (row, column), count in np.ndenumerate(counts):
                colour = "white" if norm(shares[row, column]) > 0.6 else _INK if count else "#c4c4c4"
                axes.text(column, row, f"{count:,}", color=colour, ha="center", va="center", fontsize=7.5)
        bar = figure.colorbar(shown, ax=axes, shrink=0.6, aspect=25, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.ax.set_yticklabels(["0", "1%", "10%", "25%", "50%", "100%"])
        bar.outline.set_visible(False)
        bar.set_label("share of the true class", color=_SOFT)
        figure.draw_without_rendering()  # makes the ticks, which take their style from here
    return figure


def _name_classes(axes: "Axes", names: Sequence[str]) -> None:
    """Write the classes along both sides of a matrix, as many of them as there is room for."""
    every = math.ceil(len(names) / _MOST_NAMED)
    places = list(range(0, len(names), every))
    shown = [names[place] if len(names[place]) <= 24 else f"{names[place][:23]}…" for place in places]
    upright = max(map(len, shown), default=0) <= (3 if len(places) > 10 else 5)
    size = 8 if len(places) <= 30 else 6
    axes.set_xticks(
        places, shown, rotation=0 if upright else 45, ha="center" if upright else "right", rotation_mode="anchor"
    )
    axes.set_yticks(places, shown)
    axes.tick_params(length=0, labelsize=size)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("what the network said")
    axes.set_ylabel("what it is")
