"""Step 7: the loop. `fit` calls `train_step`, which calls `optimizer.step`; there is nothing between them.

open the run                                           # or go on from its newest checkpoint
for each epoch:
    for each global batch, from where the run stands:
        set the learning rates of this step
        loss and gradients of every replica, added in a fixed tree
        update; average the weights
        log, save, stop, where it is time to
    evaluate, keep the best, save
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchrelay import rng
from torchrelay.checkpoint.checkpointer import Checkpointer
from torchrelay.checkpoint.format import Contents, read
from torchrelay.checkpoint.schedule import CheckpointSettings
from torchrelay.data.augment.pipeline import Augment, Pipeline
from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches, Sampling
from torchrelay.data.sources import ArraySource, as_source, statistics
from torchrelay.device import processor
from torchrelay.device.device import DeviceSettings, set_up
from torchrelay.distributed.build import build_strategy
from torchrelay.distributed.process_group import init_process_group
from torchrelay.distributed.replicas import ParallelSettings, count_replicas
from torchrelay.errors import RelayError, UsageError
from torchrelay.models.ema import EMA
from torchrelay.optim.groups import clear_gradients
from torchrelay.optim.optimizers import SGD
from torchrelay.optim.schedules import Constant, Schedule, ScheduleSettings
from torchrelay.run import identity
from torchrelay.run.folder import RunFolder
from torchrelay.run.metrics import Stopwatch
from torchrelay.run.settings import RunSettings
from torchrelay.run.terminal import Terminal
from torchrelay.tasks.classification import Classification
from torchrelay.tasks.targets import check_targets, explain
from torchrelay.tasks.task import Task
from torchrelay.train.backward import backward_from_mean, mean_loss
from torchrelay.train.callbacks import Callback, Pictures, StepLog, epoch_text
from torchrelay.train.evaluation import Evaluation, RunningSums, evaluate, predict
from torchrelay.train.graph import graphed, set_rate
from torchrelay.train.recovery import SpikeDetector
from torchrelay.train.session import recovery, session
from torchrelay.train.signals import StopNow, StopSignal
from torchrelay.train.views import Forward, check_tta, with_tta

_NO_GRAD = torch.no_grad()  # to make one takes longer than to use it
_STOP, _SAVE = 1, 2  # what any process may ask of all


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    value: float
    epoch: int  # counted from 1


class Trainer:
    """Trains a model: the seven steps in their order.

    Args:
        model: any module; its initial weights are the caller's.
        train: training data: a source of `torchrelay.data`, a map-style Dataset, or a pair (inputs, targets).
        test: test data, likewise; evaluated once each sample.
        validation: data by which "best" and early stopping go, if it shall not be the test data.
        task: what a batch means; classification if not given.
        optimizer: settings such as `optim.SGD(lr=0.1)`, or any function from a model to a torch optimizer.
        schedule: how the learning rate changes by step, such as `optim.Cosine()`.
        epochs: how many times to go through the training data.
        batch_size: samples of a global batch.
        run: the run's folder; without one nothing is written and nothing can be resumed.
        settings: seed, exactness and intervals; `epochs` and `seed` stand beside it for short.
        seed: see `RunSettings.seed`.
        augment: batched augmentation of image arrays, such as `[augment.Flip(), augment.PaddedCrop()]`.
        prepare: what training and test images alike go through first, such as `[augment.Resize(size=112)]`.
        normalize: whether images are shifted and scaled by the data's channel means and deviations.
        sampling: "shuffle", "balanced" (every class as often) or "sequential".
        drop_last: leave out an epoch's last batch where it is smaller.
        workers: processes that read a torch Dataset; arrays need none.
        device: a name such as "cuda:1", or `DeviceSettings`.
        parallel: into how many replicas a global batch is divided.
        ema: decay of an exponential average of the weights, by which evaluations go; 0: none.
        clip_norm: largest norm of the gradient; unset: as it is.
        checkpoint: when to save and what to keep.
        callbacks: what else shall happen around a step.
        terminal: where people read along.
        record: what goes into recipe.toml, if the trainer was built from a recipe.

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
        task: Task | None = None,
        optimizer: Callable[[nn.Module], Optimizer] | None = None,
        schedule: ScheduleSettings | None = None,
        epochs: int | None = None,
        batch_size: int = 256,
        run: str | Path | None = None,
        settings: RunSettings | None = None,
        seed: int | None = None,
        augment: Sequence[Augment] = (),
        prepare: Sequence[Augment] = (),
        normalize: bool = True,
        sampling: Sampling = "shuffle",
        drop_last: bool = False,
        workers: int = 0,
        device: str | DeviceSettings = "auto",
        parallel: ParallelSettings | None = None,
        ema: float = 0.0,
        clip_norm: float | None = None,
        checkpoint: CheckpointSettings | None = None,
        callbacks: Sequence[Callback] = (),
        terminal: Terminal | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        # 1. Prepare: parameters, and where people read along
        changes = {name: value for name, value in (("epochs", epochs), ("seed", seed)) if value is not None}
        self.settings = RunSettings(**((settings or RunSettings()).model_dump() | changes))
        self.terminal = terminal or Terminal()
        self.folder = Path(run) if run is not None else None
        self.run: RunFolder | None = None
        self.notes: list[str] = []  # what was said before there was a run, for its log

        # 4. The device comes before the data, which is augmented there
        chosen = device if isinstance(device, DeviceSettings) else DeviceSettings(name=device)
        self.device = set_up(chosen, self.settings.exact)
        sharing = parallel or ParallelSettings()
        self.group = init_process_group(self.device.device, sharing.timeout)
        self.replicas = count_replicas(sharing, self.group.size, self.settings.exact)
        if not self.group.main:
            self.terminal = Terminal(quiet=True)  # one speaks for all

        # 2. Data: sources, and the iterators that make global batches of them
        source = as_source(train)
        self.classes = source.classes
        self.pipeline = Pipeline(
            transforms=tuple(augment),
            prepare=tuple(prepare),
            classes=len(source.classes),
            **(statistics(source) if normalize else {}),
        )

        def batches(data: Any, training: bool) -> Batches:
            return Batches(
                as_source(data),
                batch_size,
                self.device,
                self.pipeline,
                seed=self.settings.seed,
                train=training,
                sampling=sampling if training else "sequential",
                replicas=self.replicas if training else 1,
                rank=self.group.rank,
                world_size=self.group.size,
                workers=workers,
                drop_last=drop_last and training,
            )

        self.batches = batches(source, training=True)
        parts = (("validation", validation), ("test", test))
        self.evaluated = {name: batches(part, training=False) for name, part in parts if part is not None}
        self.selects_on = next(iter(self.evaluated), "train")

        # 3. Model
        self.model = model
        self.strategy = build_strategy(
            model,
            sharing.kind,
            self.group,
            self.device,
            exact=self.settings.exact,
            dummy_loss=self._dummy_loss,
            say=self._note,
        )
        self.ema = EMA(self.model, ema) if ema else None

        # 5. Optimizer and schedule
        self.optimizer = (optimizer or SGD())(self.model)
        self.strategy.check_optimizer(self.optimizer)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.clip_norm = clip_norm if clip_norm is not None else getattr(optimizer, "clip_norm", None)
        self.total_steps = self.settings.epochs * len(self.batches)
        self.schedule: Schedule = (schedule or Constant()).bind(len(self.batches), self.total_steps)
        self.scaler = self.device.scaler()
        self.graph = graphed(self.device, self.optimizer, self.replicas, self.group.size)

        # 6. Loss
        self.task = task or Classification()
        if getattr(self.task, "classes", 0) is None and self.classes:
            self.task.classes = len(self.classes)  # type: ignore[attr-defined]
        check_tta(self.settings.test_views, isinstance(self.task, Classification))
        self.measures = self.settings.train_metrics and type(self.task).measure is not Task.measure
        for part in (self.batches, *self.evaluated.values()):
            check_targets(self.task.check, part)

        if self.group.size > 1:  # a process without samples of a last batch must know what kind of thing a weight is
            self._some_weight = self.task.weight(self.batches.dummy_batch().targets)

        # 7. Where the run stands
        self.record = record or _own_record(self)
        self.record["parallel"] = sharing.model_dump() | {"replicas": self.replicas}
        self.step = 0  # optimizer steps done; the place within the epoch follows from this
        self.epochs_done = 0  # epochs trained and evaluated
        self.best: Best | None = None
        self.last_evaluation: Evaluation | None = None  # of the part that `selects_on` names
        self.evaluated_at: tuple[int, dict[str, float]] = (-1, {})  # after which step, and what came out
        self._ended = 0  # the step after which an epoch's end was last done
        self.sums = self._new_sums()  # of the running epoch
        self.checkpointer = Checkpointer(
            (self.folder or Path()) / "checkpoints",
            checkpoint or CheckpointSettings(),
            steps_per_epoch=len(self.batches),
            total_steps=self.total_steps,
            before_write=lambda: self.run.flush() if self.run is not None else None,
        )
        self._save_is_due = False
        self.step_log = StepLog()
        self.stopwatch = Stopwatch()
        self.callbacks = [self.step_log, Pictures(), *callbacks]
        self.guard = SpikeDetector(self.settings.spike_threshold)
        self.skipped: dict[int, list[int]] = {}  # steps left out for their loss, counted from 1, and their samples
        self.signal = StopSignal()
        self.stop_reason: str | None = None
        self.samples_seen = 0  # since this process began; for people only
        self.phase = ""

    # ------------------------------------------------------------------------------------------------ the loop

    def fit(self) -> dict[str, float]:
        """Train until the end and return the last evaluation's metrics.

        Raises:
            Interrupted: a signal stopped the run, and a checkpoint is saved.
            RelayError: the run can't go on; the text says why and what to do.
        """
        return self._fit(resume=False)

    def resume(self, *, accept_changes: bool = False) -> dict[str, float]:
        """Go on from the newest whole checkpoint of the run's folder, to the bits of a run never stopped.

        Args:
            accept_changes: go on even if the data or the recipe changed, to another result.
        """
        return self._fit(resume=True, accept_changes=accept_changes)

    def _fit(self, resume: bool, accept_changes: bool = False) -> dict[str, float]:
        with session(self, resume, accept_changes):
            while self._goes_on():
                with recovery(self):  # from a step whose loss went wrong
                    self.model.train()
                    for batch in self._batches_from_here():
                        loss = self.train_step(batch)
                        self._after_step(batch, loss)
                        if self.stop_reason is not None:
                            break
                    self._end_epoch()
        return self.last_evaluation.values if self.last_evaluation else {}

    def train_step(self, batch: Batch) -> Tensor:
        """Take one optimizer step on a global batch.

        Returns:
            The mean loss over the batch, without dimensions, on the device: reading its value waits for the device.
        """
        for group in self.optimizer.param_groups:
            set_rate(group, self.schedule.at(self.step, group["initial_lr"]))
        if self.graph is not None:  # what follows, recorded and replayed
            return self.graph.train_step(self, batch)
        try:
            loss = self.backward(batch)
        except Exception as error:
            explain(error, batch, self.model)  # raises what names the sample, if one is to blame
            raise
        self.guard.watch(self.step + 1, loss, self.clip())
        self._settle(trained=True)  # a checkpoint may still be copied from the weights
        self.scaler.step(self.optimizer)  # calls optimizer.step; skips it where fp16 overflowed
        self.scaler.update()
        clear_gradients(self.optimizer)
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        self.step += 1
        return loss

    def backward(self, batch: Batch) -> Tensor:
        """Leave the gradient of the mean loss over a global batch in the parameters, and return that loss."""
        total = self._weight(batch)
        if self.replicas == 1:
            loss = self._replica(0, batch.inputs, batch.targets, total)
        else:
            loss = self._own_replicas(batch, total)
        self.sums.add_loss(loss, total)
        return loss

    def _own_replicas(self, batch: Batch, total: Tensor | float) -> Tensor:
        """Compute this process's replicas one after another; all processes' gradients and losses are added."""
        losses = []
        for replica, (inputs, targets) in reversed(list(enumerate(batch.replicas(), batch.first_replica))):
            with self.strategy.replica(last=replica == batch.first_replica):
                losses.append(self._replica(replica, inputs, targets, total) if len(targets) else self._nothing())
        return self.strategy.reduce(losses)

    def _nothing(self) -> Tensor:
        """Return the loss of a replica without samples."""
        if self.measures:
            self.sums.add_measures({}, 0)
        return torch.zeros((), device=self.device.device)

    def _dummy_loss(self) -> Tensor:
        """Go forward through any samples, where a process has none and the others wait for it."""
        batch = self.batches.dummy_batch()
        with self.device.autocast():
            return self.task.loss(self.strategy(batch.inputs), batch.targets)

    def _weight(self, batch: Batch) -> Tensor | float:
        """Return what the global batch's summed loss is divided by: the replicas' weights, added in their order."""
        counted = self.task.weight_of(batch.size)
        if counted is not None:
            return counted
        weights: list[Any] = [self.task.weight(targets) for _, targets in batch.replicas() if len(targets)]
        if self.group.size > 1:
            weights += [0.0 * self._some_weight] * (len(batch.replica_sizes) - len(weights))
            on_device = isinstance(self._some_weight, Tensor)
            own = torch.stack(weights) if on_device else torch.tensor(weights, dtype=torch.float64)
            found = self.group.gather(own).flatten()
            weights = list(found.unbind()) if on_device else found.tolist()
        total: Tensor | float = reduce(add, weights) if isinstance(weights[0], Tensor) else math.fsum(weights)
        return total

    def _replica(self, replica: int, inputs: Any, targets: Tensor, total: Tensor | float) -> Tensor:
        """Go forward and backward through one replica's part; return its share of the mean loss."""
        rng.reseed(rng.step_seed(self.settings.seed, "model", self.step, replica), self.device.device)
        with self.device.autocast():
            outputs = self.strategy(inputs)
            loss = self.task.loss(outputs, targets)
        backward_from_mean(loss, total, self.scaler.scale)
        if self.measures:
            with _NO_GRAD:
                self.sums.add_measures(self.task.measure(outputs, targets), self.task.count(targets))
        return mean_loss(loss, total)

    def clip(self) -> Tensor | None:
        """Scale the gradient down to `clip_norm`; return its norm where somebody asks for it."""
        watched = self.settings.on_spike == "rollback" and not self.scaler.is_enabled()  # which overflows on purpose
        if self.clip_norm is None:
            return self.strategy.grad_norm(self.parameters) if watched else None
        self.scaler.unscale_(self.optimizer)
        norm = self.strategy.clip_grad_norm(self.parameters, self.clip_norm)
        return norm if watched else None

    # ------------------------------------------------------------------------------------------------ around a step

    def _batches_from_here(self) -> Iterator[Batch]:
        """Yield the batches of the running epoch from where the run stands, but for the skipped ones."""
        self._stop_at_limit()
        if self.stop_reason is not None:  # a run that a signal stopped in its last evaluation
            return
        for batch in self.batches.epoch(self.epochs_done, start=self.step - self.epochs_done * len(self.batches)):
            if self.step + 1 not in self.skipped:
                yield batch
                continue
            self.step += 1
            self._stop_at_limit()
            if self.stop_reason is not None:
                return

    def _after_step(self, batch: Batch, loss: Tensor) -> None:
        for callback in self.callbacks:
            callback.on_step(self, batch, loss)
        if self.step % self.settings.log_every == 0:
            self.guard.read()
        self._stop_at_limit()
        self.stopwatch.samples += batch.size
        self.samples_seen += batch.size
        asked = self._asked()
        if asked & _STOP:
            raise StopNow
        self._save_is_due = bool(asked & _SAVE) or self.checkpointer.due_after(self.step)
        if self.step % len(self.batches) and self._save_is_due:  # at an epoch's end the evaluation comes first
            self.save(training_continues=True)

    def _asked(self) -> int:
        """Return what any process asks of all: several see it a step later, and all at the same step."""
        late = self.group.main and self.checkpointer.due_by_clock()
        return self.group.agree(_STOP * (self.signal.received is not None) | _SAVE * late)

    def stop(self, reason: str) -> None:
        """End the training after this step or this epoch, as early stopping does; the run counts as done."""
        self.stop_reason = reason

    def say(self, text: str) -> None:
        """Write a line to the terminal and to the run's log."""
        (self.run or self.terminal).say(text)

    def _note(self, text: str) -> None:
        """Say something before there is a run."""
        self.terminal.say(text)
        self.notes.append(text)

    def record_line(self, split: str, values: dict[str, Any]) -> None:
        """Append a line to the run's metrics, if there is a run."""
        if self.run is not None:
            epoch, now = -(-self.step // len(self.batches)), round(time.time(), 3)
            line = {"step": self.step, "epoch": epoch, "split": split, **values}
            self.run.record({**line, "time": values.get("time", now)})

    def _goes_on(self) -> bool:
        at_end = self._at_limit() and self._ended == self.step
        return self.epochs_done < self.settings.epochs and self.stop_reason is None and not at_end

    def _at_limit(self) -> bool:
        return self.settings.max_steps is not None and self.step >= self.settings.max_steps

    def _stop_at_limit(self) -> None:
        if self._at_limit():
            self.stop(f"run.max_steps is {self.settings.max_steps}")

    def _end_epoch(self) -> None:
        """Evaluate where it is time to, keep the best, tell people, save."""
        self.guard.read()
        epoch = self.epochs_done + 1
        last = epoch == self.settings.epochs or self.stop_reason is not None
        train, clock, now = self.sums.means(), self.stopwatch.lap(), {"time": round(time.time(), 3)}
        found: dict[str, dict[str, float]] = {}
        if last or epoch % self.settings.evaluate_every == 0:
            found = self._evaluate_all()  # a signal ends it, and a resume repeats it: nothing is on record before
        self.record_line("train", {**train, "lr": float(self.optimizer.param_groups[0]["lr"]), **clock, **now})
        for split, values in found.items():
            self.record_line(split, values)
            for callback in self.callbacks:
                callback.on_evaluate(self, split, values)
        chosen = found.get(self.selects_on) or (None if self.evaluated else train)
        improved = chosen is not None and self.task.headline in chosen and self._is_best(chosen, epoch)
        self.say(epoch_text(self, epoch, {"train": train, **found}, clock))
        for callback in self.callbacks:
            callback.on_epoch(self, epoch, train)
        if self.step == epoch * len(self.batches):  # not where max_steps ends inside an epoch
            self.epochs_done, self.sums = epoch, self._new_sums()
        self._ended = self.step
        if last or improved or self.stop_reason is not None or self._save_is_due:
            self.save(training_continues=True)
        self.stopwatch.start()

    def _evaluate_all(self) -> dict[str, dict[str, float]]:
        self.phase = "evaluating"
        found = {split: self.evaluate(split).values for split in self.evaluated}
        self.phase = ""
        return found

    def _is_best(self, values: dict[str, float], epoch: int) -> bool:
        value = values[self.task.headline]
        self.schedule.update(self._score(values))
        if not math.isfinite(value):
            return False
        if self.best is not None and self._score(values) <= self._score({self.task.headline: self.best.value}):
            return False
        self.best = Best(value, epoch)
        return True

    def _score(self, values: dict[str, float]) -> float:
        """Return the headline metric such that higher is better."""
        value = values[self.task.headline]
        return value if self.task.higher_is_better else -value

    def _new_sums(self) -> RunningSums:
        return RunningSums(self.group, self.replicas // self.group.size)

    # ------------------------------------------------------------------------------------------------ the test

    def evaluate(self, split: str = "test") -> Evaluation:
        """Run the model over the test or the validation data, each sample once.

        Raises:
            UsageError: the trainer was given no such data.
        """
        if split not in self.evaluated:
            raise UsageError(f"there is no {split} data to evaluate on: give Trainer(..., {split}=...)")
        with self._averaged(), self.device.explain_errors(self.batches.batch_size):
            found = evaluate(
                self.model,
                self.evaluated[split],
                self.task,
                self.device,
                self._test_forward,
                self.group,
                check=self._stop_if_asked,
                collective_forward=self.strategy.collective_forward,
            )
        if split == self.selects_on:
            self.last_evaluation, self.evaluated_at = found, (self.step, found.values)
        return found

    def predict(self, data: Any) -> Tensor:
        """Return the task's predictions for each sample of `data`, in its order, on the CPU.

        Args:
            data: a source, a Dataset, or a tensor of inputs (samples, …).
        """
        source = ArraySource(data, torch.zeros(len(data), dtype=torch.int64)) if isinstance(data, Tensor) else data
        batches = Batches(
            as_source(source),
            self.batches.batch_size,
            self.device,
            self.pipeline,
            train=False,
            rank=self.group.rank,
            world_size=self.group.size,
        )
        with self._averaged(), self.device.explain_errors(self.batches.batch_size):
            collective = self.strategy.collective_forward
            return predict(self.model, batches, self.task, self.device, self._test_forward, self.group, collective)

    @property
    def _test_forward(self) -> Forward:
        return with_tta(self.strategy, self.settings.test_views)

    def _averaged(self) -> AbstractContextManager[Any]:
        """Return a context in which the model has its averaged weights, if any are kept."""
        self._settle()
        return nullcontext() if self.ema is None else self.ema.swap(self.model)

    @property
    def unit(self) -> str:
        """What people call the samples."""
        shape = self.seen_data()["shape"]
        return "images" if shape is None or len(shape) == 3 else "samples"

    def _stop_if_asked(self) -> None:
        """Let a signal end an evaluation, which is repeated after a resume."""
        if self._asked() & _STOP:
            raise StopNow

    # ------------------------------------------------------------------------------------------------ save and go on

    def state_dict(self) -> dict[str, Any]:
        """Return all that the run needs to go on, beside the weights; there is no random state in it."""
        return {
            "step": self.step,
            "epochs_done": self.epochs_done,
            "ended": self._ended,
            "best": None if self.best is None else asdict(self.best),
            "sums": self.sums.state_dict(),
            "guard": self.guard.state_dict(),
            "skipped": self.skipped,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "metrics_lines": self.run.metrics_lines if self.run is not None else 0,
            "data": self.seen_data(),
            "identity": self.identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` stood."""
        self.step, self.epochs_done = state["step"], state["epochs_done"]
        self.best = None if state["best"] is None else Best(**state["best"])
        self.sums.load_state_dict(state["sums"])
        self.guard.load_state_dict(state["guard"])
        self.skipped = dict(state["skipped"])
        self._ended = state.get("ended", self.step)
        self.evaluated_at = (-1, {})
        self.strategy.load_state(self.optimizer, state["optimizer"])
        if self.graph is not None:
            self.graph.forget()
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=False):
            callback.load_state_dict(saved)

    def seen_data(self) -> dict[str, Any]:
        """Return what a prediction on new data must know of the data that was trained on."""
        source = self.batches.source
        return {
            "classes": list(source.classes),
            "shape": list(source.inputs.shape[1:]) if isinstance(source, ArraySource) else None,
            "mean": None if self.pipeline.mean is None else list(self.pipeline.mean),
            "std": None if self.pipeline.std is None else list(self.pipeline.std),
        }

    def identity(self) -> identity.Identity:
        """Return what this run's bits depend on."""
        source = self.batches.source
        return processor.identity(self.device.device) | {
            "data": source.fingerprint(),
            **{f"{name}_data": part.source.fingerprint() for name, part in self.evaluated.items()},
            "samples": len(source),
            "seed": self.settings.seed,
            "batch_size": self.batches.batch_size,
            "replicas": self.replicas,
            "precision": self.device.settings.precision,
        }

    def save(self, *, training_continues: bool = False) -> None:
        """Save a checkpoint; only the copy to memory holds training up.

        Args:
            training_continues: only training steps change the weights from here on; then most of the copying doesn't
                hold training up, either.

        Raises:
            RelayError: an earlier one could not be written, or a loss up to here wasn't finite.
        """
        if self.folder is None:
            return
        self.guard.read()
        began = time.perf_counter()
        at, values = self.evaluated_at
        values = values if at == self.step else {}
        contents = Contents(
            step=self.step,
            model=self.strategy.full_state(self.model.state_dict()),
            state=self.strategy.full_state(self.state_dict()),
            ema=self.strategy.full_state(self.ema.state_dict()) if self.ema is not None else None,
            score=self._score(values) if self.task.headline in values else None,
            metrics=values,
            weights=tuple(name for name, _ in self.model.named_parameters()),
            trained=tuple(name for name, weight in self.model.named_parameters() if weight.requires_grad),
        )
        self._save_is_due = False
        if self.run is not None:
            self.checkpointer.save(contents, training_continues=training_continues)
            stood_still = 1000 * (time.perf_counter() - began)
            self.run.note(f"saving after step {self.step:,}; training stood still for {stood_still:.1f} ms")

    def _settle(self, *, trained: bool = False) -> None:
        """Let a checkpoint that is being copied have its weights before they change."""
        self.checkpointer.settle(trained=trained)

    def load(self, which: str = "best") -> Path:
        """Load the weights of one of the run's checkpoints, to evaluate or to predict with them.

        Args:
            which: "best", "last" or a step's number.

        Returns:
            The checkpoint's folder.
        """
        if self.folder is None:
            raise UsageError("this trainer has no run folder to load from: give Trainer(..., run=...)")
        path = self.checkpointer.find(which)
        self.load_weights(read(path))
        return path

    def load_weights(self, contents: Contents) -> None:
        """Take over a checkpoint's weights, the averaged ones included."""
        self._settle()
        try:
            self.strategy.load_state(self.model, contents.model)
        except RuntimeError as error:
            name = self.strategy.model_name
            raise RelayError(
                f"the checkpoint's weights don't fit {name}: {str(error).splitlines()[-1].strip()}"
            ) from error
        if self.ema is not None and contents.ema is not None:
            self.strategy.load_state(self.ema, contents.ema)


def _own_record(trainer: Trainer) -> dict[str, Any]:
    """Return what goes into recipe.toml where the trainer was built from Python."""
    return {
        "run": trainer.settings.model_dump(mode="json", exclude_none=True),
        "data": {"name": trainer.batches.source.name, "batch_size": trainer.batches.batch_size},
        "model": {"name": trainer.strategy.model_name},
        "device": trainer.device.settings.model_dump(mode="json", exclude_none=True),
        "environment": {"started_from": "python", "torch": torch.__version__},
    }
