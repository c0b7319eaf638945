"""Step 7: what may happen around a step. All hooks are on this page, five of them, each with when it is called."""

import json
import math
import time
from typing import TYPE_CHECKING, Any

from torchrelay.errors import UsageError
from torchrelay.run.metrics import Headline
from torchrelay.run.terminal import epoch_line

if TYPE_CHECKING:
    from torch import Tensor

    from torchrelay.data.batch import Batch
    from torchrelay.train.trainer import Trainer


_REDRAW = 120.0  # seconds between two drawings of the curves, each of which takes a second or two from the training


class Callback:
    """Override what you need. A callback with a state of its own also overrides the last two methods."""

    def on_start(self, trainer: "Trainer") -> None:
        """Called once before the first step, after a checkpoint was loaded if the run goes on with one."""

    def on_step(self, trainer: "Trainer", batch: "Batch", loss: "Tensor") -> None:
        """Called after each optimizer step. `loss` is on the device: reading its value waits for the device."""

    def on_evaluate(self, trainer: "Trainer", split: str, values: dict[str, float]) -> None:
        """Called for each part of an epoch's end that was tested, once all are, with its name and its metrics."""

    def on_epoch(self, trainer: "Trainer", epoch: int, values: dict[str, float]) -> None:
        """Called at the end of each epoch (counted from 1), after its evaluation, with its training metrics."""

    def on_end(self, trainer: "Trainer") -> None:
        """Called once after the last step and its checkpoint; not if the run is stopped or fails."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep: tensors, numbers, strings, and dicts and lists of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


class EarlyStopping(Callback):
    """End the training when a metric has not improved for some evaluations.

    It goes by the validation part where there is one, otherwise by the test part.

    Args:
        patience: evaluations without improvement after which to stop.
        metric: its name; the task's headline metric if unset. Of any other metric, a loss or an error is better lower.
        least: an improvement counts if it is larger than this.
    """

    def __init__(self, patience: int, metric: str | None = None, least: float = 0.0) -> None:
        if patience < 1:
            raise UsageError(f"early stopping's patience is {patience}: choose 1 or more evaluations")
        self.patience = patience
        self.metric = metric
        self.least = least
        self.best: float | None = None
        self.waited = 0

    def on_start(self, trainer: "Trainer") -> None:
        """End a run at once that has waited long enough before it was resumed."""
        self._stop_if_waited(trainer)

    def on_evaluate(self, trainer: "Trainer", split: str, values: dict[str, float]) -> None:
        """Count the evaluations since the last improvement."""
        if split != trainer.selects_on:
            return
        name = self.metric or trainer.task.headline
        if name not in values:
            raise UsageError(f"early stopping watches '{name}', but an evaluation gives: {', '.join(values)}")
        is_cost = name.endswith(("loss", "error"))
        higher_is_better = trainer.task.higher_is_better if name == trainer.task.headline else not is_cost
        value = values[name] if higher_is_better else -values[name]
        if math.isfinite(value) and (self.best is None or value > self.best + self.least):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        self._stop_if_waited(trainer)

    def _stop_if_waited(self, trainer: "Trainer") -> None:
        if self.waited >= self.patience:
            name = self.metric or trainer.task.headline
            trainer.stop(f"early stopping: {name} has not improved for {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far and how long ago it was."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting."""
        self.best, self.waited = state["best"], state["waited"]


class StepLog(Callback):
    """Writes a line of metrics each `run.log_every` steps: the mean loss since the last one, the rates."""

    def __init__(self) -> None:
        self.last: float | None = None  # the last mean loss recorded
        self._losses: list[Tensor | float] = []
        self._samples = 0
        self._since = 0.0

    def on_start(self, trainer: "Trainer") -> None:  # noqa: ARG002
        """Start the clock."""
        self._samples, self._since = 0, time.perf_counter()

    def on_step(self, trainer: "Trainer", batch: "Batch", loss: "Tensor") -> None:
        """Note the loss, without reading it; each `log_every` steps, read and record."""
        if trainer.run is None:
            return
        # On the CPU as a number: small tensors that are kept fragment the heap.
        self._losses.append(loss.item() if loss.is_cpu else loss)
        self._samples += batch.size
        if trainer.step % trainer.settings.log_every:
            return
        now = time.perf_counter()
        values = {
            "loss": math.fsum(map(float, self._losses)) / len(self._losses),
            "lr": float(trainer.optimizer.param_groups[0]["lr"]),
            "samples_per_second": round(self._samples / (now - self._since), 1),
        }
        self.last = values["loss"]
        trainer.record_line("step", values)
        self._losses.clear()
        self._samples, self._since = 0, now

    def state_dict(self) -> dict[str, Any]:
        """Return the losses since the last line."""
        return {"losses": [float(loss) for loss in self._losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on collecting."""
        self._losses = list(state["losses"])


class Pictures(Callback):
    """What the run folder shows a person: TensorBoard's pictures and curves.png."""

    def __init__(self) -> None:
        self._drawn_at = -math.inf

    def on_start(self, trainer: "Trainer") -> None:
        """Show the first batch as the model sees it, and what the model costs."""
        if trainer.run is None or trainer.step > 0:
            return
        batch = next(trainer.batches.epoch(0))
        pipeline = trainer.batches.pipeline
        trainer.run.tensorboard.images("pictures/first batch", batch.inputs, pipeline.mean, pipeline.std, step=0)
        if trainer.strategy.collective_forward:  # the other processes would have to go through the model, too
            trainer.say("no summary of the model: its weights are divided over several processes")
            return
        self._summarize(trainer, batch)

    def _summarize(self, trainer: "Trainer", batch: "Batch") -> None:
        """Say what a model of one tensor costs, and write its table to model.txt."""
        from torchrelay.models.summary import summarize

        if trainer.run is None or not hasattr(batch.inputs, "shape"):
            return
        try:
            found = summarize(trainer.model, batch.inputs[:1])
        except Exception as error:  # noqa: BLE001 - a user's model may raise anything, and its table is worth no run
            trainer.say(f"no summary of the model: {type(error).__name__}: {error}")
            return
        (trainer.run.path / "model.txt").write_text(f"{found}\n", encoding="utf-8")
        trainer.say(
            f"a sample takes {found.flops / 1e6:,.1f} MFLOP forward and {found.activation_bytes / 2**20:.2f} MiB of "
            f"activations; {found.trainable:,} parameters are trained (layers in {trainer.run.path / 'model.txt'})"
        )

    def on_epoch(self, trainer: "Trainer", epoch: int, values: dict[str, float]) -> None:  # noqa: ARG002
        """Draw the curves so far, now and then."""
        ends = trainer.step == trainer.total_steps or trainer.stop_reason is not None  # and on_end draws
        if trainer.run is None or ends or trainer.run.plots.busy:
            return
        if time.monotonic() - self._drawn_at > _REDRAW:
            trainer.run.plots.start(_headline(trainer))
            self._drawn_at = time.monotonic()

    def on_end(self, trainer: "Trainer") -> None:
        """Show the confusion matrix, and the settings with what they led to; write down the last evaluation."""
        if trainer.run is None:
            return
        last = trainer.last_evaluation
        if last is not None:
            found = json.dumps(last.to_json(trainer.classes), indent=1, ensure_ascii=False)
            (trainer.run.path / "evaluation.json").write_text(found + "\n", encoding="utf-8")
        has_confusion = last is not None and last.confusion is not None
        trainer.run.plots.start(_headline(trainer), confusion=has_confusion)
        values = last.values if last is not None else {}
        trainer.run.tensorboard.hyperparameters(
            _flat(trainer.record), {f"{k}/{trainer.selects_on}": v for k, v in values.items()}
        )
        if trainer.run.plots.finish() and has_confusion:
            picture = trainer.run.path / "confusion.png"
            trainer.run.tensorboard.figure("pictures/confusion matrix", picture, step=trainer.step)


def epoch_text(trainer: "Trainer", epoch: int, splits: dict[str, dict[str, float]], clock: dict[str, float]) -> str:
    """Return what people read of an epoch: what its parts came to, and how fast it was."""
    return epoch_line(
        epoch,
        trainer.settings.epochs,
        splits,
        headline=trainer.task.headline,
        percent=trainer.task.percent,
        rate=clock["samples_per_second"],
        seconds=clock["seconds"],
        unit=trainer.unit,
    )


def _headline(trainer: "Trainer") -> Headline:
    return Headline(trainer.task.headline, trainer.task.percent, trainer.task.higher_is_better)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Return a table of sections as values by dotted name, without those of the environment."""
    return {
        f"{section}.{key}": value
        for section, values in record.items()
        for key, value in values.items()
        if section != "environment"
    }
