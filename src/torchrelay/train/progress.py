"""Step 7: where a run stands, and the sums of its running epoch."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.run.receipt import Tail
from torchrelay.train.clock import Lines, Stopwatch
from torchrelay.train.record import Logged, Record
from torchrelay.train.step import StepResult

# Steps whose sums may stay on the device unread: an epoch can have millions.
_UNREAD = 1024
# The end of the name under which a sum's count is kept.
_COUNT = "/count"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; its epoch is counted from 1."""

    value: float
    epoch: int


class RunningSums:
    """Sums of loss and measures over batches, kept on the device until they are read.

    They are added one after another in float64, so the moment of reading changes no bit. With several processes, they
    are added in the order in which a single process would have computed them.

    Args:
        group: the process group, whose members all read at the same time; None: this process alone.
        per_step: how many sets of measures each process adds a step.
    """

    def __init__(self, group: ProcessGroup | None = None, per_step: int = 1) -> None:
        self._group, self._per_step = group, per_step
        self._is_shared = group is not None and group.size > 1
        self._losses: list[tuple[Tensor | float, Tensor | float]] = []
        self._measures: list[tuple[dict[str, Tensor | float], Tensor | float]] = []
        self._logged: list[dict[str, Tensor | float]] = []
        self.loss = 0.0
        self.weight = 0.0
        self.measures: dict[str, float] = {}
        self.count = 0
        self.logged: dict[str, float] = {}  # sums by name, and the counts of what they add up
        self._lap: dict[str, float] = {}  # `logged` at the last line of metrics

    def add_loss(self, mean: Tensor, weight: Tensor | float) -> None:
        """Add a batch's mean loss, weighted by what its summed loss was divided by."""
        self._losses.append((_unfragmented(mean), _unfragmented(weight)))
        if len(self._losses) >= _UNREAD:
            self.read()

    def add_measures(self, measures: Mapping[str, Tensor], count: Tensor | int) -> None:
        """Add measures that are summed over `count` items."""
        self._measures.append(({name: _unfragmented(value) for name, value in measures.items()}, _unfragmented(count)))

    def add_logged(self, logged: Logged) -> None:
        """Add what a replica has logged; several processes add equally many, the empty ones as well."""
        if not logged and not self._is_shared:
            return
        values = {name: _unfragmented(value) for name, (value, _) in logged.items()}
        self._logged.append(values | {name + _COUNT: _unfragmented(count) for name, (_, count) in logged.items()})

    def read_logged(self) -> None:
        """Add up what was logged and is unread; several processes call it at the same time."""
        self.logged = self._added(self._logged, self.logged)
        self._logged.clear()

    def read(self) -> None:
        """Add up what is unread, which waits for the device."""
        for loss, weight in self._losses:
            # A mean over no samples is not a number.
            self.loss += float(loss) * float(weight) if float(weight) else 0.0
            self.weight += float(weight)
        measured = [values | {_COUNT: count} for values, count in self._measures]
        sums = self._added(measured, {**self.measures, _COUNT: float(self.count)})
        self.count, self.measures = int(sums.pop(_COUNT)), sums
        self._losses.clear()
        self._measures.clear()
        self.read_logged()

    def _added(self, rows: list[dict[str, Tensor | float]], before: dict[str, float]) -> dict[str, float]:
        """Return sums with all processes' rows added, one after another in the order of one process."""
        names = list(dict.fromkeys(name for row in rows for name in row) | dict.fromkeys(before))
        group = self._group if self._is_shared and rows else None
        if group is not None:
            # A process that has had no sample yet doesn't know the names.
            names = json.loads(group.broadcast_bytes(json.dumps(names).encode()))
        own = [[float(row.get(name, 0.0)) for name in names] for row in rows]
        table = np.array(own, dtype=np.float64).reshape(len(own), len(names))
        if group is not None and names:
            gathered = group.gather(torch.from_numpy(table)).numpy()
            # Within a step the last rank's rows come first, as the last replica is computed first.
            steps = gathered.reshape(group.size, len(own) // self._per_step, self._per_step, len(names))
            table = steps[::-1].transpose(1, 0, 2, 3).reshape(-1, len(names))
        # NumPy's `accumulate` adds one after another, as a loop would; its `sum` adds in pairs.
        start = np.array([[before.get(name, 0.0) for name in names]], dtype=np.float64)
        return dict(zip(names, np.add.accumulate(np.vstack([start, table]), axis=0)[-1].tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Return the mean loss, the mean measures and the means of what was logged, of everything added."""
        self.read()
        values = {"loss": self.loss / self.weight if self.weight else 0.0}
        measures = {name: value / max(self.count, 1) for name, value in self.measures.items()}
        return values | measures | _logged_means(self.logged, {})

    def lap(self) -> dict[str, float]:
        """Return the means of what was logged since the last lap, of what has been read."""
        before, self._lap = self._lap, dict(self.logged)
        return _logged_means(self.logged, before)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint inside an epoch."""
        self.read()
        state = {"loss": self.loss, "weight": self.weight, "measures": dict(self.measures), "count": self.count}
        return state | ({"logged": dict(self.logged), "lap": dict(self._lap)} if self.logged else {})

    def clear(self) -> None:
        """Start again from zero."""
        self._losses.clear()
        self._measures.clear()
        self._logged.clear()
        self.loss, self.weight, self.count, self.measures = 0.0, 0.0, 0, {}
        self.logged, self._lap = {}, {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the sums of a checkpoint."""
        self.clear()
        self.loss, self.weight, self.count = state["loss"], state["weight"], state["count"]
        self.measures = dict(state["measures"])
        self.logged, self._lap = dict(state.get("logged", {})), dict(state.get("lap", {}))


def _logged_means(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Return the means by name of what was added between two states of the sums."""
    grown = {name: value - before.get(name, 0.0) for name, value in now.items()}
    return {
        name: value / grown[name + _COUNT]
        for name, value in grown.items()
        if not name.endswith(_COUNT) and grown[name + _COUNT]
    }


def _unfragmented(value: Tensor | float) -> Tensor | float:
    """Return a tensor on the CPU as a number, anything else unchanged.

    Small tensors that outlive their step fragment the heap between the large ones of later steps, which then grows.
    """
    return value.item() if isinstance(value, Tensor) and value.is_cpu else value


class Progress:
    """Where a run stands: the only state that moves beside the weights and the optimizer.

    Args:
        epochs: of the whole run.
        steps_per_epoch: global batches of an epoch.
        max_steps: the step after which the run ends early; None: after all epochs.
        steps: of the whole run, in place of epochs.
        sums: of the running epoch's loss and measures.
        lines: when a line of metrics is written.

    Attributes:
        total_steps: of the whole run.
        step: optimizer steps taken; the position within the epoch follows from it.
        epochs_done: epochs trained and evaluated.
        best: the best evaluation so far.
        skipped: steps, counted from 1, whose batch was left out after a loss spike, with the batch's sample indices.
        stop_reason: why the run ends before its last epoch.
        interrupted: whether a signal stops this session; a resume continues it.
        evaluated_at: after which step the model was last evaluated, the metrics, and the score: higher is better.
        stopwatch: of the running epoch, for people.
        last_loss: the last mean loss on record, for people.
        logged: what `tr.log` was given, except by the replicas.
        grad_norm: of the last step, where it is computed.
        phase: what happens instead of training, such as "evaluating"; for people.
        lines: when a line of metrics is written.
    """

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int,
        max_steps: int | None = None,
        sums: RunningSums | None = None,
        lines: Lines | None = None,
        steps: int | None = None,
    ) -> None:
        self.lines = lines or Lines()
        self.epochs = -(-steps // steps_per_epoch) if steps is not None else epochs
        self.steps_per_epoch, self.max_steps = steps_per_epoch, max_steps
        self.total_steps = self.epochs * steps_per_epoch if steps is None else steps
        self.step = 0
        self.epochs_done = 0
        self.best: Best | None = None
        self.skipped: dict[int, list[int]] = {}
        self.sums, self.logged = sums or RunningSums(), Record()
        self.stop_reason: str | None = None
        self.interrupted = False
        self.evaluated_at: tuple[int, dict[str, float], float | None] = (-1, {}, None)
        self.stopwatch = Stopwatch()
        self.last_loss: float | None = None
        self.grad_norm: Tensor | None = None
        self.phase = ""
        self._epoch_ended_at = 0
        self._pause_at: int | None = None

    def epoch_of(self, step: int) -> int:
        """Return in which epoch, counted from 1, a step is; it is counted from 1 too."""
        return -(-step // self.steps_per_epoch)

    @property
    def position(self) -> int:
        """How many batches of the running epoch are done."""
        return self.step - self.epochs_done * self.steps_per_epoch

    @property
    def continues(self) -> bool:
        """Whether there is another step to take, or an epoch to end."""
        is_over = self.at_limit and self._epoch_ended_at == self.step
        return self.epochs_done < self.epochs and self.stop_reason is None and not is_over and not self.interrupted

    @property
    def limit(self) -> int:
        """The step after which the run is done: `max_steps`, or all its steps."""
        return min(self.max_steps or self.total_steps, self.total_steps)

    def pause_after(self, step: int) -> None:
        """Let this session end after a step at which an evaluation is due; the run isn't done, and may be resumed.

        What the run computes is the same as if it had never paused. A step at or after the run's end has no effect.
        """
        self._pause_at = step if step < self.limit else None

    @property
    def is_paused(self) -> bool:
        """Whether the run has reached the step of `pause_after`."""
        return self._pause_at is not None and self.step >= self._pause_at

    @property
    def at_limit(self) -> bool:
        """Whether the run has taken `max_steps`, or all its steps, or is paused."""
        return self.step >= self.limit or self.is_paused

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last batch of an epoch was the last one."""
        return self.step == (self.epochs_done + 1) * self.steps_per_epoch

    @property
    def ends(self) -> bool:
        """Whether the run ends after this step or epoch."""
        return self.stop_reason is not None or self.step >= self.total_steps

    def stop_at_limit(self) -> bool:
        """Stop the run after `max_steps` or where it pauses; return whether it ends, for this or any other reason."""
        if self.max_steps is not None and self.step >= self.max_steps:
            self.stop_reason = f"run.max_steps is {self.max_steps}"
        elif self.is_paused:
            self.stop_reason = "paused, to be resumed"
        return self.stop_reason is not None or self.step >= self.total_steps

    def record(self, result: StepResult, samples: int) -> None:
        """Count a step of so many samples, and add its loss and measures to the epoch's sums."""
        self.step += 1
        self.grad_norm = result.grad_norm
        self.stopwatch.count(samples)
        self.sums.add_loss(result.loss, result.weight)
        for measures, count in result.measures:
            self.sums.add_measures(measures, count)
        for logged in result.logged:
            self.sums.add_logged(logged)
        if self.lines.count(self.step):
            self.sums.read_logged()

    def tail(self) -> Tail:
        """Return the last steps, for the receipt."""
        losses = self.logged.read_losses()
        return Tail(losses, list(map(float, self.logged.norms)), self.skipped)

    def end_epoch(self) -> None:
        """Count the epoch, unless `max_steps` ended it before its last batch."""
        if self.at_epoch_end:
            self.epochs_done += 1
            self.sums.clear()
        self._epoch_ended_at = self.step

    def evaluated(self, values: dict[str, float], score: float | None) -> None:
        """Keep the metrics of an evaluation after this very step, with which a checkpoint is saved."""
        self.evaluated_at = (self.step, values, score)

    def is_best(self, value: float, epoch: int, *, higher_is_better: bool) -> bool:
        """Return whether an epoch's headline metric is the best so far, and keep it then; a NaN never is."""
        sign = 1 if higher_is_better else -1
        if not math.isfinite(value) or (self.best is not None and sign * value <= sign * self.best.value):
            return False
        self.best = Best(value, epoch)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands."""
        return {
            "step": self.step,
            "epochs_done": self.epochs_done,
            "ended": self._epoch_ended_at,
            "best": None if self.best is None else asdict(self.best),
            "sums": self.sums.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` stood."""
        self.step = state["step"]
        # The one epoch of an endless stream may now have more steps than when it was done.
        self.epochs_done = min(state["epochs_done"], self.step // self.steps_per_epoch)
        self._epoch_ended_at = state.get("ended", self.step)
        self.best = None if state["best"] is None else Best(**state["best"])
        self.sums.load_state_dict(state["sums"])
        self.skipped = dict(state["skipped"])
