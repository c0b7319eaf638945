"""Step 7: what is tried before the first step, when to evaluate, which evaluation is best, and what people are told."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.duration import seconds_of, steps_between
from torchrelay.errors import RelayError, UsageError
from torchrelay.optim.schedules import Schedule
from torchrelay.run.metrics import ASKED
from torchrelay.run.settings import RunSettings
from torchrelay.tasks.task import Task
from torchrelay.train import hints
from torchrelay.train.callbacks import Callback, EarlyStopping, Training, notify
from torchrelay.train.evaluation import Evaluation, Evaluator, score
from torchrelay.train.logs import epoch_text, step_text
from torchrelay.train.self_check import self_check
from torchrelay.train.session import Session

Found = dict[str, dict[str, float]]  # metrics by the part of the data


class Judge:
    """Evaluates when it is due, keeps the best, and records and tells what was found.

    Args:
        evaluator: evaluates the parts of the data.
        task: whose headline metric decides.
        settings: how often to evaluate.
        schedule: which may follow the metric.
        session: the run's, which writes the lines.

    Raises:
        UsageError: evaluations are due by the clock, and what is computed would follow them.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        task: Task,
        settings: RunSettings,
        schedule: Schedule,
        session: Session,
    ) -> None:
        self._evaluator, self._progress, self._task = evaluator, session.state.progress, task
        self._schedule, self._session, every = schedule, session, settings.evaluate_every
        steps = steps_between(every, self._progress.steps_per_epoch, self._progress.total_steps, "epochs")
        self._steps, self._by_clock = steps, not steps and bool(evaluator.parts)
        self._seconds = seconds_of(every)
        stops = any(isinstance(callback, EarlyStopping) for callback in session.state.callbacks)
        if self._by_clock and (schedule.follows_evaluations or stops):
            raise UsageError(
                f"run.evaluate_every is '{every}', and a plateau schedule or early stopping follows them, so the "
                "clock would decide what is computed: give epochs or steps"
            )
        self._evaluated_at, self._recorded_step = time.monotonic(), -1
        self._unchecked, self._exact = True, settings.exact

    def rehearse(self) -> None:
        """Evaluate a task of the user's on a batch or two, so that a mistake shows before an epoch is trained.

        Raises:
            UsageError: the headline metric isn't among what was measured.
        """
        if type(self._task).__module__.startswith("torchrelay."):
            return
        self._try_loss(self._session.state.batches)
        if not self._evaluator.parts:
            return
        evaluation = self._evaluator.evaluate(self._evaluator.selects_on, rounds=1)
        if evaluation is not None and self._task.headline not in evaluation.values:
            raise UsageError(
                f"{type(self._task).__name__}.headline is '{self._task.headline}', and an evaluation measures "
                f"{', '.join(evaluation.values)}: choose one of them, or return it from measure() or metrics()"
            )

    def _try_loss(self, batches: Batches) -> None:
        """Compare the loss of a batch with that of its halves, and say what is wrong with it."""
        is_default = type(self._task).compute is Task.compute
        part = self._evaluator.parts.get(self._evaluator.selects_on, batches)
        if self._evaluator.collective_forward or part.stream is not None or (batches.replicas == 1 and not is_default):
            return
        batch = next(part.epoch(), None)
        if batch is None:
            return
        try:
            hint = hints.of_parts(self._task, self._evaluator.loss, batch, batches.replicas)
        except Exception:  # noqa: BLE001 - the evaluation or the first step names it, with its sample
            return
        if hint is not None:
            self._session.say(hint)

    def checked(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Return batches; before the first one of a session, its gradients are checked: see `self_check`.

        Raises:
            RelayError: the gradients of an exact run can't be trusted.
        """
        first = next(batches, None) if self._unchecked else None
        if first is None:
            return batches
        self._unchecked = False
        try:
            note = self_check(self._session.state.train_step, first, self._progress.step, exact=self._exact)
            if self._session.run is not None:
                self._session.run.note(note)
        except RelayError as error:
            if self._exact:
                raise
            self._session.say(f"warning: {error}")
        return chain([first], batches)

    def is_due(self) -> bool:
        """Return whether an evaluation is due after this step; all processes ask at the same time."""
        if not self._evaluator.parts:
            return False
        if self._by_clock:
            return self._session.asks.agree_on(time.monotonic() - self._evaluated_at >= self._seconds)
        return self._progress.step % self._steps == 0

    def within_epoch(self, trainer: Training, callbacks: Sequence[Callback]) -> bool:
        """Evaluate after a step inside an epoch, and return whether it is the best so far."""
        progress = self._progress
        epoch = progress.epochs_done + 1
        with progress.stopwatch.paused():
            found = self.evaluate(self._evaluator.parts)
        if progress.interrupted:
            return False
        self._recorded_step = progress.step
        self._record(trainer, callbacks, found)
        self._session.say(step_text(progress.step, self._task, found))
        return self._is_best(found.get(self._evaluator.selects_on), epoch)

    def at_epoch_end(self, trainer: Training, callbacks: Sequence[Callback], lr: float) -> bool | None:
        """Evaluate where it is due, record and tell; return whether it is the best so far, None if a signal came."""
        progress, epoch = self._progress, self._progress.epochs_done + 1
        train, times, now = progress.sums.means(), progress.stopwatch.lap(), {"time": round(time.time(), 3)}
        if progress.ends and self._session.run is not None:
            self._session.run.plots.prepare()  # meanwhile, and not when the run has ended
        due = (progress.ends or self.is_due()) and self._recorded_step != progress.step
        found = self.evaluate(self._evaluator.parts) if due else {}
        if progress.interrupted:  # nothing is recorded, since a resume repeats the evaluation
            return None
        self._session.record_line("train", {**train, "lr": lr, **times, **now})
        self._record(trainer, callbacks, found)
        chosen = found.get(self._evaluator.selects_on) or (None if self._evaluator.parts else train)
        improved = self._is_best(chosen, epoch)
        self._session.say(epoch_text(self._session.state, self._task, epoch, {"train": train, **found}, times))
        notify(callbacks, "on_epoch", trainer, epoch, train)
        return improved

    def serve(self) -> None:
        """Do what people have asked for, between two steps; nothing that is trained or kept follows from it."""
        session, progress = self._session, self._progress
        if "evaluate" in session.asks.wanted:
            self._evaluate_aside()
        if "save" in session.asks.wanted and not progress.interrupted:
            session.save_as_asked()

    def _evaluate_aside(self) -> None:
        """Evaluate, record and tell, as if nobody had: no best, no score of a checkpoint, no callback."""
        session, progress, evaluator = self._session, self._progress, self._evaluator
        before = progress.evaluated_at, self._evaluated_at, evaluator.last, evaluator.samples
        with progress.stopwatch.paused():
            found = self.evaluate(evaluator.parts)
        progress.evaluated_at, self._evaluated_at, evaluator.last, evaluator.samples = before
        if progress.interrupted:
            return
        for split, values in found.items():
            session.record_line(split, {**values, ASKED: True})
        session.say(step_text(progress.step, self._task, found) if found else "asked to evaluate, but there is no data")
        session.asks.done("evaluate")
        session.asks.tell("evaluate")

    def _record(self, trainer: Training, callbacks: Sequence[Callback], found: Found) -> None:
        for split, values in found.items():
            notify(callbacks, "on_evaluate", trainer, split, values)  # which may add values
            self._session.record_line(split, values)

    def _is_best(self, values: dict[str, float] | None, epoch: int) -> bool:
        if values is None or (value := score(self._task, values)) is None:
            return False
        self._schedule.update(value)
        task = self._task
        return self._progress.is_best(values[task.headline], epoch, higher_is_better=task.higher_is_better)

    def evaluate(self, splits: Iterable[str]) -> Found:
        """Return the metrics of parts of the data; none, and `progress.interrupted` is set, if a signal came."""
        before, found = self._progress.evaluated_at, Found()
        self._progress.phase = "evaluating"
        for split in splits:
            evaluation = self._evaluator.evaluate(split, self._session.asks.is_interrupted)
            if evaluation is None:
                self._progress.evaluated_at = before  # a resume evaluates all parts
                return {}
            found[split] = evaluation.values
            self.keep(split, evaluation)
        self._progress.phase, self._evaluated_at = "", time.monotonic()
        return found

    def keep(self, split: str, evaluation: Evaluation) -> None:
        """Keep the metrics by which models are selected for a checkpoint after this very step."""
        if split == self._evaluator.selects_on:
            self._progress.evaluated(evaluation.values, score(self._task, evaluation.values))
