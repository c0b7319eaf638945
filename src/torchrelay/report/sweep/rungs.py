"""Which trial is trained next, and how far: asynchronous successive halving, whose trials go on where they paused.

ASHA (Li et al., MLSys 2020, algorithm 2): of the trials that have reached a rung, the best 1/reduction are promoted to
the next one, as soon as they are known; where none can be, a new trial begins. These are functions of what is known, so
that a sweep which was stopped goes on as one that wasn't.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torchrelay.report.sweep.space import Value

State = Literal["open", "done", "failed"]


@dataclass(frozen=True)
class Trial:
    """What is known of a trial.

    Attributes:
        number: counted from 0.
        values: of what is varied, by key.
        state: "open": it may be trained on; "done": it was trained to its end; "failed".
        reached: its metric at each rung that it has reached, by the rung's number, counted from 1.
        target: the rung that it has been told to reach, whether it has or not.
        attempts: how often somebody has begun to train it to this rung, from the same checkpoint.
        begun_at: the step of that checkpoint.
        reason: why it failed.
        stops: of each rung that it has reached: step, epoch, and seconds of training.
    """

    number: int
    values: Mapping[str, Value]
    state: State = "open"
    reached: Mapping[int, float] = field(default_factory=dict)
    target: int = 1
    attempts: int = 0
    begun_at: int = 0
    reason: str = ""
    stops: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def rung(self) -> int:
        """The last rung that it has reached; 0 if none."""
        return max(self.reached, default=0)

    @property
    def metric(self) -> float:
        """Its metric at its last rung; NaN if there is none."""
        return self.reached[self.rung] if self.reached else math.nan

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"trial-{self.number:03d}"


@dataclass(frozen=True)
class Job:
    """A trial to train, and the rung to train it to; number None: a new trial."""

    number: int | None
    rung: int


@dataclass(frozen=True)
class Halving:
    """How a sweep promotes trials.

    Attributes:
        rungs: how many there are; the last one is the whole run. With one, each trial is trained in full.
        reduction: of so many trials at a rung, one is promoted.
        maximize: whether more of the metric is better.
        most: how many trials there may be; None: any number.
    """

    rungs: int
    reduction: int
    maximize: bool
    most: int | None = None

    def jobs(self, trials: Sequence[Trial]) -> Iterator[Job]:
        """Yield what can be done, the best first; a job that somebody else is doing is among them.

        Args:
            trials: by number.
        """
        for each in trials:
            if each.state == "open" and each.target > each.rung:
                yield Job(each.number, each.target)
        promoted = False
        for rung in range(self.rungs - 1, 0, -1):
            for each in self.promotable(trials, rung):
                promoted = True
                yield Job(each.number, rung + 1)
        if self.most is None or len(trials) < self.most:
            yield Job(None, 1)
        elif not promoted and all(each.state != "open" or each.target == each.rung for each in trials):
            yield from self._last(trials)

    def promotable(self, trials: Sequence[Trial], rung: int) -> list[Trial]:
        """Return the trials that may go on from a rung, the best first."""
        # One that failed on its way to a rung is the worst there.
        here = [each for each in trials if each.rung >= rung or (each.state == "failed" and each.target >= rung)]
        known = sorted((each for each in here if rung in each.reached), key=lambda each: self._order(each, rung))
        best = known[: len(here) // self.reduction]
        return [each for each in best if each.state == "open" and each.rung == each.target == rung]

    def _last(self, trials: Sequence[Trial]) -> Iterator[Job]:
        """Yield the best trial if too few of them were trained for one to be trained in full."""
        if any(each.state == "done" for each in trials):
            return
        best = self.best([each for each in trials if each.state == "open"])
        if best is not None:
            yield Job(best.number, best.rung + 1)

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """Return the best of the trials that were trained longest; None if none has reached a rung."""
        known = [each for each in trials if each.reached and each.state != "failed"]
        highest = max((each.rung for each in known), default=0)
        at_top = [each for each in known if each.rung == highest]
        return min(at_top, key=lambda each: self._order(each, highest), default=None)

    def _order(self, trial: Trial, rung: int) -> tuple[float, int]:
        metric = trial.reached[rung]
        return (-metric if self.maximize else metric), trial.number


def stops(evaluations: int, rungs: int, reduction: int) -> list[int]:
    """Return after how many of a run's evaluations each rung is reached: 1, 3, 9 of 9.

    The numbers of a short run repeat: a trial then is at both rungs.
    """
    return [max(1, round(evaluations / reduction ** (rungs - rung))) for rung in range(1, rungs + 1)]
