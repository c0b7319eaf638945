"""The confusion matrix of an evaluation."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from torchrelay.report.style import DPI, INK, SOFT, STYLE, without_glyph_warnings
from torchrelay.run.terminal import metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

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
