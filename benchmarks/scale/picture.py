"""Draw the bytes that leave a host, and the extrapolated times."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.scale.model import FAST, forms, leaving, seconds, three

BUCKET, ON_HOST = 25 * 2**20 // 4, 8
SIZES = [2**k for k in range(15)]  # 1 to 16,384
INK, GREY, FAINT = "#16181d", "#6b7280", "#eef0f3"
COLOURS = {"flat": "#c2410c", "two levels": "#1d4ed8", "three levels": "#0f766e", "ring": "#9ca3af"}
NAMES = {"ring": "ring all-reduce"}


def draw(path: Path) -> None:
    """Draw bytes on the left and times on the right."""
    found = {
        name: [dict(forms(BUCKET, size, ON_HOST))[name] for size in SIZES] for name in ("flat", "two levels", "ring")
    }
    found["three levels"] = [three(BUCKET, size, ON_HOST) for size in SIZES]
    with mpl.rc_context({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY}):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        frame(left, "What leaves a host, in sizes of the bucket (by formula, checked)")
        frame(right, "Milliseconds for a bucket of 25 MiB (extrapolated)")
        for name, colour in COLOURS.items():
            label = NAMES.get(name, name)
            if name != "three levels":
                sizes = [leaving(phases) / (4 * BUCKET) for phases in found[name]]
                left.plot(SIZES, sizes, color=colour, linewidth=2.5)
                below = name == "two levels"
                left.annotate(
                    label, (SIZES[-1], sizes[-1]), (-2, -9 if below else 8), textcoords="offset points", color=colour,
                    ha="right", va="top" if below else "bottom",
                )  # fmt: skip
            times = [1e3 * seconds(phases, FAST) for phases in found[name]]
            right.plot(SIZES[1:], times[1:], color=colour, linewidth=2.5, label=label)
        left.set_ylim(0, 11)
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        right.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.22, 1.0))
        figure.supxlabel(
            f"Devices, {ON_HOST} on a host. Times are computed from links of 450 GB/s a device inside a host\n"
            "and 50 GB/s between hosts, 10 us for a message between hosts, 1 us from one to the next; not measured.",
            fontsize=10,
            color=GREY,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, facecolor="white")


def frame(axes: Axes, title: str) -> None:
    """Draw the device axis, and shade the range that was counted with real processes."""
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 8, 64, 512, 4096, 16384], ["1", "8", "64", "512", "4,096", "16,384"])
    axes.set_xlim(1, 2**14)
    axes.axvspan(1, 8, color=FAINT, zorder=0)
    axes.text(2.8, 0.985, "real processes\ncounted here", transform=axes.get_xaxis_transform(), va="top", ha="center",
              color=GREY, fontsize=9)  # fmt: skip
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY)
