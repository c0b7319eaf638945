"""Which classes a model confuses: as a matrix, or of many classes as the most confused pairs and the worst classes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from torchrelay.report.style import DPI, INK, SOFT, styled
from torchrelay.run.terminal import metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

Counts = npt.NDArray[np.int64]

_MOST_COUNTED = 20  # classes up to which the cells show their counts
_MOST_CELLS = 50  # classes up to which a cell can be seen and each class has its name
_BARS = 20  # confused pairs, and worst classes
_LONGEST_NAME = 24  # characters


def confusion_matrix(matrix: "Tensor | Counts", classes: Sequence[str] = (), when: str = "") -> "Figure":
    """Draw which classes the model confuses.

    In the matrix, colors are shares of the true class, on a scale that shows an error of one in a hundred; numbers are
    samples. Above 50 classes there are bars: of the most confused pairs, and of the classes with the lowest accuracy.

    Args:
        matrix: int64 (classes, classes), on the CPU; rows are true classes, columns predicted ones.
        classes: class names; without one per class, their indices are shown.
        when: which network it is of, such as "after epoch 3".
    """
    counts: Counts = np.asarray(matrix)
    names = list(classes) if len(classes) == len(counts) else [str(index) for index in range(len(counts))]
    names = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names]
    right = counts.trace() / max(counts.sum(), 1)
    title = f"{metric(right, percent=True).strip()} of {counts.sum():,} samples right {when}".strip()
    with styled(names):
        figure = _draw_cells(counts, names, title) if len(counts) <= _MOST_CELLS else _draw_bars(counts, names, title)
        # Creates the ticks, which take their style from the current context.
        figure.draw_without_rendering()
        # A second search for room changes it once more; then everything has its place, and no drawing moves it.
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
        figure.set_layout_engine("none")
    return figure


def _figure(width: float, height: float) -> "Figure":
    """Return an empty figure, whose parts find their own room."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    FigureCanvasAgg(figure)
    return figure


# ------------------------------------------------------------------------------------------------ few classes


def _draw_cells(counts: Counts, names: Sequence[str], title: str) -> "Figure":
    """Draw the matrix."""
    import matplotlib as mpl

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = len(counts)
    side = min(max(0.45 * size, 3.2), 9.0)  # inches of the square
    figure = _figure(side + 2.6, side + 1.9)
    axes = figure.add_subplot()
    norm = mpl.colors.PowerNorm(0.5, 0, 1)
    image = axes.imshow(shares, cmap="Blues", norm=norm)
    _name_classes(axes, names)
    axes.set_title(title, loc="left", pad=12)
    if size <= _MOST_COUNTED:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if norm(shares[row, column]) > 0.6 else INK if count else "#c4c4c4"
            axes.text(column, row, f"{count:,}", color=color, ha="center", va="center", fontsize=7.5)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=25, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1%", "10%", "25%", "50%", "100%"])
    bar.outline.set_visible(False)
    bar.set_label("share of the true class", color=SOFT)
    return figure


def _name_classes(axes: "Axes", names: Sequence[str]) -> None:
    """Label both sides of a matrix with class names."""
    ticks = range(len(names))
    upright = max(map(len, names), default=0) <= (3 if len(names) > 10 else 5)
    rotation, alignment = (0, "center") if upright else (45, "right")
    axes.set_xticks(ticks, names, rotation=rotation, ha=alignment, rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    axes.tick_params(length=0, labelsize=8 if len(names) <= 30 else 6)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


# ------------------------------------------------------------------------------------------------ many classes


def _draw_bars(counts: Counts, names: Sequence[str], title: str) -> "Figure":
    """Draw the most confused pairs beside the classes with the lowest accuracy."""
    samples = counts.sum(1)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    # A stable order, so that equal numbers stand in the order of the classes.
    pairs = [divmod(int(place), len(counts)) for place in np.argsort(-wrong, axis=None, kind="stable")[:_BARS]]
    pairs = [pair for pair in pairs if wrong[pair]]
    accuracy = np.where(samples > 0, counts.diagonal() / np.maximum(samples, 1), np.inf)
    worst = [int(index) for index in np.argsort(accuracy, kind="stable")[:_BARS] if accuracy[index] < 1]
    rows = max(len(pairs), len(worst), 4)
    figure = _figure(12.0, 1.6 + 0.24 * rows)
    left, right = figure.subplots(1, 2)
    left.set_ylim(rows - 0.5, -0.6)
    right.set_ylim(rows - 0.5, -0.6)
    _bars(
        left,
        f"{title}\n\nmost confused: true class → predicted, and the share of the true class",
        [f"{names[true]} → {names[predicted]}" for true, predicted in pairs],
        [int(wrong[pair]) for pair in pairs],
        [f"{wrong[pair]:,}  ({_percent(wrong[pair] / samples[pair[0]])})" for pair in pairs],
        "#D55E00",
    )
    _bars(
        right,
        "lowest accuracy",
        [names[index] for index in worst],
        [float(accuracy[index]) for index in worst],
        [f"{_percent(accuracy[index])} of {samples[index]:,}" for index in worst],
        "#0072B2",
        longest=1.0,
    )
    return figure


def _percent(share: Any) -> str:
    return f"{100 * share:.1f}%"


def _bars(
    axes: "Axes",
    title: str,
    labels: Sequence[str],
    lengths: Sequence[float],
    notes: Sequence[str],
    color: str,
    longest: float | None = None,
) -> None:
    """Draw horizontal bars with a label before and a note behind each, from the top."""
    axes.set_title(title, loc="left", fontsize=9.5, pad=8)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    places = range(len(labels))
    axes.set_autoscaley_on(False)
    axes.barh(places, lengths, color=color, height=0.62)
    axes.set_yticks(places, labels)
    longest = longest or max(lengths, default=1)
    axes.set_xlim(0, 1.35 * longest)  # room for the longest bar's note
    for place, length, note in zip(places, lengths, notes, strict=True):
        axes.text(length + 0.012 * longest, place, note, va="center", fontsize=7.5, color=SOFT)
    if not labels:
        axes.text(0, 0, "none", color=SOFT, va="center")
