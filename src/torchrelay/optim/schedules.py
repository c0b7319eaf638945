"""Step 5: schedules: the learning rate as a pure function of the step.

A schedule is settings until `bind` tells it how long the run is; what that returns is asked at each step. Only
`Plateau` has a state, since it follows the evaluations. Momentum is never scheduled.

A warm-up multiplies what the schedule says. What spans the run (cosine, one_cycle, linear) begins where the warm-up
ends; what happens at a time of its own (step, multistep) counts from the run's start.
"""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from torchrelay.duration import Duration, StepDuration
from torchrelay.errors import nearest
from torchrelay.settings import Settings

Rate = Callable[[int, float], float]  # (step, base_lr) -> the learning rate of that step


@dataclass(frozen=True)
class Span:
    """How long a run is, in steps."""

    epoch: int
    total: int
    warmup: int

    @property
    def rest(self) -> int:
        """Steps after the warm-up, at least one."""
        return max(self.total - self.warmup, 1)


class Schedule:
    """A schedule that knows how long the run is; `Cosine(...).bind(...)` and its like make one.

    Args:
        rate: the learning rate by step, without the warm-up.
        warmup: steps of linear warm-up.
        warmup_start: share of the learning rate with which the warm-up begins.
        descent: what follows the evaluations, if anything does.
    """

    def __init__(self, rate: Rate, warmup: int, warmup_start: float, descent: "_Descent | None" = None) -> None:
        self._rate = rate
        self._warmup = warmup
        self._warmup_start = warmup_start
        self._descent = descent

    def at(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step, counted from 0, of parameters whose learning rate is set to `base_lr`."""
        if not base_lr:
            return 0.0  # what is held fixed stays so, whatever rate a schedule ends at
        lr = self._rate(step, base_lr)
        if step >= self._warmup:
            return lr
        return lr * (self._warmup_start + (1.0 - self._warmup_start) * step / self._warmup)

    def update(self, score: float) -> None:
        """Take note of an evaluation's score, of which higher is better. Only a plateau schedule does."""
        if self._descent is not None:
            self._descent.update(score)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep: nothing, but of a plateau schedule."""
        if self._descent is None:
            return {}
        return {"scale": self._descent.scale, "best": self._descent.best, "waited": self._descent.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if self._descent is not None and state:  # a run may have had another schedule before, and accept the change
            self._descent.scale, self._descent.best = state["scale"], state["best"]
            self._descent.waited = state["waited"]


class _Base(Settings):
    """What all schedules have in common."""

    name: str
    """Which schedule."""
    warmup: StepDuration = Duration("0 steps")
    """How long the rate rises linearly at the start: "5%", "500 steps", "1 epoch"."""
    warmup_start: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of the rate with which the warm-up begins; 0 would waste the first step."""

    @abstractmethod
    def rate(self, span: Span) -> Rate:
        """Return the learning rate as a function of the step, without the warm-up."""

    def bind(self, steps_per_epoch: int, total_steps: int) -> Schedule:
        """Return the schedule of a run of this length."""
        warmup = self._warmup_steps(steps_per_epoch, total_steps)
        return Schedule(self.rate(Span(steps_per_epoch, total_steps, warmup)), warmup, self.warmup_start)

    def _warmup_steps(self, steps_per_epoch: int, total_steps: int) -> int:
        # The last step has the full rate: a share of a very short run, rounded up, must not be all of it.
        return min(self.warmup.steps(steps_per_epoch, total_steps), max(total_steps - 1, 0))


class Constant(_Base):
    """The same rate throughout."""

    name: Literal["constant"] = "constant"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""

    def rate(self, span: Span) -> Rate:  # noqa: ARG002
        """Return the rate as it is."""
        return lambda _step, base_lr: base_lr


class Step(_Base):
    """A factor each so many epochs or steps."""

    name: Literal["step"] = "step"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    every: StepDuration = Duration("10 epochs")
    """How long a rate holds."""
    gamma: float = Field(default=0.1, gt=0.0)
    """The factor."""

    @field_validator("every")
    @classmethod
    def _check_every(cls, every: Duration) -> Duration:
        if not every.amount:
            raise ValueError(f"a rate can't hold for '{every}': write at least '1 step'")
        return every

    def rate(self, span: Span) -> Rate:
        """Return a staircase."""
        every, gamma = self.every.steps(span.epoch, span.total), self.gamma
        return lambda step, base_lr: base_lr * gamma ** (step // every)


class MultiStep(_Base):
    """A factor at each milestone."""

    name: Literal["multistep"] = "multistep"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    milestones: list[StepDuration] = Field(default_factory=lambda: [Duration("50%"), Duration("75%")])
    """When the rate changes, from the start of the run."""
    gamma: float = Field(default=0.1, gt=0.0)
    """The factor."""

    def rate(self, span: Span) -> Rate:
        """Return a staircase of uneven steps."""
        marks, gamma = sorted(mark.steps(span.epoch, span.total) for mark in self.milestones), self.gamma
        return lambda step, base_lr: base_lr * gamma ** bisect_right(marks, step)


class Cosine(_Base):
    """Half a cosine from the learning rate to the final one (Loshchilov and Hutter, ICLR 2017)."""

    name: Literal["cosine"] = "cosine"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    final_lr: float = Field(default=0.0, ge=0.0)
    """The rate at the end, the same of all parameter groups."""
    per: Literal["step", "epoch"] = "step"
    """How often the rate changes; by epoch it is CosineAnnealingLR's."""

    def rate(self, span: Span) -> Rate:
        """Return half a cosine, or a staircase along it."""
        unit = span.epoch if self.per == "epoch" else 1
        start, turn, final = span.warmup / unit, math.pi * unit / span.rest, self.final_lr

        def at(step: int, base_lr: float) -> float:
            angle = turn * (step // unit - start)
            return final + (base_lr - final) * (1.0 + math.cos(min(max(angle, 0.0), math.pi))) / 2.0

        return at


class OneCycle(_Base):
    """Up to the learning rate and down again, both along half a cosine (Smith and Topin, arXiv 1708.07120).

    The rates and the names are those of PyTorch's OneCycleLR. It cycles the momentum as well, which this doesn't.
    """

    name: Literal["one_cycle"] = "one_cycle"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    pct_start: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Share of the run in which the rate rises."""
    div_factor: float = Field(default=25.0, ge=1.0)
    """The learning rate, divided by this, is the first one."""
    final_div_factor: float = Field(default=1e4, ge=1.0)
    """The first one, divided by this, is the last one."""

    def rate(self, span: Span) -> Rate:
        """Return two halves of a cosine; the last step has the last rate."""
        first, divisor, final_divisor = span.warmup, self.div_factor, self.final_div_factor
        peak = first + self.pct_start * span.rest - 1.0  # between two steps: the highest rate need not be met
        last = first + span.rest - 1

        def at(step: int, base_lr: float) -> float:
            low = base_lr / divisor
            if step < peak:
                done, start, end = max(step - first, 0) / (peak - first), low, base_lr
            else:
                done, start, end = min((step - peak) / (last - peak), 1.0), base_lr, low / final_divisor
            return end + (start - end) * (1.0 + math.cos(math.pi * done)) / 2.0

        return at


class Linear(_Base):
    """A straight line from the learning rate down to a share of it."""

    name: Literal["linear"] = "linear"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    final_fraction: float = Field(default=0.0, ge=0.0)
    """The share of the rate that is left at the end."""

    def rate(self, span: Span) -> Rate:
        """Return a line that begins where the warm-up ends."""
        start, rest, fall = span.warmup, span.rest, 1.0 - self.final_fraction
        return lambda step, base_lr: base_lr * (1.0 - fall * min(max(step - start, 0) / rest, 1.0))


class Plateau(_Base):
    """A factor whenever the task's headline metric hasn't improved for some evaluations.

    The task knows whether its metric is better higher or lower, so that there is no mode to set.
    """

    name: Literal["plateau"] = "plateau"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    factor: float = Field(default=0.1, gt=0.0, lt=1.0)
    """The factor."""
    patience: int = Field(default=3, ge=0)
    """Evaluations without improvement that are let pass."""
    threshold: float = Field(default=0.0, ge=0.0)
    """An improvement counts if it is larger than this."""
    min_lr: float = Field(default=0.0, ge=0.0)
    """The rate isn't brought below this."""

    def rate(self, span: Span) -> Rate:  # noqa: ARG002
        """Return the rate before any evaluation."""
        return _Descent(self).rate

    def bind(self, steps_per_epoch: int, total_steps: int) -> Schedule:
        """Return the schedule of a run of this length, which follows its evaluations."""
        descent = _Descent(self)
        return Schedule(descent.rate, self._warmup_steps(steps_per_epoch, total_steps), self.warmup_start, descent)


@dataclass
class _Descent:
    """What a plateau schedule has seen so far."""

    settings: Plateau
    scale: float = 1.0
    best: float = -math.inf
    waited: int = 0  # evaluations since the best one, or since the rate fell

    def rate(self, _step: int, base_lr: float) -> float:
        return max(base_lr * self.scale, min(self.settings.min_lr, base_lr))

    def update(self, score: float) -> None:
        if score > self.best + self.settings.threshold:
            self.best, self.waited = score, 0
            return
        self.waited += 1  # a score that is no number counts as no improvement
        if self.waited > self.settings.patience:
            self.scale, self.waited = self.scale * self.settings.factor, 0


_NAMES = ("constant", "step", "multistep", "cosine", "one_cycle", "linear", "plateau")


def _named(value: Any) -> Any:
    """Let people write OneCycle for one_cycle, leave the name out, and hear which name is nearest to a wrong one."""
    if not isinstance(value, dict):
        return value
    name = str(value.get("name", "constant"))
    by_class_name = {known.replace("_", ""): known for known in _NAMES}
    found = by_class_name.get(name.lower().replace("_", ""))
    if found is None:
        raise ValueError(
            f"there is no schedule '{name}'{nearest(name.lower(), _NAMES) or ': use ' + ', '.join(_NAMES)}"
        )
    return {**value, "name": found}


ScheduleSettings = Annotated[
    Constant | Step | MultiStep | Cosine | OneCycle | Linear | Plateau,
    Field(discriminator="name"),
    BeforeValidator(_named),
]
"""A recipe's section `[schedule]`: its `name` says which."""
