"""Which learning rate a network can take: the rate grows from step to step until the loss does.

Smith, "Cyclical Learning Rates for Training Neural Networks" (WACV 2017, section 3.3): the range test. The suggestion
follows fast.ai's "valley" (docs.fast.ai/callback.schedule): two thirds into the longest fall of the loss.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrelay.data.batch import Batch
from torchrelay.errors import RelayError
from torchrelay.report.style import COLORS, DPI, GRID, SOFT, save, styled
from torchrelay.train.trainer import Trainer

_SMOOTHING = 0.9
_DIVERGED = 4.0  # times the smallest smoothed loss, at which the test ends


@dataclass(frozen=True)
class Found:
    """What a range test has found.

    Attributes:
        rates: of the steps.
        losses: smoothed, of the steps.
        start: the position at which the longest fall begins.
        end: the position at which it ends.
        diverged: whether the loss grew at the end.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    start: int
    end: int
    diverged: bool

    @property
    def suggestion(self) -> float:
        """The rate two thirds into the longest fall."""
        return self.rates[self.start + 2 * (self.end - self.start) // 3]

    def reason(self) -> str:
        """Return in words why."""
        fall = f"from {self.losses[self.start]:.3g} to {self.losses[self.end]:.3g}"
        between = f"between {self.rates[self.start]:.2g} and {self.rates[self.end]:.2g}"
        ends = f"at {self.rates[-1]:.2g} it has grown" if self.diverged else "it never grew: try a higher --to"
        return f"the loss falls longest {between}, {fall}, and two thirds of the way are taken; {ends}"


def find_rate(trainer: Trainer, own: float, lowest: float, highest: float, steps: int) -> Found:
    """Take steps with growing rates; all processes of a run call it.

    Args:
        trainer: new, without a run folder, with a constant schedule.
        own: its optimizer's rate; groups with rates of their own keep their ratio to it.
        lowest: the first rate.
        highest: the last one.
        steps: to take at most.

    Raises:
        RelayError: the loss isn't finite in the first steps, or nothing was learned.
    """
    rates: list[float] = []
    losses: list[float] = []
    smooth, train_step = 0.0, trainer.train_step
    groups = train_step.groups
    bases = [group["initial_lr"] for group in groups]
    with trainer.session.alone():
        trainer.model.train()
        for step, batch in enumerate(itertools.islice(_batches(trainer), steps)):
            rate = lowest * (highest / lowest) ** (step / max(steps - 1, 1))
            for group, base in zip(groups, bases, strict=True):  # which a constant schedule takes as it is
                group["initial_lr"] = base * rate / own
            result = train_step.step(batch, step)
            loss = math.inf if result.spike is not None else float(result.loss)
            smooth = _SMOOTHING * smooth + (1 - _SMOOTHING) * loss
            shown = smooth / (1 - _SMOOTHING ** (step + 1))
            if not math.isfinite(shown) or (losses and shown > _DIVERGED * min(losses) and min(losses) > 0):
                break
            rates.append(rate)
            losses.append(shown)
    if len(losses) < min(10, steps):
        raise RelayError(f"the loss grew within {len(losses) + 1} steps from the rate {lowest:g} on: lower --from")
    start, end = longest_fall(losses)
    if start == end:
        raise RelayError("the loss never fell: raise --to, or try --overfit, which looks for a mistake")
    return Found(rates, losses, start, end, len(rates) < steps or losses[-1] > 1.1 * min(losses))


def _batches(trainer: Trainer) -> Iterator[Batch]:
    """Yield batches, epoch after epoch; the first one is checked as in a run."""
    for epoch in itertools.count():
        yield from trainer.judge.checked(trainer.batches.epoch(epoch))


def longest_fall(losses: Sequence[float]) -> tuple[int, int]:
    """Return the first and the last position of the longest falling subsequence."""
    lengths, firsts = [1] * len(losses), list(range(len(losses)))
    for later in range(len(losses)):
        for earlier in range(later):
            if losses[earlier] > losses[later] and lengths[earlier] + 1 > lengths[later]:
                lengths[later], firsts[later] = lengths[earlier] + 1, firsts[earlier]
    end = max(range(len(losses)), key=lengths.__getitem__)
    return firsts[end], end


def draw(found: Found, own: float, path: Path) -> None:
    """Write a picture of the losses by rate, with the suggestion and the recipe's own rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(7.5, 4.4), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.tick_params(length=0, which="both")
        axes.spines["left"].set_visible(False)
        axes.plot(found.rates, found.losses, color=COLORS["train"], linewidth=1.8)
        fall = slice(found.start, found.end + 1)
        axes.plot(found.rates[fall], found.losses[fall], color=COLORS["train"], linewidth=5, alpha=0.25)
        position = found.start + 2 * (found.end - found.start) // 3
        axes.plot(
            [found.suggestion],
            [found.losses[position]],
            "o",
            color=COLORS["test"],
            markersize=8,
            label=f"suggestion {found.suggestion:.2g}",
        )
        if found.rates[0] <= own <= found.rates[-1]:
            axes.axvline(own, color=SOFT, linewidth=1.0, linestyle="--", label=f"the recipe's {own:g}")
        axes.set_title("training loss, smoothed", loc="left", fontsize=10, pad=8)
        axes.set_xlabel("learning rate", loc="left", fontsize=8.5)
        low, high = min(found.losses), max(found.losses[: found.end + 1])
        axes.set_ylim(low - 0.06 * (high - low), high + 0.5 * (high - low))
        axes.legend(loc="best", frameon=False, fontsize=8.5)
        save(figure, path)
