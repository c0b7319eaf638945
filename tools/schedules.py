"""Draw the learning rate of every schedule over a run of 30 epochs, as small multiples.

python -m tools.schedules --out docs/pictures/schedules.png

Each line is read from a bound schedule, step by step, as the trainer reads it.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from torchrelay import optim
from torchrelay.optim import ScheduleSettings

EPOCHS, STEPS_PER_EPOCH = 30, 100
LR = 0.1
WARMUP = "3 epochs"
INK, GREY, RULE, LINE, FILL = "#16181d", "#6b7280", "#d9dde3", "#c2410c", "#fdeee2"
WIDTH, MARGIN, TOP, BOTTOM = 1040, 48, 176, 66  # pixels: the whole picture; around it; above and below the panels
COLUMNS, ACROSS, BETWEEN = 4, 36, 84  # panels in a row; pixels between panels, and between rows (for their titles)
PANEL = ((WIDTH - 2 * MARGIN - (COLUMNS - 1) * ACROSS) // COLUMNS, 120)  # pixels: width, height


@dataclass(frozen=True)
class Panel:
    """One of the small multiples."""

    settings: ScheduleSettings
    note: str


PANELS = (
    Panel(optim.Constant(), "the same throughout"),
    Panel(optim.Step(), "a tenth, every ten epochs"),
    Panel(optim.MultiStep(), "a tenth, at milestones"),
    Panel(optim.Plateau(), "a tenth, when nothing improves"),
    Panel(optim.Linear(), "a straight line"),
    Panel(optim.Cosine(), "half a cosine"),
    Panel(optim.Cosine(per="epoch"), "the same, once an epoch"),
    Panel(optim.OneCycle(), "up, and further down"),
    Panel(optim.Constant(warmup=WARMUP), "any can begin with a rise"),
    Panel(optim.Step(warmup=WARMUP), "drops stay where they were"),
    Panel(optim.Linear(warmup=WARMUP), "falls from the warm-up's end"),
    Panel(optim.Cosine(warmup=WARMUP), "falls from the warm-up's end"),
)


def accuracy(epoch: int) -> float:
    """Return an invented test accuracy with two plateaus, for the `Plateau` schedule."""
    return 1.0 - 0.6 * math.exp(-min(epoch, 7) / 3) + 0.05 * (1.0 - math.exp(-max(min(epoch, 18) - 12, 0) / 2))


def rates(settings: ScheduleSettings) -> list[float]:
    """Return the learning rate of every step of the run, as the trainer computes it."""
    schedule = settings.bind(STEPS_PER_EPOCH, EPOCHS * STEPS_PER_EPOCH)
    found = []
    for step in range(EPOCHS * STEPS_PER_EPOCH):
        found.append(schedule.at(step, LR))
        if (step + 1) % STEPS_PER_EPOCH == 0:
            schedule.update(accuracy(step // STEPS_PER_EPOCH))
    return found


def written(settings: ScheduleSettings) -> str:
    """Return the arguments that differ from the defaults, in Python syntax."""
    fields = type(settings).model_fields
    given = [(name, value) for name, value in settings if value != fields[name].get_default(call_default_factory=True)]
    return ", ".join(f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in given)


def draw_panel(axes: Axes, panel: Panel, first: bool, lowest: bool) -> None:
    """Draw one schedule; only the first panel of a row and the lowest row have tick labels."""
    epochs = [step / STEPS_PER_EPOCH for step in range(EPOCHS * STEPS_PER_EPOCH)]
    found = rates(panel.settings)
    axes.fill_between(epochs, found, color=FILL, linewidth=0, zorder=0)
    axes.plot(epochs, found, color=LINE, linewidth=1.8, solid_joinstyle="round", zorder=3)
    if isinstance(panel.settings, optim.Plateau):
        ends = range(EPOCHS)  # an epoch's evaluation follows at its end
        axes.plot([e + 1 for e in ends], [0.8 * LR * accuracy(e) for e in ends], color=GREY, linewidth=1, dashes=(3, 2))
        axes.text(EPOCHS - 0.6, 0.67 * LR, "test accuracy", color=GREY, fontsize=8, ha="right")
    axes.set_xlim(0, EPOCHS)
    axes.set_ylim(0, LR * 1.06)
    axes.xaxis.set_major_locator(FixedLocator([0, 10, 20, 30]))
    axes.yaxis.set_major_locator(FixedLocator([0, LR / 2, LR]))
    axes.set_yticklabels(["0", "", f"{LR:g}"] if first else [])
    axes.tick_params(length=0, labelsize=8.5, labelcolor=GREY, labelbottom=lowest, pad=5)
    axes.set_xlabel("epoch" if lowest else "", fontsize=8.5, color=GREY, labelpad=3)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow("line")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)


def draw_picture(panels: Sequence[Panel], path: Path) -> None:
    """Write the picture."""
    rows = -(-len(panels) // COLUMNS)
    height = TOP + rows * PANEL[1] + (rows - 1) * BETWEEN + BOTTOM
    dpi = 100
    with mpl.rc_context({"font.family": "DejaVu Sans", "savefig.facecolor": "white"}):
        figure = Figure((WIDTH / dpi, height / dpi), dpi=dpi)

        def say(x: float, y: float, text: str, **style: object) -> None:
            figure.text(x / WIDTH, 1 - y / height, text, **({"color": INK, "va": "center"} | style))  # type: ignore[arg-type]

        say(MARGIN, MARGIN + 12, "Schedules", fontsize=19, fontweight="bold")
        say(
            MARGIN,
            MARGIN + 46,
            f"The learning rate of each step in {EPOCHS} epochs, with lr = {LR:g}. In grey: what was set.",
            fontsize=11,
            color=GREY,
        )
        for number, panel in enumerate(panels):
            row, column = divmod(number, COLUMNS)
            left, top = MARGIN + column * (PANEL[0] + ACROSS), TOP + row * (PANEL[1] + BETWEEN)
            name = type(panel.settings).__name__
            say(left, top - 33, name, fontsize=12, fontweight="bold")
            say(left, top - 13, panel.note, fontsize=9)
            if arguments := written(panel.settings):
                right = left + PANEL[0]
                say(right, top - 32, arguments, fontsize=8, color=GREY, family="DejaVu Sans Mono", ha="right")
            place = (left / WIDTH, 1 - (top + PANEL[1]) / height, PANEL[0] / WIDTH, PANEL[1] / height)
            draw_panel(figure.add_axes(place), panel, column == 0, row == rows - 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi * 2, metadata={"Software": None}, pil_kwargs={"optimize": True})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw every schedule over a run of 30 epochs.")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/schedules.png"))
    options = parser.parse_args(arguments)
    draw_picture(PANELS, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
