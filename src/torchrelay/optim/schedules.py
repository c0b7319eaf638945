"""Step 5: schedules: the learning rate as a pure function of the step.

A schedule is settings until `bind` tells it how long the run is; what that returns is asked at each step. Only
`Plateau` has a state, since it follows the evaluations.
"""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from torchrelay.duration import StepDuration
from torchrelay.settings import Settings

Rate = Callable[[int, float], float]  # (step, base_lr) -> the learning rate of that step


class Schedule:
    """A schedule that knows how long the run is.

    Args:
        rate: the learning rate after the warm-up.
        warmup: steps of linear warm-up.
        start: share of the learning rate with which the warm-up begins.
        plateau: what follows the evaluations, if anything.
    """

    def __init__(self, rate: Rate, warmup: int, start: float, plateau: "_Descent | None" = None) -> None:
        self._rate = rate
        self._warmup = warmup
        self._start = start
        self._plateau = plateau

    def at(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step, counted from 0."""
        lr = self._rate(step, base_lr)
        if step < self._warmup:
            lr *= self._start + (1.0 - self._start) * step / self._warmup
        return lr

    def update(self, score: float) -> None:
        """Tell an evaluation's score, of which higher is better."""
        if self._plateau is not None:
            self._plateau.update(score)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        return {} if self._plateau is None else dict(vars(self._plateau.state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if self._plateau is not None:
            self._plateau.state = _DescentState(**state)


class _Base(Settings):
    warmup: StepDuration = StepDuration("0 steps")
    """How long the rate rises linearly at the start: "5%", "500 steps", "1 epoch"."""
    warmup_start: float = Field(default=0.0, ge=0.0, le=1.0)
    """With which share of the rate the warm-up begins."""

    @abstractmethod
    def rate(self, steps_per_epoch: int, total_steps: int) -> Rate:
        """Return the learning rate as a function of the step, without the warm-up."""

    def bind(self, steps_per_epoch: int, total_steps: int) -> Schedule:
        """Return the schedule of a run of this length."""
        warmup = self.warmup.steps(steps_per_epoch, total_steps)
        return Schedule(self.rate(steps_per_epoch, total_steps), warmup, self.warmup_start)


class Constant(_Base):
    """The same rate throughout."""

    name: Literal["constant"] = "constant"

    def rate(self, steps_per_epoch: int, total_steps: int) -> Rate:  # noqa: ARG002
        """Return the rate as it is."""
        return lambda _step, base_lr: base_lr


class Step(_Base):
    """A factor each so many steps."""

    name: Literal["step"] = "step"
    every: StepDuration = StepDuration("10 epochs")
    """How long a rate holds."""
    gamma: float = Field(default=0.1, gt=0.0)
    """By which the rate is multiplied then."""

    def rate(self, steps_per_epoch: int, total_steps: int) -> Rate:
        """Return a staircase."""
        every = max(1, self.every.steps(steps_per_epoch, total_steps))
        return lambda step, base_lr: base_lr * self.gamma ** (step // every)


class MultiStep(_Base):
    """A factor at each milestone."""

    name: Literal["multistep"] = "multistep"
    milestones: list[StepDuration] = Field(default=[StepDuration("50%"), StepDuration("75%")])
    """When the rate changes."""
    gamma: float = Field(default=0.1, gt=0.0)
    """By which the rate is multiplied then."""

    def rate(self, steps_per_epoch: int, total_steps: int) -> Rate:
        """Return a staircase of uneven steps."""
        marks = sorted(mark.steps(steps_per_epoch, total_steps) for mark in self.milestones)
        return lambda step, base_lr: base_lr * self.gamma ** bisect_right(marks, step)


class Cosine(_Base):
    """Half a cosine from the learning rate to the final one (Loshchilov and Hutter, ICLR 2017)."""

    name: Literal["cosine"] = "cosine"
    final_lr: float = Field(default=0.0, ge=0.0)
    """The rate at the end."""
    per: Literal["step", "epoch"] = "step"
    """How often the rate changes."""

    def rate(self, steps_per_epoch: int, total_steps: int) -> Rate:
        """Return half a cosine, or a staircase along it."""
        unit = steps_per_epoch if self.per == "epoch" else 1
        end = max(1, total_steps // unit)

        def at(step: int, base_lr: float) -> float:
            return self.final_lr + (base_lr - self.final_lr) * (1 + math.cos(math.pi * (step // unit) / end)) / 2

        return at


class OneCycle(_Base):
    """Up to the learning rate and down again, both along half a cosine (Smith and Topin, 2018, as PyTorch has it).

    Momentum stays as it is: it may differ between parameter groups, and gains from cycling it are small.
    """

    name: Literal["one_cycle"] = "one_cycle"
    rise: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of the run in which the rate rises."""
    start_divisor: float = Field(default=25.0, ge=1.0)
    """By which the learning rate is divided at the start."""
    end_divisor: float = Field(default=1e4, ge=1.0)
    """By which the rate of the start is divided at the end."""

    def rate(self, steps_per_epoch: int, total_steps: int) -> Rate:  # noqa: ARG002
        """Return two halves of a cosine."""
        last = max(total_steps - 1, 1)
        peak = self.rise * total_steps - 1

        def at(step: int, base_lr: float) -> float:
            start = base_lr / self.start_divisor
            end = start / self.end_divisor
            if step < peak:
                return base_lr + (start - base_lr) * (1 + math.cos(math.pi * step / peak)) / 2
            return end + (base_lr - end) * (1 + math.cos(math.pi * (step - peak) / (last - peak))) / 2

        return at


class Linear(_Base):
    """A straight line from the learning rate to the final one."""

    name: Literal["linear"] = "linear"
    final_lr: float = Field(default=0.0, ge=0.0)
    """The rate at the end."""

    def rate(self, steps_per_epoch: int, total_steps: int) -> Rate:
        """Return a line that begins where the warm-up ends."""
        start = self.warmup.steps(steps_per_epoch, total_steps)
        length = max(total_steps - start, 1)
        return lambda step, base_lr: base_lr + (self.final_lr - base_lr) * max(step - start, 0) / length


class Plateau(_Base):
    """A factor whenever the headline metric has not improved for some evaluations."""

    name: Literal["plateau"] = "plateau"
    factor: float = Field(default=0.1, gt=0.0, lt=1.0)
    """By which the rate is multiplied then."""
    patience: int = Field(default=3, ge=0)
    """Evaluations without improvement that are let pass."""
    least: float = Field(default=0.0, ge=0.0)
    """An improvement counts if it is larger than this."""
    lowest_lr: float = Field(default=0.0, ge=0.0)
    """The rate never falls below this."""

    def rate(self, steps_per_epoch: int, total_steps: int) -> Rate:  # noqa: ARG002
        """Return the rate before any evaluation."""
        return lambda _step, base_lr: base_lr

    def bind(self, steps_per_epoch: int, total_steps: int) -> Schedule:
        """Return the schedule of a run, which follows its evaluations."""
        descent = _Descent(self)
        warmup = self.warmup.steps(steps_per_epoch, total_steps)
        return Schedule(descent.rate, warmup, self.warmup_start, descent)


class _DescentState:
    def __init__(self, scale: float = 1.0, best: float | None = None, waited: int = 0) -> None:
        self.scale = scale
        self.best = best
        self.waited = waited


class _Descent:
    """What a plateau schedule has seen so far."""

    def __init__(self, settings: Plateau) -> None:
        self.settings = settings
        self.state = _DescentState()

    def rate(self, _step: int, base_lr: float) -> float:
        return max(base_lr * self.state.scale, self.settings.lowest_lr)

    def update(self, score: float) -> None:
        state = self.state
        if state.best is None or score > state.best + self.settings.least:
            state.best, state.waited = score, 0
            return
        state.waited += 1
        if state.waited > self.settings.patience:
            state.scale, state.waited = state.scale * self.settings.factor, 0


ScheduleSettings = Annotated[
    Constant | Step | MultiStep | Cosine | OneCycle | Linear | Plateau, Field(discriminator="name")
]
