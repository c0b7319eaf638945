"""What all plots share: colors, fonts, and how a figure becomes a file.

The plots use matplotlib's objects directly, without pyplot: they need no display, leave no global state behind, and the
same metrics give the same bytes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLITS = ("train", "validation", "test")
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
