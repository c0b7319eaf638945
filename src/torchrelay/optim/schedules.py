"""Step 5: learning-rate schedules: the rate as a pure function of the step.

The settings classes become a `Schedule` by `bind`, which tells them the length of the run. Only `Plateau` has state,
because it follows the evaluations. Momentum is never scheduled.

A warm-up scales the schedule's rate. Schedules that span the run (cosine, one_cycle, linear) begin where the warm-up
ends; the milestones of the others (step, multistep) count from the start of the run.
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
    """The length of a run, in steps."""

    epoch: int
    total: int
    warmup: int

    @property
    def rest(self) -> int:
        """Steps after the warm-up, at least one."""
        return max(self.total - self.warmup, 1)


class Schedule:
    """The learning-rate schedule of a run of known length; `bind` of the settings classes returns one.

    Args:
        rate: the learning rate as a function of the step, without the warm-up.
        warmup: steps of linear warm-up.
        warmup_start: fraction of the learning rate at which the warm-up begins.
        descent: the state of a plateau schedule, which follows the evaluations.
    """

    def __init__(self, rate: Rate, warmup: int, warmup_start: float, descent: "_Descent | None" = None) -> None:
        self._rate = rate
        self._warmup = warmup
        self._warmup_start = warmup_start
        self._descent = descent

    def at(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step, counted from 0, for parameters whose configured rate is `base_lr`."""
        if not base_lr:
            return 0.0  # a rate of 0 stays 0 even if the schedule ends at a `final_lr` above it
        lr = self._rate(step, base_lr)
        if step >= self._warmup:
            return lr
        return lr * (self._warmup_start + (1.0 - self._warmup_start) * step / self._warmup)

    def update(self, score: float) -> None:
        """Take the score of an evaluation (higher is better) into account. Only a plateau schedule does."""
        if self._descent is not None:
            self._descent.update(score)

    @property
    def follows_evaluations(self) -> bool:
        """Whether the rate depends on the scores of evaluations."""
        return self._descent is not None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; empty except for a plateau schedule."""
        if self._descent is None:
            return {}
        return {"scale": self._descent.scale, "best": self._descent.best, "waited": self._descent.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        # The state is empty if the run had another schedule and resumes with accepted changes.
        if self._descent is not None and state:
            self._descent.scale, self._descent.best = state["scale"], state["best"]
            self._descent.waited = state["waited"]


class ScheduleBase(Settings):
    """The settings that all schedules have."""

    name: str
    """Which schedule."""
    warmup: StepDuration = Duration("0 steps")
    """Length of the linear warm-up: "5%", "500 steps", "1 epoch"."""
    warmup_start: float = Field(default=0.01, ge=0.0, le=1.0)
    """Fraction of the rate at which the warm-up begins; 0 would waste the first step."""

    @abstractmethod
    def rate(self, span: Span) -> Rate:
        """Return the learning rate as a function of the step, without the warm-up."""

    def bind(self, steps_per_epoch: int, total_steps: int) -> Schedule:
        """Return the schedule of a run of this length."""
        warmup = self._warmup_steps(steps_per_epoch, total_steps)
        return Schedule(self.rate(Span(steps_per_epoch, total_steps, warmup)), warmup, self.warmup_start)

    def _warmup_steps(self, steps_per_epoch: int, total_steps: int) -> int:
        # At least the last step has the full rate, even if a percentage of a very short run rounds up to all of it.
        return min(self.warmup.steps(steps_per_epoch, total_steps), max(total_steps - 1, 0))


class Constant(ScheduleBase):
    """A constant rate."""

    name: Literal["constant"] = "constant"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""

    def rate(self, span: Span) -> Rate:  # noqa: ARG002
        """Return the constant rate."""
        return lambda _step, base_lr: base_lr


class Step(ScheduleBase):
    """The rate is multiplied by `gamma` after every `every` epochs or steps."""

    name: Literal["step"] = "step"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    every: StepDuration = Duration("10 epochs")
    """The interval between two changes."""
    gamma: float = Field(default=0.1, gt=0.0)
    """The factor."""

    @field_validator("every")
    @classmethod
    def _check_every(cls, every: Duration) -> Duration:
        if not every.amount:
            raise ValueError(f"a rate can't hold for '{every}': write at least '1 step'")
        return every

    def rate(self, span: Span) -> Rate:
        """Return a step function."""
        every, gamma = self.every.steps(span.epoch, span.total), self.gamma
        return lambda step, base_lr: base_lr * gamma ** (step // every)


class MultiStep(ScheduleBase):
    """The rate is multiplied by `gamma` at each milestone."""

    name: Literal["multistep"] = "multistep"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    milestones: list[StepDuration] = Field(default_factory=lambda: [Duration("50%"), Duration("75%")])
    """When the rate changes, from the start of the run."""
    gamma: float = Field(default=0.1, gt=0.0)
    """The factor."""

    def rate(self, span: Span) -> Rate:
        """Return a step function."""
        marks, gamma = sorted(mark.steps(span.epoch, span.total) for mark in self.milestones), self.gamma
        return lambda step, base_lr: base_lr * gamma ** bisect_right(marks, step)


class Cosine(ScheduleBase):
    """Half a cosine from the learning rate to the final one (Loshchilov and Hutter, ICLR 2017)."""

    name: Literal["cosine"] = "cosine"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    final_lr: float = Field(default=0.0, ge=0.0)
    """The rate at the end, the same for all parameter groups."""
    per: Literal["step", "epoch"] = "step"
    """When the rate changes; "epoch" gives the rates of CosineAnnealingLR."""

    def rate(self, span: Span) -> Rate:
        """Return half a cosine, or its values at the starts of epochs."""
        unit = span.epoch if self.per == "epoch" else 1
        start, turn, final = span.warmup / unit, math.pi * unit / span.rest, self.final_lr

        def at(step: int, base_lr: float) -> float:
            angle = turn * (step // unit - start)
            return final + (base_lr - final) * (1.0 + math.cos(min(max(angle, 0.0), math.pi))) / 2.0

        return at


class OneCycle(ScheduleBase):
    """Up to the learning rate and down again, each along half a cosine (Smith and Topin, arXiv 1708.07120).

    Rates and names are those of PyTorch's OneCycleLR, which cycles the momentum as well; this doesn't.
    """

    name: Literal["one_cycle"] = "one_cycle"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    pct_start: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Fraction of the run in which the rate rises."""
    div_factor: float = Field(default=25.0, ge=1.0)
    """The first rate is the learning rate divided by this."""
    final_div_factor: float = Field(default=1e4, ge=1.0)
    """The last rate is the first rate divided by this."""

    def rate(self, span: Span) -> Rate:
        """Return two halves of a cosine; the last step has the last rate."""
        first, divisor, final_divisor = span.warmup, self.div_factor, self.final_div_factor
        peak = (
            first + self.pct_start * span.rest - 1.0
        )  # may lie between two steps, neither of which then has the highest rate
        last = first + span.rest - 1

        def at(step: int, base_lr: float) -> float:
            low = base_lr / divisor
            if step < peak:
                done, start, end = max(step - first, 0) / (peak - first), low, base_lr
            else:
                done, start, end = min((step - peak) / (last - peak), 1.0), base_lr, low / final_divisor
            return end + (start - end) * (1.0 + math.cos(math.pi * done)) / 2.0

        return at


class Linear(ScheduleBase):
    """A straight line from the learning rate down to a fraction of it."""

    name: Literal["linear"] = "linear"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    final_fraction: float = Field(default=0.0, ge=0.0)
    """The fraction of the learning rate at the end."""

    def rate(self, span: Span) -> Rate:
        """Return a line that begins where the warm-up ends."""
        start, rest, fall = span.warmup, span.rest, 1.0 - self.final_fraction
        return lambda step, base_lr: base_lr * (1.0 - fall * min(max(step - start, 0) / rest, 1.0))


class Plateau(ScheduleBase):
    """The rate is multiplied by `factor` when the headline metric stops improving.

    The task knows whether a higher or a lower value of its metric is better, so there is no mode to set.
    """

    name: Literal["plateau"] = "plateau"
    """constant, step, multistep, cosine, one_cycle, linear or plateau."""
    factor: float = Field(default=0.1, gt=0.0, lt=1.0)
    """The factor."""
    patience: int = Field(default=3, ge=0)
    """Evaluations without improvement after which the next one lowers the rate."""
    threshold: float = Field(default=0.0, ge=0.0)
    """Only an improvement larger than this counts."""
    min_lr: float = Field(default=0.0, ge=0.0)
    """A lower bound on the rate."""

    def rate(self, span: Span) -> Rate:  # noqa: ARG002
        """Return the rate before any evaluation."""
        return _Descent(self).rate

    def bind(self, steps_per_epoch: int, total_steps: int) -> Schedule:
        """Return the schedule of a run of this length, which follows its evaluations."""
        descent = _Descent(self)
        return Schedule(descent.rate, self._warmup_steps(steps_per_epoch, total_steps), self.warmup_start, descent)


@dataclass
class _Descent:
    """The state of a plateau schedule."""

    settings: Plateau
    scale: float = 1.0
    best: float = -math.inf
    waited: int = 0  # evaluations since the best one or the last change of the rate

    def rate(self, _step: int, base_lr: float) -> float:
        return max(base_lr * self.scale, min(self.settings.min_lr, base_lr))

    def update(self, score: float) -> None:
        if score > self.best + self.settings.threshold:
            self.best, self.waited = score, 0
            return
        self.waited += 1  # NaN is no improvement
        if self.waited > self.settings.patience:
            self.scale, self.waited = self.scale * self.settings.factor, 0


_NAMES = ("constant", "step", "multistep", "cosine", "one_cycle", "linear", "plateau")


def _named(value: Any) -> Any:
    """Accept OneCycle for one_cycle and a missing name; suggest the nearest name for a wrong one."""
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
"""The section `[schedule]` of a recipe; its `name` selects the class."""
