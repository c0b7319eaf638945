"""Step 7: the trainer: the seven steps in their order, and the loop.

`Trainer.fit` in words::

    open the run's folder, and restore the newest checkpoint if the run is resumed
    for each epoch:
        for each global batch, from where the run stands:
            take a step: loss and gradients of every replica, added in a fixed tree; update the weights
            call the callbacks; save, stop, where it is due
        evaluate, keep the best, save
        after a loss spike, roll back to the checkpoint before it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Never, Unpack

from torch import Tensor, nn

from torchrelay.data.batch import Batch
from torchrelay.optim.update import check_unfrozen, left_out
from torchrelay.train import arguments, assemble
from torchrelay.train.callbacks import notify, step_hooks
from torchrelay.train.evaluation import Evaluation
from torchrelay.train.judge import Judge
from torchrelay.train.logs import EarlyLog, StepLog, best_text, counters, introduction, unit
from torchrelay.train.parts import Parts
from torchrelay.train.session import Session
from torchrelay.train.spikes import Spike
from torchrelay.train.step import StepResult


class Trainer(Parts):
    """Trains a model: the seven steps in their order.

    Args:
        model: any module; its initial weights are the caller's.
        train: training data: a source of `torchrelay.data`, a Dataset, a pair (inputs, targets), a dict of
            equally long tensors, a list of samples, or a DataLoader of one of these.
        test: test data, likewise; each sample is evaluated once.
        validation: data by which "best" and early stopping go instead of the test data.
        task: what a batch means; classification if not given.
        loss: another name of `task`; both take a task, or a loss of PyTorch's such as `nn.CrossEntropyLoss()`.
        optimizer: settings such as `optim.SGD(lr=0.1)`, a torch optimizer or its class, a name, or any function from a
            model to a torch optimizer.
        schedule: how the learning rate changes by step, such as `optim.Cosine()`; or a function from the step to the
            factor of the rate.
        epochs: passes over the training data; short for `settings.epochs`.
        steps: optimizer steps, in place of epochs; short for `settings.steps`.
        seed: of all randomness; short for `settings.seed`.
        run: the run's folder; without one nothing is written and nothing can be resumed.
        settings: seed, exactness, intervals, patience.
        device: a name such as "cuda:1", a torch.device, `DeviceSettings`, or a device that is set up.
        parallel: into how many replicas a global batch is divided, and how devices share them.
        ema: decay of an exponential average of the weights, which is evaluated in their place; 0: none.
        clip_norm: the largest norm of the gradient; the optimizer settings' if not given.
        checkpoint: when to save and what to keep.
        callbacks: called around each step and epoch.
        terminal: where people read along.
        record: what goes into recipe.toml, if the trainer was built from a recipe.
        notes: what was said before, for the run's log.
        data: batch_size, augment, prepare, normalize, sampling, drop_last and workers; see `BatchOptions`.

    Raises:
        UsageError: an argument is wrong; nothing was started.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        test: Any = None,
        *,
        validation: Any = None,
        task: arguments.TaskLike | None = None,
        loss: arguments.TaskLike | None = None,
        optimizer: arguments.OptimizersLike | None = None,
        schedule: arguments.ScheduleLike | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        run: str | Path | None = None,
        settings: arguments.RunSettings | None = None,
        device: arguments.DeviceLike = "auto",
        parallel: arguments.ParallelSettings | None = None,
        ema: float = 0.0,
        clip_norm: float | None = None,
        checkpoint: arguments.CheckpointSettings | None = None,
        callbacks: arguments.CallbacksLike = (),
        terminal: arguments.Terminal | None = None,
        record: dict[str, Any] | None = None,
        notes: Sequence[str] = (),
        **data: Unpack[arguments.BatchOptions],
    ) -> None:
        # 1. Prepare
        self.model, self.settings = model, assemble.run_settings(settings, epochs, steps, seed)
        # 4. Device: before the data, which is augmented on it
        where, parallel = assemble.prepare_device(device, parallel, self.settings, run)
        log, dtype = EarlyLog(terminal or arguments.Terminal(), notes, where[1].main), assemble.dtype_of(model)
        # 2. Data
        self.batches, evaluated = assemble.make_batches(train, validation, test, data, where, self.settings, dtype)
        # 6. Loss: before the model, which may be timed with it, and the optimizers, as a task may have several
        self.task = assemble.prepare_task(task, loss, self.batches, evaluated, log)
        # 3. Model
        self.strategy = assemble.make_strategy(
            model, self.task, self.batches, evaluated, parallel, where, self.settings.exact, self._dummy_loss, log.say
        )
        # 5. Optimizer and schedule
        updates = assemble.make_updates(optimizer, schedule, clip_norm, ema, self.strategy, self.task)
        # 7. Train and test: the parts that the loop calls
        record = assemble.full_record(record, parallel, self.settings, self.batches, self.strategy, self.task)
        self.progress, self.train_step, self.evaluator, self.callbacks, self.state = assemble.join_parts(
            self.strategy, self.task, updates, self.batches, evaluated, self.settings, callbacks, record, self._settle
        )
        self.session = Session(self.state, self.settings, run, checkpoint, log, record)
        self._hooks, self._left_out = step_hooks(self.callbacks), left_out(model, self.train_step.updates)
        self.judge = Judge(self.evaluator, self.task, self.settings, self.train_step.schedule, self.session)

    def _dummy_loss(self) -> Tensor:
        return assemble.dummy_loss(self.strategy, self.task, self.batches)

    def _settle(self, *, trained: bool = False) -> None:
        if self.session.checkpoints is not None:
            self.session.checkpoints.settle(trained=trained)
        if trained and self._hooks["on_gradients"]:
            notify(self._hooks["on_gradients"], "on_gradients", self)

    # ------------------------------------------------------------------------------------------------ the loop

    def fit(
        self, *data: Never, resume: bool | Literal["auto"] = False, accept_changes: bool = False, **others: Never
    ) -> dict[str, float]:
        """Train until the end and return the last evaluation's metrics.

        Args:
            data: none; the constructor has it, and whatever `others` could be.
            resume: whether to continue from the newest whole checkpoint, as `resume()` does; "auto": if there is a run.
            accept_changes: whether to resume even if the data or the recipe changed, to another result.
            others: none.

        Raises:
            Interrupted: a signal stopped the run, and a checkpoint is saved.
            RelayError: the run can't continue; the text says why and what to do.
        """
        arguments.refuse_in_fit(data, others)
        with self._around_loop(resume, accept_changes):
            while self.progress.continues:
                self.model.train()
                spike = None
                for batch in self._rest_of_epoch():
                    result = self.train_step.step(batch, self.progress.step)
                    spike = result.spike or self.after_step(batch, result)
                    if spike is not None or self.progress.ends or self.progress.interrupted:
                        break
                if spike is None and not self.progress.interrupted:
                    spike = self._end_epoch()
                if spike is not None:
                    self.session.roll_back(spike)
        return self.evaluator.result

    def resume(self, *, accept_changes: bool = False) -> dict[str, float]:
        """Continue from the newest whole checkpoint of the run's folder, to the bits of a run never interrupted."""
        return self.fit(resume=True, accept_changes=accept_changes)

    @contextmanager
    def _around_loop(self, resume: bool | Literal["auto"], accept_changes: bool) -> Iterator[None]:
        """Start or resume the run before the loop; finish it after, or save what a signal interrupted."""
        session, progress = self.session, self.progress
        resume = session.has_run if resume == "auto" else resume
        with session.hold(resume):
            session.say(introduction(self.state, session.record["model"]["name"]))
            session.start(resume, accept_changes)
            # Without a run, no line of metrics is written.
            self._hooks = step_hooks([each for each in self.callbacks if self.run or not isinstance(each, StepLog)])
            notify(self.callbacks, "on_start", self)
            if progress.step == 0:
                self.judge.rehearse()
            progress.stopwatch.start()
            with session.terminal.progress(lambda: counters(progress), unit(self.batches)):
                yield
            if not progress.interrupted:
                self._finish()
            if progress.interrupted:
                raise session.interruption()

    def _rest_of_epoch(self) -> Iterator[Batch]:
        """Yield the batches of the running epoch from where the run stands, without the skipped ones."""
        progress = self.progress
        if progress.stop_at_limit():  # the run was interrupted in its last evaluation
            return
        if progress.position == 0:
            notify(self.callbacks, "on_epoch_start", self, progress.epochs_done + 1)
            check_unfrozen(self.model, self.train_step.updates, self._left_out)
        elif not progress.at_epoch_end and not progress.evaluated_at[1] and self.judge.is_due():
            # The run was interrupted in an evaluation.
            improved = self.judge.within_epoch(self, self.callbacks)
            if progress.interrupted:  # before a batch is read, whose end would be the place of a stream
                return
            if improved or self.session.save_due:
                self.save(training_continues=True)
        for batch in self.judge.checked(self.batches.epoch(progress.epochs_done, start=progress.position)):
            if progress.step + 1 not in progress.skipped:
                if self._hooks["on_batch"]:
                    notify(self._hooks["on_batch"], "on_batch", self, batch)
                yield batch
                continue
            progress.step += 1
            if progress.stop_at_limit():
                return

    def after_step(self, batch: Batch, result: StepResult) -> Spike | None:
        """Count a step, call the callbacks, evaluate and save where it is due; return a spike that was read late."""
        progress = self.progress
        progress.record(result, batch.size)
        if self._hooks["on_step"]:
            notify(self._hooks["on_step"], "on_step", self, batch, result.loss)
        if self.settings.receipt_every and progress.step % self.settings.receipt_every == 0:
            self.session.weigh()
        ends = progress.stop_at_limit()
        save = self.session.is_due()
        if progress.interrupted:
            return None
        # At an epoch's end, at the run's, and where it pauses, the evaluation and the checkpoint follow.
        is_within = not progress.at_epoch_end and not ends
        evaluate, save = is_within and self.judge.is_due(), save and not (progress.at_epoch_end or progress.is_paused)
        spike, wanted = None, is_within and self.session.asks.wanted
        if save or evaluate or wanted or progress.lines.due:
            spike = self.train_step.detector.read()
        if spike is not None:
            return spike
        if evaluate and self.judge.within_epoch(self, self.callbacks):
            save = True
        if save and not progress.interrupted:
            self.save(training_continues=True)
        if wanted and not progress.interrupted:
            self.judge.serve()
        return None

    def _end_epoch(self) -> Spike | None:
        """Evaluate where it is due, tell people, save; return a spike that was read late."""
        spike = self.train_step.detector.read()
        if spike is not None:
            return spike
        progress = self.progress
        if progress.is_paused and not progress.at_epoch_end:  # recorded as in a run that never pauses
            improved: bool | None = self.judge.within_epoch(self, self.callbacks)
        else:
            improved = self.judge.at_epoch_end(self, self.callbacks, float(self.optimizer.param_groups[0]["lr"]))
        if progress.interrupted:
            return None
        progress.end_epoch()
        is_due = improved or self.session.save_due
        if progress.ends or is_due:
            self.session.save(training_continues=True, interim=progress.is_paused and not is_due)
        if not progress.ends:
            self.judge.serve()
        progress.stopwatch.start()
        return None

    def _finish(self) -> None:
        """Wait for the last checkpoint, evaluate a run that was done before, and say how well it did."""
        if self.progress.stop_reason is not None:
            self.say(f"stopped: {self.progress.stop_reason}")
        self.session.wait()
        if self.progress.is_paused:
            return
        if self.evaluator.last is None and self.evaluator.parts:
            self.judge.evaluate([self.selects_on])
            if self.progress.interrupted:
                return
        notify(self.callbacks, "on_end", self)
        if self.best is not None:
            self.say(best_text(self.best, self.task, self.selects_on))

    def evaluate(self, data: Any = "test") -> Evaluation:
        """Run the model over data, each sample once.

        Args:
            data: "test", "validation", or other data as the constructor takes it.

        Raises:
            UsageError: the trainer was given no such data.
        """
        with self.session.alone():
            part = data if isinstance(data, str) else assemble.batches_like(self.batches, data)
            evaluation = self.evaluator.evaluate(part)
        assert evaluation is not None  # noqa: S101 - nothing stops it
        if isinstance(data, str):
            self.judge.keep(data, evaluation)
        return evaluation

    def predict(self, data: Any) -> Any:
        """Return the task's predictions for data, or inputs alone (samples, …); see `Evaluator.predict`."""
        with self.session.alone():
            return self.evaluator.predict(assemble.batches_like(self.batches, data, inputs_alone=True))

    def save(self, *, training_continues: bool = False) -> None:
        """Save a checkpoint; see `Session.save`."""
        self.session.save(training_continues=training_continues)

    def load(self, which: str = "best") -> Path:
        """Load the weights of the checkpoint "best", "last" or of a step's number; return its folder."""
        return self.session.load_weights(which)

    def stop(self, reason: str) -> None:
        """End the training after this step or epoch, as early stopping does; the run counts as done."""
        self.progress.stop_reason = reason

    def say(self, text: str) -> None:
        """Write a line to the terminal and to the run's log."""
        self.session.say(text)

    def record_line(self, split: str, values: dict[str, Any]) -> None:
        """Append a line to the run's metrics, if there is a run."""
        self.session.record_line(split, values)
