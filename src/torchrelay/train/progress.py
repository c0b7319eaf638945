"""Step 7: where a run stands, and the sums of its running epoch."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.train.step import StepResult

# Steps whose sums may stay on the device unread: an epoch can have millions.
_UNREAD = 1024


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
        self._losses: list[tuple[Tensor | float, Tensor | float]] = []
        self._measures: list[tuple[dict[str, Tensor | float], Tensor | float]] = []
        self.loss = 0.0
        self.weight = 0.0
        self.measures: dict[str, float] = {}
        self.count = 0

    def add_loss(self, mean: Tensor, weight: Tensor | float) -> None:
        """Add a batch's mean loss, weighted by what its summed loss was divided by."""
        self._losses.append((_unfragmented(mean), _unfragmented(weight)))
        if len(self._losses) >= _UNREAD:
            self.read()

    def add_measures(self, measures: Mapping[str, Tensor], count: Tensor | int) -> None:
        """Add measures that are summed over `count` items."""
        self._measures.append(({name: _unfragmented(value) for name, value in measures.items()}, _unfragmented(count)))

    def read(self) -> None:
        """Add up what is unread, which waits for the device."""
        for loss, weight in self._losses:
            # A mean over no samples is not a number.
            self.loss += float(loss) * float(weight) if float(weight) else 0.0
            self.weight += float(weight)
        names, rows = self._rows()
        if len(rows):
            before = [float(self.count), *(self.measures.get(name, 0.0) for name in names)]
            # NumPy's `accumulate` adds one after another, as a loop would; its `sum` adds in pairs.
            count, *totals = np.add.accumulate(np.vstack([before, rows]), axis=0)[-1].tolist()
            self.count = int(count)
            self.measures |= dict(zip(names, totals, strict=True))
        self._losses.clear()
        self._measures.clear()

    def _rows(self) -> tuple[list[str], npt.NDArray[np.float64]]:
        """Return the measures' names, and counts and measures, (rows, 1 + names), in the order of one process."""
        names = next((list(measures) for measures, _ in self._measures if measures), list(self.measures))
        group = self._group if self._group is not None and self._group.size > 1 and self._measures else None
        if group is not None:
            # A process that has had no sample yet doesn't know the names.
            names = json.loads(group.broadcast_bytes(json.dumps(names).encode()))
        own = [[float(count), *(float(values.get(name, 0.0)) for name in names)] for values, count in self._measures]
        rows = np.array(own, dtype=np.float64).reshape(len(own), 1 + len(names))
        if group is None:
            return names, rows
        gathered = group.gather(torch.from_numpy(rows)).numpy()
        # Within a step the last rank's rows come first, as the last replica is computed first.
        steps = gathered.reshape(group.size, len(own) // self._per_step, self._per_step, 1 + len(names))
        return names, steps[::-1].transpose(1, 0, 2, 3).reshape(-1, 1 + len(names))

    def means(self) -> dict[str, float]:
        """Return the mean loss and the mean measures of everything added."""
        self.read()
        values = {"loss": self.loss / self.weight if self.weight else 0.0}
        return values | {name: value / max(self.count, 1) for name, value in self.measures.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint inside an epoch."""
        self.read()
        return {"loss": self.loss, "weight": self.weight, "measures": dict(self.measures), "count": self.count}

    def clear(self) -> None:
        """Start again from zero."""
        self._losses.clear()
        self._measures.clear()
        self.loss, self.weight, self.count, self.measures = 0.0, 0.0, 0, {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the sums of a checkpoint."""
        self.clear()
        self.loss, self.weight, self.count = state["loss"], state["weight"], state["count"]
        self.measures = dict(state["measures"])


def _unfragmented(value: Tensor | float) -> Tensor | float:
    """Return a tensor on the CPU as a number, anything else unchanged.

    Small tensors that outlive their step fragment the heap between the large ones of later steps, which then grows.
    """
    return value.item() if isinstance(value, Tensor) and value.is_cpu else value


class Stopwatch:
    """Measures the times that people are shown; nothing that is computed depends on it."""

    def __init__(self) -> None:
        self.total = 0
        self.start()

    def start(self) -> None:
        """Start to count seconds and samples."""
        self._since, self._samples = time.perf_counter(), 0

    def count(self, samples: int) -> None:
        """Count trained samples."""
        self._samples += samples
        self.total += samples

    def lap(self) -> dict[str, float]:
        """Return the seconds since the start, and the samples per second."""
        seconds = time.perf_counter() - self._since
        return {"seconds": round(seconds, 3), "samples_per_second": round(self._samples / max(seconds, 1e-9), 1)}


class Progress:
    """Where a run stands: the only state that moves beside the weights and the optimizer.

    Args:
        epochs: of the whole run.
        steps_per_epoch: global batches of an epoch.
        max_steps: the step after which the run ends early; None: after all epochs.
        sums: of the running epoch's loss and measures.

    Attributes:
        step: optimizer steps taken; the position within the epoch follows from it.
        epochs_done: epochs trained and evaluated.
        best: the best evaluation so far.
        skipped: steps, counted from 1, whose batch was left out after a loss spike, with the batch's sample indices.
        stop_reason: why the run ends before its last epoch.
        interrupted: whether a signal stops this session; a resume continues it.
        evaluated_at: after which step the model was last evaluated, the metrics, and the score: higher is better.
        stopwatch: of the running epoch, for people.
        last_loss: the last mean loss on record, for people.
        phase: what happens instead of training, such as "evaluating"; for people.
    """

    def __init__(
        self, epochs: int, steps_per_epoch: int, max_steps: int | None = None, sums: RunningSums | None = None
    ) -> None:
        self.epochs, self.steps_per_epoch, self.max_steps = epochs, steps_per_epoch, max_steps
        self.step = 0
        self.epochs_done = 0
        self.best: Best | None = None
        self.skipped: dict[int, list[int]] = {}
        self.sums = sums or RunningSums()
        self.stop_reason: str | None = None
        self.interrupted = False
        self.evaluated_at: tuple[int, dict[str, float], float | None] = (-1, {}, None)
        self.stopwatch = Stopwatch()
        self.last_loss: float | None = None
        self.phase = ""
        self._epoch_ended_at = 0

    @property
    def total_steps(self) -> int:
        """The steps of all epochs."""
        return self.epochs * self.steps_per_epoch

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
    def at_limit(self) -> bool:
        """Whether the run has taken `max_steps`."""
        return self.max_steps is not None and self.step >= self.max_steps

    def stop_at_limit(self) -> bool:
        """Stop the run if it has taken `max_steps`, and return whether it stops, for this or any other reason."""
        if self.at_limit:
            self.stop_reason = f"run.max_steps is {self.max_steps}"
        return self.stop_reason is not None

    def record(self, result: StepResult, samples: int) -> None:
        """Count a step of so many samples, and add its loss and measures to the epoch's sums."""
        self.step += 1
        self.stopwatch.count(samples)
        self.sums.add_loss(result.loss, result.weight)
        for measures, count in result.measures:
            self.sums.add_measures(measures, count)

    def end_epoch(self) -> None:
        """Count the epoch, unless `max_steps` ended it before its last batch."""
        if self.position == self.steps_per_epoch:
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
        self.step, self.epochs_done = state["step"], state["epochs_done"]
        self._epoch_ended_at = state.get("ended", self.step)
        self.best = None if state["best"] is None else Best(**state["best"])
        self.sums.load_state_dict(state["sums"])
        self.skipped = dict(state["skipped"])
