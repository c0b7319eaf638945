"""A worker of a sweep: takes the next job, trains a trial to its next rung, writes down what came of it."""

import errno
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import ModuleType
from typing import Any

import torch

from torchrelay.checkpoint.format import step_of
from torchrelay.checkpoint.retention import complete
from torchrelay.errors import Interrupted, RelayError
from torchrelay.recipe import recipe as recipes
from torchrelay.recipe.build import build_trainer
from torchrelay.report.sweep.journal import Claim, Journal
from torchrelay.report.sweep.plan import Plan, metric_of, rung_steps, with_values
from torchrelay.report.sweep.rungs import Trial
from torchrelay.run.metrics import ASKED, Line, read_metrics
from torchrelay.run.requests import file_of
from torchrelay.run.terminal import Terminal
from torchrelay.train.signals import StopSignal

_MOST_ATTEMPTS = 5  # without a new checkpoint, after which a trial has failed: whoever trains it dies
_FAILED_AT_ONCE = 5  # trials, after which a sweep ends in which none has succeeded
_PAUSE = 0.5  # seconds between two looks for a job
_HOST_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Outcome:
    """How far a trial has come.

    Attributes:
        metric: at its rung.
        stop: step, epoch and seconds of training there.
        epochs: of the whole run.
    """

    metric: float
    stop: dict[str, Any]
    epochs: int


class Worker:
    """Trains the trials of a sweep until there are no more, the time is over, or a signal comes.

    Args:
        folder: the sweep's.
        plan: what it does.
        code: the user's module.
        finished: called with the trials, and the one that has reached a rung or failed, while the folder is held.
        deadline: of `time.monotonic()`, after which the trial in progress is saved and no other begins.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        code: ModuleType | None,
        finished: Callable[[Sequence[Trial], Trial], None],
        deadline: float | None = None,
    ) -> None:
        self.journal, self.halving = Journal(folder, plan), plan.halving
        self._folder, self._plan, self._code = folder, plan, code
        self._finished, self._deadline = finished, deadline

    def run(self) -> str:
        """Work, and return why it ended: "done", "time" or the name of a signal.

        Raises:
            RelayError: the disk is full or can't be written, or the first trials have all failed.
        """
        with StopSignal() as signals:
            while signals.received is None:
                if self._is_late():
                    return "time"
                taken = self._take()
                if taken is None:
                    return "done"
                if isinstance(taken, bool):
                    time.sleep(_PAUSE)
                    continue
                trial, claim = taken
                try:
                    self._train(trial, lambda: signals.received is not None)
                except Interrupted as error:
                    with self.journal.hold():
                        self.journal.put_back(trial.number)
                    if signals.received is not None:
                        return signals.received.name
                    return "time" if self._is_late() else str(error).partition(" after step")[0].split(" by ")[-1]
                finally:
                    claim.release()
            return signals.received.name

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _take(self) -> tuple[Trial, Claim] | bool | None:
        """Take the next job; None if there will be none, False if others may leave one."""
        with self.journal.hold():
            trials = self.journal.trials()
            self._check_any_succeeds(trials)
            are_busy = False
            for job in self.halving.jobs(trials):
                number = job.number
                if number is None:
                    values = self.journal.draw(trials)
                    if values is None:  # of a grid
                        continue
                    number = self.journal.begin(values)
                    trials = self.journal.trials()
                claim = self.journal.claim(number)
                if claim is None:
                    are_busy = True
                    continue
                trial = trials[number]
                if trial.target == job.rung and trial.attempts >= _MOST_ATTEMPTS:
                    self._fail(number, f"whoever trained it ended {trial.attempts} times without a word")
                    claim.release()
                    return False
                self.journal.assign(trial, job.rung, newest_step(self._folder / trial.name))
                return self.journal.trials()[number], claim
            return False if are_busy else None

    def _check_any_succeeds(self, trials: Sequence[Trial]) -> None:
        failed = [each for each in trials if each.state == "failed"]
        if len(failed) >= _FAILED_AT_ONCE and not any(each.reached for each in trials):
            raise RelayError(
                f"the first {len(failed)} trials have all failed; {failed[0].name}: {failed[0].reason}; correct it and "
                "sweep into another folder (--run)"
            )

    def _train(self, trial: Trial, is_stopped: Callable[[], bool]) -> None:
        """Train a trial to its next rung, and write down its metric or why it failed."""
        try:
            with _stopped_at(self._deadline, self._folder / trial.name):
                outcome = train_to_rung(self._plan, trial, self._folder, self._code, is_stopped)
        except Interrupted:
            raise
        except Exception as error:
            if is_of_host(error):
                raise
            text = str(error) if isinstance(error, RelayError) else f"{type(error).__name__}: {error}"
            with self.journal.hold():
                self._fail(trial.number, " ".join(text.split()))
            return
        finally:
            gc.collect()  # a trainer holds itself by its callbacks
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        with self.journal.hold():
            if math.isfinite(outcome.metric):
                self.journal.report(trial.number, trial.target, outcome.metric, outcome.stop)
                trials = self.journal.trials()
                self._finished(trials, trials[trial.number])
            else:
                self._fail(trial.number, f"its {self._plan.split} {self._plan.metric} isn't finite")

    def _fail(self, number: int, reason: str) -> None:
        self.journal.fail(number, reason)
        trials = self.journal.trials()
        self._finished(trials, trials[number])


def train_to_rung(
    plan: Plan, trial: Trial, sweep: Path, code: ModuleType | None, is_stopped: Callable[[], bool] = lambda: False
) -> Outcome:
    """Begin or resume a trial's run, and train it until its next rung, at which it pauses.

    Args:
        plan: of the sweep.
        trial: which has a target.
        sweep: the folder of the sweep.
        code: the user's module.
        is_stopped: whether a signal has come while the data were read.

    Raises:
        Interrupted: a signal came.
        RelayError: the run can't go on.
    """
    folder, record = sweep / trial.name, sweep / trial.name / "recipe.toml"
    # What was "auto" is decided once, so a run that has begun is resumed by its own recipe.
    recipe = recipes.load(str(record)) if record.exists() else with_values(plan, trial.values)
    fresh = not complete(folder / "checkpoints")
    trainer = build_trainer(recipe, folder, code=code, terminal=Terminal(quiet=True), fresh=fresh)
    if is_stopped():
        raise Interrupted("stopped by a signal")
    progress = trainer.state.progress
    bound = rung_steps(trainer, plan.split, plan.rungs, plan.reduction)[trial.target - 1]
    progress.pause_after(bound)
    trainer.fit(resume="auto")
    lines = read_metrics(folder)
    line = _line_at(lines, plan.split, bound)
    trained = [each for each in lines if each["split"] == "train" and each["step"] <= bound]
    seconds = math.fsum(each.get("seconds") or 0.0 for each in trained)
    stop = {"step": line["step"], "epoch": line["epoch"], "seconds": round(seconds, 3), "steps": progress.limit}
    return Outcome(metric_of(plan, line), stop, progress.epochs)


def _line_at(lines: Sequence[Line], split: str, step: int) -> Line:
    """Return the evaluation at a rung, or the last one of a run that was stopped early, by `run.patience`."""
    found = [each for each in lines if each["split"] == split and each["step"] <= step and not each.get(ASKED)]
    if not found:
        raise RelayError(f"nothing was evaluated on the {split} data up to step {step}")
    return found[-1]


@contextmanager
def _stopped_at(deadline: float | None, run: Path) -> Iterator[None]:
    """Ask a run to save and stop when the time is over, as torchrelay ask does."""
    if deadline is None:
        yield
        return
    over = Event()

    def ask() -> None:
        # Again and again: a run that begins forgets what it was asked before.
        while not over.wait(max(0.5, deadline - time.monotonic())):
            if run.is_dir():
                file_of(run, "stop").touch()

    asking = Thread(target=ask, daemon=True)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()
        file_of(run, "stop").unlink(missing_ok=True)


def newest_step(run: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 if there is none."""
    paths = complete(run / "checkpoints")
    return step_of(paths[-1]) if paths else 0


def is_of_host(error: BaseException | None) -> bool:
    """Return whether an error is the host's, not the trial's: a full disk or one that can't be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _HOST_FULL:
            return True
        error = error.__cause__
    return False
