"""Step 7: one optimizer step on a global batch, eager or recorded as a CUDA graph."""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from math import fsum
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchrelay import rng
from torchrelay.data.batch import Batch
from torchrelay.device.device import Device
from torchrelay.device.private import run_backward
from torchrelay.distributed.strategy import Strategy
from torchrelay.models.ema import EMA
from torchrelay.optim.groups import Freezing, clear_gradients, set_learning_rate
from torchrelay.optim.schedules import Constant, Schedule
from torchrelay.optim.update import Update, alone
from torchrelay.tasks.targets import explain
from torchrelay.tasks.task import Loss, Task, calls_once, count, loss_and_outputs, total, weight
from torchrelay.train.cuda_graph import CudaGraph, check_recordable, move_rates_to_device
from torchrelay.train.record import Logged, log, loss_parts
from torchrelay.train.spikes import Spike, SpikeDetector

# Making a context takes longer than entering it.
_NO_GRAD = torch.no_grad()
_UNKNOWN = torch.tensor(float("nan"))


Mark = Callable[[str], None]
# A replica's summed measures, and the number of items that they count.
Measures = tuple[Mapping[str, Tensor], Tensor | int]


@dataclass(slots=True)
class StepResult:
    """What a step found. The tensors are on the device: reading one waits for it.

    Attributes:
        loss: () mean loss over the global batch; of several updates, the sum of theirs.
        weight: what the summed loss was divided by.
        measures: the task's measures of each of this process's replicas.
        logged: what `tr.log` was given in each of them, and the parts of the loss, as sums with their counts.
        grad_norm: () norm of the gradient before clipping, where it was asked for.
        spike: why the step was not taken.
    """

    loss: Tensor
    weight: Tensor | float
    measures: list[Measures]
    logged: list[Logged]
    grad_norm: Tensor | None = None
    spike: Spike | None = None


class TrainStep:
    """Takes optimizer steps on global batches.

    It keeps no count of the steps: their number is an argument, on which learning rate and randomness depend.

    Args:
        strategy: holds the model, and adds the gradients of its replicas.
        task: what a batch means.
        optimizer: of the model's parameters; or an update each, of a task with several.
        device: where and in which precision the model computes.
        replicas: parts of a global batch, over all processes.
        schedule: of the learning rates; constant if not given.
        seed: of the model's randomness, such as dropout.
        ema: the moving average of the weights to update.
        detector: looks at the loss before the update.
        clip_norm: the largest norm of the gradient, to which it is scaled down; None: it isn't.
        watch_norm: whether the gradient's norm is computed, even if nothing is clipped.
        measure: whether the task measures the training batches.
        dummy_batch: makes a batch for a process that has no samples; needed with several processes.
        before_update: called before each update, when staged weights must have been copied.
        freezing: of the parameter groups that are trained in a part of the run only.

    Attributes:
        model: what the task computes with: the strategy if it calls the model once for a batch, else the module.

    Raises:
        UsageError: `device.graph` is set, and such steps can't be recorded; or the optimizers aren't the task's.
    """

    def __init__(
        self,
        strategy: Strategy,
        task: Task,
        optimizer: Optimizer | Sequence[Update],
        device: Device,
        *,
        replicas: int = 1,
        schedule: Schedule | None = None,
        seed: int = 0,
        ema: EMA | None = None,
        detector: SpikeDetector | None = None,
        clip_norm: float | None = None,
        watch_norm: bool = False,
        measure: bool = True,
        dummy_batch: Callable[[], Batch] | None = None,
        before_update: Callable[[], None] = lambda: None,
        freezing: Freezing | None = None,
    ) -> None:
        self.strategy, self.task, self.device = strategy, task, device
        if isinstance(optimizer, Optimizer):
            optimizer = [Update(task.updates[0], optimizer, clip_norm)]
        self.updates = list(optimizer)
        for group in self.groups:
            group.setdefault("initial_lr", group["lr"])
        self.schedule = schedule or Constant().bind(1, 1)
        self.ema, self.detector = ema, detector or SpikeDetector()
        self.scaler = device.scaler()
        self._replicas, self.seed, self._before_update = replicas, seed, before_update
        # fp16 overflows on purpose: its scaler skips such a step.
        self.watch_norm = watch_norm and not self.scaler.is_enabled()
        self._measure = measure and type(task).measure is not Task.measure
        self.model = strategy if calls_once(task) else strategy.module
        # A process without samples must know whether a weight is a tensor.
        several = strategy.group.size > 1 and dummy_batch is not None
        self._dummy_weight = weight(task, dummy_batch()) if several and dummy_batch else 0.0
        self._freezing = freezing or None
        self._graph: CudaGraph[StepResult] | None = None
        if device.settings.graph:
            check_recordable(device, self.updates, replicas)
            move_rates_to_device(self.optimizer, device.device)
            self._graph = CudaGraph(device.device, self._take)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers; loading a state replaces them."""
        return [group for update in self.updates for group in update.optimizer.param_groups]

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the first update."""
        return self.updates[0].optimizer

    # [one step]
    def step(self, batch: Batch, step: int, mark: Mark | None = None) -> StepResult:
        """Take optimizer step number `step`, counted from 0, on a global batch.

        Args:
            batch: this process's replicas of the global batch.
            step: on which learning rate and randomness depend.
            mark: called at the end of "forward", "backward" and "measure", by a profiler; such a step is not recorded.

        Raises:
            RelayError: the batch can't be learned from; the text names the sample.
        """
        for each in self.updates:
            for group in each.optimizer.param_groups:
                set_learning_rate(group, self.schedule.at(step, group["initial_lr"]))
        if self._freezing is not None:
            self._freezing.apply(step)
        try:
            if len(self.updates) == 1:
                result = self._update(self.updates[0], batch, step, mark)
            else:
                result = joined([self._alone(update, batch, step, mark) for update in self.updates])
        except Exception as error:
            explain(error, batch, self.strategy.model)  # raises an error that names the sample, if one is to blame
            raise
        if result.spike is None:
            self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.strategy.model, step)
        return result

    def _update(self, update: Update, batch: Batch, step: int, mark: Mark | None) -> StepResult:
        """Compute an update's gradient, look at its loss, and update the weights."""
        if update.wants_closure:
            self.strategy.buffers.keep()
        rng.reseed(rng.step_seed(self.seed, update.stream, step, 0), self.device.device)
        if self._graph is not None and mark is None:
            result = self._graph(batch)  # calls, records or replays `_take`
        else:
            result = self.backward(batch, step, mark, update)
        result.spike = self.detector.check(step + 1, result.loss, result.grad_norm, update.stream)
        if result.spike is None and (self._graph is None or mark is not None):
            self._before_update()
            if update.wants_closure:
                update.step(result.loss, lambda: self._again(update, batch, step))
            else:
                self.scaler.step(update.optimizer)  # calls optimizer.step; skips it where fp16 overflowed
        clear_gradients(update.optimizer)
        return result

    def backward(self, batch: Batch, step: int, mark: Mark | None = None, update: Update | None = None) -> StepResult:
        """Leave the gradient of the mean loss over the global batch in the parameters."""
        update = update or self.updates[0]
        result = StepResult(_UNKNOWN, self._weight(batch), [], [])
        if self._replicas == 1:
            result.loss = self._replica(batch, result, update, mark)
        else:
            result.loss = self._own_replicas(batch, step, result, update, mark)
        result.grad_norm = self._clip(update)
        return result

    def _own_replicas(self, batch: Batch, step: int, result: StepResult, update: Update, mark: Mark | None) -> Tensor:
        """Compute this process's replicas, the first one last; add the gradients and losses of all processes."""
        losses = []
        for number, replica in reversed(list(enumerate(batch.replicas(), batch.first_replica))):
            rng.reseed(rng.step_seed(self.seed, update.stream, step, number), self.device.device)
            with self.strategy.replica(last=number == batch.first_replica):
                losses.append(self._replica(replica, result, update, mark))
        return self.strategy.reduce(losses)

    def _replica(self, batch: Batch, result: StepResult, update: Update, mark: Mark | None) -> Tensor:
        """Go forward and backward through a replica's part of the batch; return its share of the mean loss."""
        if not batch.samples:
            result.measures += [({}, 0)] if self._measure else []
            result.logged.append({})
            return torch.zeros((), device=self.device.device)
        log.begin(first=batch.first_replica == 0)
        with self.device.autocast():
            loss, outputs = loss_and_outputs(self.task, self.model, batch, update.name)
        logged, sum_of_loss = log.end(), total(loss, self.task)
        if mark is not None:
            mark("forward")
        backward_from_mean(sum_of_loss, result.weight, self.scaler.scale)
        if mark is not None:
            mark("backward")
        if self._measure and outputs is not None:
            with _NO_GRAD:
                result.measures.append((self.task.measure(outputs, batch.targets), count(self.task, batch)))
            if mark is not None:
                mark("measure")
        if isinstance(loss, dict) or len(self.updates) > 1:
            logged |= self._parts_of(loss, update, result, batch)
        result.logged.append(logged)
        return mean_loss(sum_of_loss, result.weight)

    # [end of one step]

    def _alone(self, update: Update, batch: Batch, step: int, mark: Mark | None) -> StepResult:
        with alone(update, self.updates):
            return self._update(update, batch, step, mark)

    def _again(self, update: Update, batch: Batch, step: int) -> Tensor:
        """Compute an update's gradient again, with the same random numbers, at the weights as they are now."""
        self.strategy.buffers.restore()
        rng.reseed(rng.step_seed(self.seed, update.stream, step, 0), self.device.device)
        return self.backward(batch, step, update=update).loss

    def _parts_of(self, loss: Loss, update: Update, result: StepResult, batch: Batch) -> Logged:
        """Return the parts of a replica's loss to be logged, and the whole if there are several updates."""
        name = f"loss_{update.name}" if len(self.updates) > 1 else ""
        return loss_parts(loss, result.weight, name, first=batch.first_replica == 0)

    def _take(self, batch: Batch) -> StepResult:
        """Take a whole step as a CUDA graph can record it: without decisions, without reading the learning rate."""
        result = self.backward(batch, 0)
        self.optimizer.step()
        clear_gradients(self.optimizer)
        return result

    def _weight(self, batch: Batch) -> Tensor | float:
        """Return what the global batch's summed loss is divided by: the replicas' weights, added in their order."""
        weight_of_size = self.task.weight_of(batch.size)
        if weight_of_size is not None:
            return weight_of_size
        weights: list[Any] = [self.task.weight(replica.targets) for replica in batch.replicas() if replica.samples]
        group = self.strategy.group
        if group.size > 1:
            weights += [0.0 * self._dummy_weight] * (len(batch.replica_sizes) - len(weights))
            on_device = isinstance(self._dummy_weight, Tensor)
            own = torch.stack(weights) if on_device else torch.tensor(weights, dtype=torch.float64)
            gathered = group.gather(own).flatten()
            weights = list(gathered.unbind()) if on_device else gathered.tolist()
        sum_of_all: Tensor | float = reduce(add, weights) if isinstance(weights[0], Tensor) else fsum(weights)
        return sum_of_all

    def _clip(self, update: Update) -> Tensor | None:
        """Scale the gradient down to `clip_norm`; return its norm before, if somebody asks for it."""
        if update.clip_norm is None:
            return self.strategy.grad_norm(update.parameters) if self.watch_norm else None
        self.scaler.unscale_(update.optimizer)
        norm = self.strategy.clip_grad_norm(update.parameters, update.clip_norm)
        return norm if self.watch_norm else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of everything that a step changes beside the weights."""
        states = {update.name: update.optimizer.state_dict() for update in self.updates}
        return {
            "guard": self.detector.state_dict(),
            "optimizer": states if len(states) > 1 else self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; the optimizer's state is complete, whatever the strategy."""
        self.detector.load_state_dict(state["guard"])
        for update in self.updates:
            saved = state["optimizer"] if len(self.updates) == 1 else state["optimizer"][update.name]
            self.strategy.load_state(update.optimizer, saved)
        if self._graph is not None:
            self._graph.forget()  # it works on the optimizer's old state
            move_rates_to_device(self.optimizer, self.device.device)
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def joined(results: Sequence[StepResult]) -> StepResult:
    """Return the result of a step of several updates: the sum of their losses, and all that they logged."""
    logged = [dict(ChainMap(*each)) for each in zip(*(result.logged for result in results), strict=True)]
    measures = next((result.measures for result in results if result.measures), [])
    loss, spike = reduce(add, (result.loss for result in results)), next((r.spike for r in results if r.spike), None)
    return replace(results[0], loss=loss, measures=measures, logged=logged, spike=spike)


def mean_loss(loss: Tensor, weight: Tensor | float) -> Tensor:
    """Return the mean whose sum is `loss`, outside of the autograd graph."""
    divisor = weight if isinstance(weight, Tensor) else _constants(weight, loss.shape, loss.dtype, loss.device)[0]
    return loss.detach() / divisor


def backward_from_mean(
    loss: Tensor, weight: Tensor | float, scale: Callable[[Tensor], Tensor] = lambda gradient: gradient
) -> None:
    """Add the gradients of the mean whose sum is `loss` to the parameters' gradients.

    The backward pass starts at the sum, with the mean's gradient with respect to it, which saves a division and its
    backward.

    Args:
        loss: () summed.
        weight: what it is divided by.
        scale: scales the first gradient, as fp16 needs it.
    """
    if isinstance(weight, Tensor):
        gradient = torch.ones_like(loss) / weight
    else:
        gradient = _constants(weight, loss.shape, loss.dtype, loss.device)[1]
    run_backward(loss, scale(gradient))


# Nearly all batches have one size, and making a tensor of a number takes longer than using it.
@lru_cache(maxsize=16)
def _constants(weight: float, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a weight and its reciprocal as tensors."""
    divisor = torch.tensor(weight, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return divisor, torch.ones(shape, dtype=dtype, device=device) / weight
