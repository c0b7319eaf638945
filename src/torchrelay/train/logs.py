"""Step 7: what people see of a run: its lines of text, the metrics of steps, TensorBoard's pictures, the plots."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.data.sources import ArraySource, Source
from torchrelay.distributed.replicas import device_counts
from torchrelay.errors import explained
from torchrelay.models.summary import summarize
from torchrelay.run import disk
from torchrelay.run.folder import RunFolder
from torchrelay.run.metrics import Headline, read_metrics
from torchrelay.run.terminal import Counters, Terminal, epoch_line, metric, step_line
from torchrelay.tasks.task import Task
from torchrelay.train import hints, hyperparameters, samples
from torchrelay.train.callbacks import Callback, Training
from torchrelay.train.evaluation import Evaluator
from torchrelay.train.progress import Best, Progress
from torchrelay.train.state import TrainingState

# Seconds between two drawings of the curves, which take a second or two of a core.
_REDRAW = 120.0
# Seconds from which a run's end has a report: its imports and its writing take one or two.
_REPORT = 60.0
_FIRST = "pictures/first batch"


class EarlyLog:
    """Says what is said before a run's log is open, and keeps it for the log.

    Args:
        terminal: where people read along.
        notes: what was said before.
        main: whether this process speaks.
    """

    def __init__(self, terminal: Terminal, notes: Sequence[str] = (), main: bool = True) -> None:
        self.terminal, self.notes = terminal if main else Terminal(quiet=True), list(notes)

    def say(self, text: str) -> None:
        """Write a line to the terminal, and keep it."""
        self.terminal.say(text)
        self.notes.append(text)


class StepLog(Callback):
    """Writes a line of metrics each `run.log_every`: the mean loss since the last, the rates, what was logged.

    Args:
        progress: which knows what was logged.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.last: float | None = None
        self._samples = 0
        self._since = 0.0

    def on_start(self, trainer: Training) -> None:  # noqa: ARG002
        """Start the clock."""
        self._samples, self._since = 0, time.perf_counter()

    def on_step(self, trainer: Training, batch: Batch, loss: Tensor) -> None:
        """Keep the loss without reading it; where a line is due, read and record."""
        if trainer.run is None:
            return
        record, norm = self._progress.logged, self._progress.grad_norm
        # On the CPU as a number: small tensors that outlive their step fragment the heap.
        record.losses.append(loss.item() if loss.is_cpu else loss)
        if norm is not None:
            record.norms.append(norm.item() if norm.is_cpu else norm)
        self._samples += batch.size
        if not self._progress.lines.due:
            return
        now = time.perf_counter()
        tail = self._progress.tail()
        self.last = math.fsum(tail.losses) / len(tail.losses)
        rates = {
            "lr": float(trainer.optimizer.param_groups[0]["lr"]),
            "samples_per_second": round(self._samples / (now - self._since), 1),
        }
        logged = self._progress.sums.lap() | record.take_scalars()
        trainer.record_line("step", {"loss": self.last, **rates, **logged})
        for (kind, name), value in record.take_media().items():
            trainer.run.tensorboard.show(kind, name, value, trainer.step)
        trainer.run.receipt.add(trainer.step, tail)
        record.losses.clear()
        record.norms.clear()
        self._samples, self._since = 0, now

    def state_dict(self) -> dict[str, Any]:
        """Return the losses and the gradient's norms, and what callbacks have logged, since the last line."""
        record = self._progress.logged
        logged = {name: [float(total), float(count)] for name, (total, count) in record.scalars.items()}
        losses = record.read_losses()
        norms = {"norms": list(record.norms)} if record.norms else {}
        return {"losses": losses} | ({"logged": logged} if logged else {}) | norms

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue to collect."""
        record = self._progress.logged
        record.losses, record.norms = list(state["losses"]), list(state.get("norms", ()))
        logged = state.get("logged", {})
        record.scalars = {name: (total, count) for name, (total, count) in logged.items()}


class Pictures(Callback):
    """What a run's folder shows a person: pictures in TensorBoard, the model's summary, plots, the evaluation.

    Args:
        batches: of the training data.
        evaluator: whose last evaluation is shown.
        progress: where the run stands.
        task: whose headline metric the plots show.
        record: the run's recipe, for TensorBoard.
    """

    def __init__(
        self,
        batches: Batches,
        evaluator: Evaluator,
        progress: Progress,
        task: Task,
        record: dict[str, Any],
    ) -> None:
        self._batches, self._evaluator, self._progress = batches, evaluator, progress
        self._task = task
        self._headline = Headline(task.headline, task.percent, task.higher_is_better)
        self._record = record
        self._drawn_at, self._began = -math.inf, time.monotonic()
        self._first_loss: float | None = None
        self._warned = False

    def on_start(self, trainer: Training) -> None:
        """Show the first batch as the model sees it, and what the model costs."""
        run = trainer.run
        if self._progress.step == 0:
            for hint in hints.at_start(self._batches, trainer.task, self._progress.total_steps):
                trainer.say(hint)
        if run is None:
            return
        run.plots.prepare()
        resumed = self._progress.step > 0
        shows = not resumed or self._lacks_picture(run)
        summarizes = not resumed or self._lacks_summary(run)
        if not shows and not summarizes:
            return
        batch, pipeline = next(self._batches.epoch(0)), self._batches.pipeline
        if shows:
            run.tensorboard.images(_FIRST, batch.inputs, pipeline.mean, pipeline.std, step=0)
        if summarizes:
            self._summarize(trainer, run, batch)

    def _summarize(self, trainer: Training, run: RunFolder, batch: Batch) -> None:
        """Say what the model costs, layer by layer in model.txt."""
        if self._evaluator.collective_forward:
            run.say("no summary of the model: its weights are divided over several processes")
        elif isinstance(batch.inputs, Tensor):
            path = run.path / "model.txt"
            try:
                summary = summarize(trainer.model, batch.inputs[:1])
                disk.write(path, f"{summary}\n")
            except OSError as error:
                run.say(f"warning: {path} can't be written ({error.strerror}): the next resume does it")
                return
            except Exception as error:  # noqa: BLE001 - any model may raise anything, and no summary is worth a run
                run.say(f"no summary of the model: {type(error).__name__}: {error}")
                return
            run.say(
                f"a sample takes {summary.flops / 1e6:,.1f} MFLOP forward and "
                f"{summary.activation_bytes / 2**20:.2f} MiB of activations; {summary.trainable:,} parameters are "
                f"trained (layers in {path})"
            )

    def _lacks_picture(self, run: RunFolder) -> bool:
        """Likewise for the picture of the first batch, of images in memory: others would have to be read again."""
        inputs = getattr(self._batches.source, "inputs", None)
        return isinstance(inputs, Tensor) and inputs.ndim == 4 and run.tensorboard.lacks(_FIRST)

    def _lacks_summary(self, run: RunFolder) -> bool:
        """Return whether a resumed run has no summary and can make one: the disk may have failed when it began."""
        can = self._batches.stream is None and not self._evaluator.collective_forward
        return can and not (run.path / "model.txt").exists()

    def on_epoch(self, trainer: Training, epoch: int, values: dict[str, float]) -> None:  # noqa: ARG002
        """Say once that the loss is absurd; redraw the curves now and then; the last epoch's are drawn by `on_end`."""
        self._first_loss = self._first_loss or values["loss"]
        lr = float(trainer.optimizer.param_groups[0]["initial_lr"])
        if not self._warned and (hint := hints.of_loss(trainer.task, values["loss"], self._first_loss, lr)):
            self._warned = True
            trainer.say(hint)
        run, progress = trainer.run, self._progress
        ends = progress.step == progress.total_steps or progress.stop_reason is not None
        if run is None or ends or run.plots.drawing:
            return
        if time.monotonic() - self._drawn_at > _REDRAW:
            run.plots.start(self._headline)
            self._drawn_at = time.monotonic()

    def on_end(self, trainer: Training) -> None:
        """Write the last evaluation, draw the plots, write the page, and give TensorBoard the settings."""
        if trainer.run is not None:
            report = trainer.settings.report
            if report is None:
                report = time.monotonic() - self._began >= _REPORT
            self._write(trainer.run, self._batches.source.classes, report=report)

    def _write(self, run: RunFolder, classes: Sequence[str], *, report: bool) -> None:
        last = self._evaluator.last
        if last is not None:
            step = self._progress.step  # not the best one's
            found = {"step": step, "epoch": self._progress.epoch_of(step)} | last.to_json(classes)
            text = json.dumps(found, indent=1, ensure_ascii=False)
            path = run.path / "evaluation.json"
            with explained(f"write {path}"):
                path.write_text(text + "\n", encoding="utf-8")
            self._write_samples(run, step)
        has_confusion = last is not None and last.confusion is not None
        run.tensorboard.flush()  # the page shows the first batch
        run.plots.start(self._headline, confusion=has_confusion, report=report)
        if run.tensorboard.lost:
            run.tensorboard.retry(read_metrics(run.path))
        run.tensorboard.hyperparameters(hyperparameters.of(self._record))
        if run.plots.finish() and has_confusion:
            picture = run.path / "confusion.png"
            run.tensorboard.figure("pictures/confusion matrix", picture, step=self._progress.step)

    def _write_samples(self, run: RunFolder, step: int) -> None:
        """Write what the last evaluation found of each sample; say why where nothing was kept."""
        path, found = run.path / samples.NAME, self._evaluator.samples
        if found is None or not found.columns:
            with explained(f"remove {path}"):
                path.unlink(missing_ok=True)  # of a run that was shorter
            if found is not None and found.missing:
                run.note(f"no {samples.NAME}: {found.missing}")
            return
        found.write(path, self._task, self._evaluator.selects_on, step, self._progress.epoch_of(step))


def introduction(state: TrainingState, name: str) -> str:
    """Return the first line of a run: the model, the data, the device, and on how many devices it can continue."""
    source, replicas = state.batches.source, state.batches.replicas
    shared = f", in {replicas} replicas: it can continue on {device_counts(replicas)} devices"
    ungraphed = "; device.graph is off, as it records steps of one replica"
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    return (
        f"{name} ({parameters:,} parameters) on {source.name} ({amount(source)}), "
        f"{state.progress.total_steps:,} steps on {state.train_step.device.describe()}"
        f"{shared * (replicas > 1)}{ungraphed * (replicas > 1 and state.batches.device.settings.graph)}"
    )


def amount(source: Source) -> str:
    """Return the number of samples in words."""
    return f"{len(source):,} samples" if len(source) else "unknown length"


def description(state: TrainingState, folder: Path | None) -> str:
    """Return what a trainer shows of itself: the model, the data, and where it stands."""
    source, progress = state.batches.source, state.progress
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    return (
        f"{state.strategy.model_name} with {parameters:,} parameters, {amount(source)} of {source.name}, "
        f"step {progress.step:,} of {progress.total_steps:,}, {'no run folder' if folder is None else f'run {folder}'}"
    )


def counters(progress: Progress) -> Counters:
    """Return what the progress bar shows; its own thread asks, so a step costs nothing."""
    return Counters(
        epoch=min(progress.epochs_done + 1, progress.epochs),
        epochs=progress.epochs,
        step=progress.step,
        steps=progress.total_steps,
        samples=progress.stopwatch.total,
        loss=progress.last_loss,
        phase=progress.phase,
    )


def unit(batches: Batches) -> str:
    """Return what people call the samples."""
    source = batches.source
    are_images = source.inputs.ndim == 4 if isinstance(source, ArraySource) else source.files is not None
    return "images" if are_images else "samples"


def step_text(step: int, task: Task, splits: Mapping[str, Mapping[str, float]]) -> str:
    """Return the line that sums up an evaluation within an epoch."""
    return step_line(step, splits, headline=task.headline, percent=task.percent)


def epoch_text(
    state: TrainingState, task: Task, epoch: int, splits: Mapping[str, Mapping[str, float]], times: Mapping[str, float]
) -> str:
    """Return the line that sums up an epoch, counted from 1: the metrics of its splits, and how fast it was."""
    return epoch_line(
        epoch,
        state.progress.epochs,
        splits,
        headline=task.headline,
        percent=task.percent,
        rate=times["samples_per_second"],
        seconds=times["seconds"],
        unit=unit(state.batches),
    )


def best_text(best: Best, task: Task, selects_on: str) -> str:
    """Return the last line of a run: its best evaluation."""
    value = metric(best.value, task.percent).strip()
    # A model that is chosen by the test data looks better on it than on new data.
    chosen = "; selected on the test data" if selects_on == "test" else ""
    return f"best {selects_on} {task.headline.replace('_', ' ')}: {value} (epoch {best.epoch}{chosen})"
