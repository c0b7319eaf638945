"""A run's plots: its curves (the headline metric, the loss and the learning rate by epoch), in a process of their own.

They use matplotlib's objects directly, without pyplot: they need no display, leave no global state behind, and the same
metrics give the same bytes. The process, which also draws the confusion matrix: `python -m torchrelay.report.plots
FOLDER PARENT`. It imports all, then waits for a line of standard input that asks it to draw.
"""

import io
import json
import math
import os
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrelay.distributed.process import end_with
from torchrelay.errors import NoFontWarning
from torchrelay.report.confusion import confusion_matrix
from torchrelay.report.style import COLORS, DPI, GRID, SOFT, save, styled
from torchrelay.run.metrics import SPLITS, Headline, Line, best_line, headline_of, read_metrics, value
from torchrelay.run.plots import PATIENCE, UNASKED
from torchrelay.run.terminal import metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]  # epoch, value

_LONGEST_TITLE = 70  # characters that fit


# ------------------------------------------------------------------------------------------------ curves


def curves(folder: Path, headline: Headline | None = None) -> Path:
    """Draw a run's curves into its curves.png.

    Args:
        folder: the run's folder.
        headline: the metric of the left panel; guessed from the metrics if not given.

    Returns:
        The file, which is replaced atomically.
    """
    lines, name = read_metrics(folder), folder.resolve().name
    headline = headline or headline_of(lines)
    path, unfinished = folder / "curves.png", folder / "curves.png.tmp"
    with styled([name, headline.name]):
        save(draw_curves(lines, name, headline), unfinished)
    return unfinished.replace(path)


def draw_curves(lines: Sequence[Line], title: str, headline: Headline | None = None) -> "Figure":
    """Return the figure of `curves`, under a title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    headline = headline or headline_of(lines)
    per_epoch = _steps_per_epoch(lines)
    best = best_line(lines, headline)
    rates = _rates(lines, per_epoch)
    names = [headline.name, "loss"] if headline.name != "loss" else ["loss"]
    has_rates = len({rate for _, rate in rates}) > 1
    figure = Figure(figsize=(11, 4.8), dpi=DPI)
    FigureCanvasAgg(figure)
    margins = {"left": 0.06, "right": 0.97, "top": 0.8, "bottom": 0.1, "wspace": 0.16, "hspace": 0.3}
    grid = figure.add_gridspec(2, len(names), height_ratios=(5, 1), **margins)
    # How many steps an epoch has shows at the end of the first.
    unit = "epoch" if any(line["split"] == "train" for line in lines) else "step"
    last_epoch = max((line["step"] / per_epoch for line in lines), default=1.0)
    for column, name in enumerate(names):
        above_rates = has_rates and name == "loss"
        axes = figure.add_subplot(grid[0, column] if above_rates else grid[:, column])
        axes.set_title(headline.words if name == headline.name else name, loc="left", fontsize=10, pad=8)
        _set_epochs(axes, last_epoch, "" if above_rates else unit)
        _draw_panel(axes, lines, name, per_epoch, headline, best)
        if above_rates:
            _draw_rates(figure.add_subplot(grid[1, column]), rates, last_epoch, unit)
    title = title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1]}…"
    figure.text(0.06, 0.945, title, fontsize=14, fontweight="bold", va="center")
    figure.text(0.06, 0.89, _subtitle(lines, best, headline), fontsize=9.5, color=SOFT, va="center")
    return figure


def _steps_per_epoch(lines: Sequence[Line]) -> float:
    """Return the steps of a full epoch; an epoch that was cut short has fewer."""
    return max((line["step"] / line["epoch"] for line in lines if line["split"] == "train"), default=0.0) or 1.0


def _points(lines: Sequence[Line], split: str, name: str, per_epoch: float) -> list[tuple[float, float]]:
    """Return (epoch, value) wherever lines of a split have a metric; the value may be NaN.

    A mean over steps, which the network changes during, stands in the middle of these steps. At their end it would be
    compared with an evaluation of the network at the end, and a mean of 50 steps with that of an epoch.
    """
    found = [line for line in lines if line["split"] == split]
    if split not in ("step", "train"):
        return [(line["step"] / per_epoch, value(line, name)) for line in found if name in line]
    steps = pairwise([0, *(line["step"] for line in found)])
    middles = [(begin + end) / 2 / per_epoch for begin, end in steps]
    return [(middle, value(line, name)) for middle, line in zip(middles, found, strict=True) if name in line]


def _rates(lines: Sequence[Line], per_epoch: float) -> list[tuple[float, float]]:
    """Return (epoch, learning rate) of the steps that were recorded."""
    return [(line["step"] / per_epoch, value(line, "lr")) for line in lines if "lr" in line]


def _set_epochs(axes: "Axes", last_epoch: float, label: str) -> None:
    """Give a panel its grid and its axis of epochs, whose labels stand below another panel if there is none here."""
    from matplotlib.ticker import MaxNLocator

    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(length=0, labelbottom=bool(label))
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, last_epoch)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    if label:
        axes.set_xlabel(label, loc="left", fontsize=8.5)


def _draw_panel(
    axes: "Axes", lines: Sequence[Line], name: str, per_epoch: float, headline: Headline, best: Line | None
) -> None:
    """Draw a metric of all splits, its last values in the legend, and a ring at the best of the headline metric."""
    points = {split: _points(lines, split, name, per_epoch) for split in SPLITS}
    points = {split: pairs for split, pairs in points.items() if any(math.isfinite(y) for _, y in pairs)}
    percent = name == headline.name and headline.percent
    steps = _points(lines, "step", name, per_epoch)
    # Fewer of them than of epochs say nothing that the epochs don't.
    if len(steps) <= len(points.get("train", ())):
        steps = []
    most = max(map(len, points.values()), default=0)
    if most == 1 and len(steps) < 2:
        _draw_bars(axes, {split: pairs[0][1] for split, pairs in points.items()}, percent=percent)
        return
    values = [y for pairs in points.values() for _, y in pairs if math.isfinite(y)]
    # Between two points any slope is steep on an axis of its own.
    _set_scale(axes, values, [y for _, y in steps if math.isfinite(y)], percent=percent, whole=0 < most <= 2)
    if not points and not steps:
        axes.text(0.5, 0.5, "no finished epoch yet", transform=axes.transAxes, ha="center", color=SOFT)
    style: dict[str, Any]
    if steps:
        style = {"alpha": 0.6, "linewidth": 1.4} if most <= 2 else {"alpha": 0.25, "linewidth": 0.8}
        axes.plot(*zip(*steps, strict=True), color=COLORS["train"], label="within epochs", **style)
    for split, pairs in points.items():
        style = {"color": COLORS[split], "linewidth": 1.8, "markersize": 3.5, "clip_on": False}
        label = f"{split} {metric(pairs[-1][1], percent).strip()}"
        axes.plot(*zip(*pairs, strict=True), marker="o" if len(pairs) <= 12 else None, label=label, **style)
    if best is not None and name == headline.name:
        _mark_best(axes, best, headline, per_epoch)
    if points or steps:
        axes.legend(loc="best", frameon=False, fontsize=8.5)


def _draw_bars(axes: "Axes", values: Mapping[str, float], *, percent: bool) -> None:
    """Draw one value of each split: a curve of one epoch would be a dot."""
    axes.grid(visible=False)
    axes.set(xlabel="", xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)
    places, longest = range(len(values)), 1.0 if percent else max(values.values())
    axes.barh(places, list(values.values()), color=[COLORS[split] for split in values], height=0.5)
    axes.set_ylim(max(len(values), 3) - 0.4, -0.6)
    axes.set_xlim(min(0.0, *values.values()), 1.5 * longest if longest > 0 else 1.0)
    for place, (split, number) in enumerate(values.items()):
        text = f"{split} {metric(number, percent).strip()}"
        axes.annotate(text, (max(number, 0), place), (6, 0), textcoords="offset points", va="center", fontsize=9)


def _set_scale(axes: "Axes", values: Sequence[float], steps: Sequence[float], *, percent: bool, whole: bool) -> None:
    """Set the range of values: all of epochs, and those of steps that aren't so far off that they squash the rest.

    Args:
        axes: whose range is set.
        values: of epochs.
        steps: within epochs.
        percent: whether they are shares.
        whole: whether the range begins at zero, and that of shares ends at 100%.
    """
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
    lowest = 0.0 if low >= 0 and (whole or low < 0.25 * high) else low - margin
    highest = (1.0 if whole else min(high + margin, 1.0)) if percent and high <= 1 else high + margin
    axes.set_ylim(lowest, highest)


def _mark_best(axes: "Axes", best: Line, headline: Headline, per_epoch: float) -> None:
    """Put a ring around the best point of the headline metric."""
    x, y = best["step"] / per_epoch, value(best, headline.name)
    ring: dict[str, Any] = {"markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.8, "clip_on": False}
    label = f"best {metric(y, headline.percent).strip()}"
    axes.plot([x], [y], "o", color=COLORS[best["split"]], zorder=4, label=label, **ring)


def _draw_rates(axes: "Axes", rates: Points, last_epoch: float, unit: str) -> None:
    """Draw the learning rate as a thin strip."""
    _set_epochs(axes, last_epoch, unit)
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


# ------------------------------------------------------------------------------------------------ their own process

# The lowest priority: training threads wait for each other, so one that is held up briefly holds up all of them.
_NICENESS = 19


def draw(folder: Path, headline: Headline, *, confusion: bool) -> None:
    """Draw curves.png and, if asked to, confusion.png."""
    curves(folder, headline)
    if confusion:
        draw_confusion(folder)


def draw_confusion(folder: Path) -> None:
    """Draw confusion.png from evaluation.json."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    matrix = np.array(evaluation["confusion_matrix"], np.int64)
    names = list(evaluation.get("accuracy_by_class", {}))
    when = f"after epoch {evaluation['epoch']}" if "epoch" in evaluation else ""
    save(confusion_matrix(matrix, names, when), folder / "confusion.png")


def main() -> None:
    """Draw what a line of standard input asks for, as JSON."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    end_with(parent)  # a resumed run may draw into the same files
    _prepare()
    request = _request()
    headline, confusion = Headline(**request["headline"]), bool(request["confusion"])
    # Two processors draw two pictures in the time of one; elsewhere a fork isn't as safe.
    other = os.fork() if confusion and sys.platform == "linux" else None
    code = 0
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NoFontWarning)
            if other == 0:
                draw_confusion(folder)
            else:
                draw(folder, headline, confusion=confusion and other is None)
                if request["report"]:
                    _write_report(folder)
        # The run says these lines, each once.
        for text in dict.fromkeys(str(each.message) for each in caught if each.category is NoFontWarning):
            print(f"warning: {text}", file=sys.stderr)
    except Exception as error:  # noqa: BLE001 - the run says its last line
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    if other:
        code = code or os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
    sys.stderr.flush()
    os._exit(code)  # what Python would tidy up takes a tenth of a second


def _write_report(folder: Path) -> None:
    """Write the run as one page, without reading its data; what goes wrong is a line, and no reason to fail."""
    try:
        from torchrelay.report.page.facts import nearest_recipe, read_facts
        from torchrelay.report.page.page import write_page

        facts = read_facts(folder)
        write_page(facts, folder / "report.html", None, nearest_recipe(facts))
    except Exception as error:  # noqa: BLE001 - no page is worth a run
        cause = " ".join(str(error).split())
        print(f"warning: report.html can't be written: {type(error).__name__}: {cause}", file=sys.stderr)


def _prepare() -> None:
    """Import what a drawing needs, and load the fonts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(1, 1))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_title("0")
        axes.plot([0, 1], label="0")
        axes.legend()
        figure.text(0, 0, "0", fontweight="bold")
        figure.savefig(io.BytesIO(), format="png")


def _request() -> Any:
    """Return what a line of standard input asks for; the process ends where none comes."""
    unasked = threading.Timer(PATIENCE, os._exit, [UNASKED])
    unasked.daemon = True
    unasked.start()
    line = sys.stdin.readline()
    unasked.cancel()
    unasked.join()  # it may be ending the process: then the run asks another
    if not line:
        os._exit(UNASKED)
    return json.loads(line)


if __name__ == "__main__":
    main()
