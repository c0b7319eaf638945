"""The curves of several recipes on one picture: a line for each, and over seeds their mean with its range."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchrelay.report.compare.groups import Group
from torchrelay.report.style import DPI, GRID, save, styled
from torchrelay.run.metrics import Headline, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which color-blind people can tell apart; further groups repeat it, dashed.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(groups: Sequence[Group], headline: Headline, path: Path) -> None:
    """Write the picture as PNG."""
    with styled([group.name for group in groups]):
        save(figure(groups, headline), path)


def figure(groups: Sequence[Group], headline: Headline) -> "Figure":
    """Return a panel of the headline metric and one of the training loss, by epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    made = Figure(figsize=(11, 4.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(made)
    split = groups[0].runs[0].split
    panels = [(headline.name, split, f"{split} {headline.words}"), ("loss", "train", "train loss")]
    for axes, (name, part, title) in zip(made.subplots(1, 2), panels, strict=True):
        axes.set_title(title, loc="left", fontsize=10, pad=8)
        axes.set_xlabel("epoch", loc="left", fontsize=8.5)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
        axes.spines["left"].set_visible(False)
        for number, group in enumerate(groups):
            _draw_group(axes, group, name, part, number)
        if name == headline.name and headline.percent:
            axes.yaxis.set_major_formatter(lambda y, _: f"{round(100 * y, 6):g}%")
    made.legend(
        *made.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=8.5
    )
    return made


def _draw_group(axes: "Axes", group: Group, name: str, split: str, number: int) -> None:
    by_epoch: dict[int, list[float]] = {}
    for run in group.runs:
        for line in run.lines:
            if line["split"] == split and math.isfinite(found := value(line, name)):
                by_epoch.setdefault(line["epoch"], []).append(found)
    # Where only some of the seeds have arrived, a mean would jump.
    most = max(map(len, by_epoch.values()), default=0)
    epochs = sorted(epoch for epoch, values in by_epoch.items() if len(values) == most)
    label = f"{group.name} ({most} seeds)" if most > 1 else group.name
    color, dashes = _COLORS[number % len(_COLORS)], "-" if number < len(_COLORS) else "--"
    means = [float(np.mean(by_epoch[epoch])) for epoch in epochs]
    marker = "o" if len(epochs) <= 12 else None
    axes.plot(epochs, means, dashes, color=color, label=label, marker=marker, markersize=3.5, linewidth=1.8)
    if most > 1:
        lows, highs = ([pick(by_epoch[epoch]) for epoch in epochs] for pick in (min, max))
        axes.fill_between(epochs, lows, highs, color=color, alpha=0.15, linewidth=0)
