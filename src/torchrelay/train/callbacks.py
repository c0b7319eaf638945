"""Step 7: what may happen around a step. All hooks are on this page, eight of them, each with when it is called."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from torchrelay.data.batch import Batch
from torchrelay.errors import RelayError, UsageError
from torchrelay.run.folder import RunFolder
from torchrelay.run.settings import RunSettings
from torchrelay.tasks.task import Task


class Training(Protocol):
    """What a callback sees of the trainer; a loop of one's own may offer the same."""

    model: nn.Module
    task: Task
    settings: RunSettings

    @property
    def run(self) -> RunFolder | None:
        """The open run folder: on rank 0, if the trainer has one."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the model's parameters."""

    @property
    def selects_on(self) -> str:
        """The part of the data by which the best model is selected: "validation", "test" or "train"."""

    def stop(self, reason: str) -> None:
        """End the training after this step or epoch; the run counts as done."""

    def say(self, text: str) -> None:
        """Write a line to the terminal and to the run's log."""

    def record_line(self, split: str, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""


class Callback:
    """Override what you need: a method that isn't overridden costs nothing in a step, one that is what it computes.

    A callback with a state of its own also overrides the last two methods.
    """

    def on_start(self, trainer: Training) -> None:
        """Called once before the first step, after a resume has restored its checkpoint."""

    def on_epoch_start(self, trainer: Training, epoch: int) -> None:
        """Called before the first step of each epoch (counted from 1); not if a run is resumed inside it."""

    def on_batch(self, trainer: Training, batch: Batch) -> None:
        """Called before each optimizer step, with this process's part of the global batch."""

    def on_gradients(self, trainer: Training) -> None:
        """Called before each update: the sum of all replicas' gradients, clipped, is in the parameters' `.grad`."""

    def on_step(self, trainer: Training, batch: Batch, loss: Tensor) -> None:
        """Called after each optimizer step. `loss` is on the device: reading its value waits for the device."""

    def on_evaluate(self, trainer: Training, split: str, values: dict[str, float]) -> None:
        """Called at an epoch's end, once all parts are evaluated, for each of them with its name and metrics."""

    def on_epoch(self, trainer: Training, epoch: int, values: dict[str, float]) -> None:
        """Called at the end of each epoch (counted from 1), after its evaluation, with its training metrics."""

    def on_end(self, trainer: Training) -> None:
        """Called once after the last step and its checkpoint; not if the run is interrupted or fails."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: tensors, numbers, strings, and dicts and lists of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


def step_hooks(callbacks: Sequence[Callback]) -> dict[str, list[Callback]]:
    """Return the callbacks that define each hook of a step; the others aren't called."""
    hooks = ("on_batch", "on_gradients", "on_step")
    return {
        hook: [each for each in callbacks if getattr(type(each), hook) != getattr(Callback, hook)] for hook in hooks
    }


def notify(callbacks: Sequence[Callback], hook: str, trainer: Training, *arguments: Any) -> None:
    """Call a hook of each callback.

    Raises:
        RelayError: one of them failed; the text says which, and where. Or it set a rate that the schedule sets anew.
    """
    for callback in callbacks:
        # Ours set no rates, and the check costs as much as such a hook.
        checked = hook != "on_gradients" and not type(callback).__module__.startswith("torchrelay.")
        rates = [group["lr"] for group in trainer.optimizer.param_groups] if checked else []
        try:
            getattr(callback, hook)(trainer, *arguments)
        except RelayError:
            raise
        except Exception as error:
            raise RelayError(
                f"the callback {type(callback).__name__} failed in {hook} after step {trainer.step}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if checked and any(
            now["lr"] is not rate for now, rate in zip(trainer.optimizer.param_groups, rates, strict=False)
        ):
            raise UsageError(
                f"the callback {type(callback).__name__} sets a group's 'lr' in {hook}, and the schedule sets it anew "
                "before each step: set 'initial_lr', which the schedule multiplies; or 'lr' in on_gradients, for a step"
            )


class EarlyStopping(Callback):
    """Ends the training when a metric has not improved for some evaluations.

    It watches the validation data if there is any, otherwise the test data.

    Args:
        patience: evaluations without improvement after which to stop.
        metric: its name; the task's headline metric if not given. Of other metrics, lower is better if the name ends
            in "loss" or "error".
        least: the smallest change that counts as an improvement.

    Raises:
        UsageError: the patience is not positive; or, at an evaluation, there is no such metric.
    """

    def __init__(self, patience: int, metric: str | None = None, least: float = 0.0) -> None:
        if patience < 1:
            raise UsageError(f"early stopping's patience is {patience}: choose 1 or more evaluations")
        self.patience = patience
        self.metric = metric
        self.least = least
        self.best: float | None = None
        self.waited = 0

    def on_start(self, trainer: Training) -> None:
        """Stop at once if the resumed run had waited long enough."""
        self._stop_if_waited(trainer)

    def on_evaluate(self, trainer: Training, split: str, values: dict[str, float]) -> None:
        """Count the evaluations since the last improvement."""
        if split != trainer.selects_on:
            return
        task = trainer.task
        name = self.metric or task.headline
        if name not in values:
            raise UsageError(f"early stopping watches '{name}', but an evaluation has only {', '.join(values)}")
        is_cost = name.endswith(("loss", "error"))
        higher_is_better = task.higher_is_better if name == task.headline else not is_cost
        value = values[name] if higher_is_better else -values[name]
        if math.isfinite(value) and (self.best is None or value > self.best + self.least):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        self._stop_if_waited(trainer)

    def _stop_if_waited(self, trainer: Training) -> None:
        if self.waited >= self.patience:
            name = self.metric or trainer.task.headline
            trainer.stop(f"early stopping: {name} has not improved for {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the number of evaluations since."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue waiting."""
        self.best, self.waited = state["best"], state["waited"]
