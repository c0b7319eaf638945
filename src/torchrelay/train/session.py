"""Step 7: what surrounds the loop: the run's folder, its log, checkpoints and signals."""

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrelay import rng
from torchrelay.checkpoint.checkpointer import Checkpointer, CheckpointSettings
from torchrelay.checkpoint.format import WEIGHTS, Contents, Manifest, read
from torchrelay.errors import Interrupted, RelayError, UsageError, intact, interrupted
from torchrelay.models.factory import InitFromData
from torchrelay.run.folder import RunFolder
from torchrelay.run.settings import RunSettings
from torchrelay.train import hyperparameters, recovery
from torchrelay.train.asks import Asks
from torchrelay.train.logs import EarlyLog
from torchrelay.train.notice import noticed
from torchrelay.train.record import log
from torchrelay.train.spikes import Spike
from torchrelay.train.state import TrainingState, initial_images


class Session:
    """Holds a run's folder, log, checkpoints and signals while the loop runs; begins a run or resumes it.

    Without a folder, nothing is written and nothing can be resumed. Only rank 0 writes.

    Args:
        state: what a checkpoint saves and restores.
        settings: what to do on a loss spike.
        folder: the run's.
        saving: when to save and what to keep.
        early: where people read along, and what was said before the run's log is open.
        record: what goes into recipe.toml.

    Attributes:
        state: what a checkpoint saves and restores.
        run: the open run folder; on rank 0, while `hold` lasts.
        history: the lines of metrics of epochs and evaluations.
        checkpoints: of the folder.
        asks: what signals, the clock and people ask for.
        save_due: whether a checkpoint is due, which at an epoch's end waits for the evaluation.
    """

    def __init__(
        self,
        state: TrainingState,
        settings: RunSettings,
        folder: str | Path | None,
        saving: CheckpointSettings | None,
        early: EarlyLog,
        record: dict[str, Any],
    ) -> None:
        self.folder, self.terminal, self.record = None if folder is None else Path(folder), early.terminal, record
        self.run: RunFolder | None = None
        self.checkpoints: Checkpointer | None = None
        self.save_due = False
        self._saved_at = -1  # the step of the last regular checkpoint of this process
        self._answered_at: int | None = None  # the step after which a person's checkpoint is being saved
        self.history: list[dict[str, Any]] = []
        self.state, self._settings, self._group = state, settings, state.strategy.group
        self._early = early
        if self.folder is not None:
            self.checkpoints = Checkpointer(
                self.folder / "checkpoints",
                saving or CheckpointSettings(),
                steps_per_epoch=state.progress.steps_per_epoch,
                total_steps=state.progress.total_steps,
                before_write=lambda: self.run.flush() if self.run is not None else None,
                after_write=self._tell_of,
                warn=self.say,
            )
        self.asks = Asks(state.progress, self._group, self.checkpoints, self.folder)

    @property
    def has_run(self) -> bool:
        """Whether the folder holds a run."""
        return self.folder is not None and (self.folder / "recipe.toml").exists()

    @contextmanager
    def hold(self, resume: bool) -> Iterator[None]:
        """Open the run's folder and catch signals; close both at the end.

        Args:
            resume: whether the folder must hold a run, or must not.

        Raises:
            UsageError: there is no folder to resume, or it holds a run already.
        """
        if resume and self.folder is None:
            raise UsageError("this trainer has no run folder to resume: give Trainer(..., run=...)")
        opened: list[RunFolder] = []
        with (
            noticed(self._settings.notify, self.state, self.folder, lambda: bool(opened), self.say),
            ExitStack() as stack,
        ):
            stack.enter_context(self.alone())
            stack.enter_context(self.asks.signal)
            stack.callback(self._close)
            stack.enter_context(log.to(self.state.progress.logged))
            if self.folder is not None and self._group.main:
                trackers, settings = self._settings.trackers, hyperparameters.of(self.record)
                self.run = RunFolder(self.folder, self.terminal, resume=resume, trackers=trackers, settings=settings)
                opened.append(self.run)
                self.asks.clear()  # of what was asked of a process that died
                for note in self._early.notes:
                    self.run.note(note)
                if self._settings.notify is not None:
                    self.say(f"when it ends, this run calls: {self._settings.notify}")
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Explain the device's errors meanwhile, and leave the global generators as they were."""
        device = self.state.train_step.device
        with device.explain_errors(self.state.batches.batch_size), rng.kept(device.device):
            yield

    def _close(self) -> None:
        self.state.progress.interrupted, self.state.progress.phase = False, ""
        for batches in (self.state.batches, *self.state.evaluated.values()):
            batches.close()
        run, self.run = self.run, None
        try:
            if self.checkpoints is not None:
                self.checkpoints.close()
        finally:
            if run is not None:
                self.asks.clear()
                run.close()

    def start(self, resume: bool, accept_changes: bool) -> None:
        """Restore the newest checkpoint, or begin, and save what the run starts from.

        Raises:
            RelayError: the data or the recipe changed such that another result would follow.
        """
        contents = None
        if resume and self.checkpoints is not None:
            contents = recovery.newest(self.checkpoints, self._group, self.say)
            if contents is None:
                self.say("no checkpoint was saved yet: starting from the beginning")
                if self.run is not None:
                    self.run.rewind(0)
        if contents is not None:
            self._restore(contents, accept_changes)
        else:
            self._begin()
            if self.run is not None:
                self.run.receipt.begin()
        if self.run is not None:
            self.run.write_files(self.state.files())
            self.run.write_recipe(self.record)  # which may now ask for more epochs
            if contents is not None and self.checkpoints is not None:
                self.checkpoints.tidy(contents.step)
        if contents is None:
            self.save()

    def _begin(self) -> None:
        """Initialize from the data, and give all ranks the weights of rank 0."""
        state = self.state
        if isinstance(state.model, InitFromData):
            state.model.init_from(initial_images(state))
        state.strategy.broadcast_weights()
        if state.ema is not None:
            state.ema.restart(state.model)

    @intact("the state in the newest checkpoint", "remove that to resume from the one before")
    def _restore(self, contents: Contents, accept_changes: bool) -> None:
        state = self.state
        threads = contents.state["identity"]["threads"]
        if state.train_step.device.keep_threads(threads):
            plural = "s" * (threads > 1)
            self.say(f"resuming with {threads} thread{plural} per operation, as the run began (see device.threads)")
        changed = {} if self.run is None else state.compare(self.run, self.record, contents, accept_changes, self.say)
        state.restore(contents, fresh_options=accept_changes)
        self._rewind(contents.state["metrics_lines"])
        if self.run is not None:
            self.run.receipt.change(contents.step, changed)
        progress = state.progress
        # A signal before the next step must not make a regular checkpoint one of its own; and one that a signal came
        # before is saved after the evaluation, as in an undisturbed run.
        self._saved_at = -1 if contents.interim else contents.step
        self.save_due = self.checkpoints is not None and self.checkpoints.due_after(contents.step)
        if progress.epochs_done >= progress.epochs:
            self.say(f"the run is done: {progress.step:,} steps")
        else:
            self.say(f"resuming after step {progress.step:,} of {progress.total_steps:,}")

    def weigh(self) -> None:
        """Hash the weights for the receipt, if there is a run."""
        if self.folder is None:
            return
        weights = self.state.weights_hash()
        if self.run is not None:
            self.run.receipt.add(self.state.progress.step, self.state.progress.tail(), weights=weights)

    def is_due(self) -> bool:
        """Return whether a checkpoint is due after this step; set `progress.interrupted` if the run is to stop."""
        by_clock = self.asks.learn()
        self.save_due = by_clock or (
            self.checkpoints is not None and self.checkpoints.due_after(self.state.progress.step)
        )
        return self.save_due

    def save_as_asked(self) -> None:
        """Save a checkpoint between two regular ones, since a person wants it, or say that there is one."""
        step = self.state.progress.step
        self.asks.done("save")
        if self._saved_at == step:
            self.asks.tell("save")
        else:
            self._answered_at = step
            self.save(training_continues=True, interim=True)

    def save(self, *, training_continues: bool = False, interim: bool = False) -> None:
        """Save a checkpoint; only its staging in memory holds up the training.

        Args:
            training_continues: whether nothing but training steps changes the weights from here on; then most of the
                staging holds up nothing, either.
            interim: whether only a signal or a person wants it; it goes when the next one is saved.

        Raises:
            RelayError: an earlier one could not be written, or a loss so far was not finite.
        """
        if self.checkpoints is None:
            return
        spike = self.state.train_step.detector.read()
        if spike is not None:
            raise recovery.stop_at_spike(spike, None)
        began = time.perf_counter()
        contents = self.state.contents(self.run.metrics_lines if self.run is not None else 0)
        contents = replace(contents, interim=interim and contents.step != self._saved_at)
        self._saved_at = self._saved_at if contents.interim else contents.step
        self.save_due = False
        if self.run is not None:
            if not contents.interim:
                self.checkpoints.wait()  # then the receipt knows the weights of the one before
                self.run.receipt.add(contents.step, self.state.progress.tail(), weights=True)
            self.checkpoints.save(contents, training_continues=training_continues)
            paused = 1000 * (time.perf_counter() - began)
            self.run.note(f"saving after step {contents.step:,}; training paused for {paused:.1f} ms")

    def wait(self) -> None:
        """Wait until all checkpoints are on disk."""
        if self.checkpoints is not None:
            self.checkpoints.wait()

    def settle(self, *, trained: bool = False) -> None:
        """Wait until the weights are staged, as they are about to change; `trained`: by a training step."""
        if self.checkpoints is not None:
            self.checkpoints.settle(trained=trained)

    def load_weights(self, which: str) -> Path:
        """Load the weights of the checkpoint called "best", "last" or by its step, and return its folder.

        Raises:
            RelayError: the data has other classes than the run had, or the model other weights.
        """
        if self.checkpoints is None:
            raise UsageError("this trainer has no run folder to load from: give Trainer(..., run=...)")
        path = self.checkpoints.find(which)
        contents = read(path)
        trained, here = contents.state["data"]["classes"], self.state.batches.source.classes
        if trained and here and (differing := set(trained) ^ set(here)):
            raise RelayError(
                f"the run's classes and those of {self.state.batches.source.name} differ in "
                f"{', '.join(sorted(differing))}: classes are matched by name by: torchrelay evaluate RUN IMAGES"
            )
        self.settle()
        self.state.load_weights(contents)
        return path

    def roll_back(self, spike: Spike) -> None:
        """Restore the checkpoint before a spike and leave out its batch.

        Raises:
            RelayError: it can't be, or `run.on_spike` is "stop".
        """
        if self.folder is not None:
            recovery.write_down(spike, self.folder, self.state.samples_of(spike.step))
        if self.checkpoints is None or self._settings.on_spike == "stop":
            raise recovery.stop_at_spike(spike, self.folder)
        self._rewind(recovery.roll_back(spike, self.state, self.checkpoints, self._settings, self.say))

    def interruption(self) -> Interrupted:
        """Save after a signal, and return the error that says how to resume."""
        done = f"stopped by {self.asks.stopped_by} after step {self.state.progress.step:,}"
        if self.checkpoints is None:
            return self._told(f"{done}; there is no run folder to resume from", saved=False)
        spike = self.state.train_step.detector.read()
        if spike is None:
            self.save(interim=not self.save_due)
        elif self._settings.on_spike == "stop":
            raise recovery.stop_at_spike(spike, None)
        # A spike that is to be rolled back is met again by the resumed run.
        self.checkpoints.wait()
        # Whoever started the processes ends all of them when one ends.
        self._group.barrier("the last checkpoint")
        way = "trainer.resume()" if self._by_script else f"torchrelay resume {shlex.quote(str(self.folder))}"
        return self._told(f"{done}, saved; resume with: {way}", saved=True)

    @property
    def _by_script(self) -> bool:
        return bool(self.record["environment"].get("started_from") == "python")

    def _told(self, text: str, *, saved: bool) -> Interrupted:
        if self._by_script:  # else the command line prints it
            self.say(text)
        return interrupted(text, saved=saved)

    def _rewind(self, lines: int) -> None:
        if self.run is not None and self.checkpoints is not None:
            self.run.rewind(lines)
            saved = self.checkpoints.manifest(self.state.progress.step)
            weights = None if saved.is_interim else saved.files[WEIGHTS].sha256
            self.run.receipt.rewind(saved.step, self.state.progress.tail(), weights)

    def _tell_of(self, manifest: Manifest) -> None:
        """Tell the receipt and whoever asked that a checkpoint is on disk; on the thread that has written it."""
        if self.run is not None:
            self.run.receipt.know(manifest.step, manifest.files[WEIGHTS].sha256)
        if self._answered_at == manifest.step:
            self._answered_at = None
            self.asks.tell("save")

    def say(self, text: str) -> None:
        """Write a line to the terminal and to the run's log."""
        (self.run or self.terminal).say(text)

    def record_line(self, split: str, values: Mapping[str, Any]) -> None:
        """Append a line to the run's metrics, if there is a run."""
        progress, now = self.state.progress, round(time.time(), 3)
        if split == "step":
            progress.last_loss = values["loss"]
        line = {"step": progress.step, "epoch": progress.epoch_of(progress.step), "split": split}
        if split != "step":
            self.history.append({**line, **values})
        if self.run is not None:
            self.run.record({**line, **values, "time": values.get("time", now)})
