"""Step 7, on a CUDA device: a step recorded once as a CUDA graph, and replayed.

A small network's step is hundreds of kernels of a few microseconds, which Python can't start as fast as they run. A
graph starts them all at once. What it reads must lie where it lay when it was recorded: batches are copied there, and
the learning rate is a tensor. See "CUDA Graphs" in PyTorch's notes on CUDA semantics.

The first steps are taken one by one, since kernels are chosen and optimizers make their state in them; so is a step
whose batch has another shape, such as an epoch's last one.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchrelay import rng
from torchrelay.data.batch import Batch
from torchrelay.device.device import Device
from torchrelay.errors import UsageError
from torchrelay.optim.groups import clear_gradients
from torchrelay.tasks.targets import explain
from torchrelay.train.backward import backward_from_mean, mean_loss

if TYPE_CHECKING:
    from torchrelay.train.trainer import Trainer

_FIRST = 3  # steps before one is recorded, as PyTorch's notes have it
_MEASURE = "measure."  # before the names of the task's measures
Found = dict[str, Tensor]  # what a step has found: its loss, and what else is asked for and lies on the device


class GraphedStep:
    """What `Trainer.train_step` does, replayed.

    Args:
        device: where everything is.
    """

    def __init__(self, device: Device) -> None:
        self._device = device.device
        # A graph isn't recorded on the stream where all else runs.
        self._beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._taken = 0
        self._inputs, self._targets = torch.empty(0), torch.empty(0)
        self._found: Found = {}

    def forget(self) -> None:
        """Record anew: what a graph has recorded works on the optimizer's state of that time, which was replaced."""
        self._graph, self._taken, self._found = None, 0, {}

    def train_step(self, trainer: "Trainer", batch: Batch) -> Tensor:
        """Take one optimizer step on a batch, and return its mean loss."""
        rng.reseed(rng.step_seed(trainer.settings.seed, "model", trainer.step, 0), self._device)
        try:
            found = self._take(trainer, batch.inputs, batch.targets)
        except Exception as error:
            explain(error, batch, trainer.model)
            raise
        loss, task, targets = found["loss"], trainer.task, batch.targets
        trainer.sums.add_loss(loss, found["weight"] if "weight" in found else task.weight(targets))
        if trainer.measures:
            measures = {name.removeprefix(_MEASURE): found[name] for name in found if name.startswith(_MEASURE)}
            trainer.sums.add_measures(measures, found["count"] if "count" in found else task.count(targets))
        trainer.guard.watch(trainer.step + 1, loss, found.get("norm"))
        if trainer.ema is not None:
            trainer.ema.update(trainer.model, trainer.step)
        trainer.step += 1
        return loss

    def _take(self, trainer: "Trainer", inputs: Any, targets: Tensor) -> Found:
        if not isinstance(inputs, Tensor):
            raise UsageError("device.graph takes batches of one tensor, and these inputs are several: leave it out")
        if self._taken < _FIRST:
            if not self._taken:
                keep_rates_on(trainer.optimizer, self._device)
            self._taken += 1
            return self._one_by_one(trainer, inputs, targets)
        if self._graph is None:
            self._record(trainer, inputs, targets)
        if inputs.shape != self._inputs.shape or targets.shape != self._targets.shape:
            return self._one_by_one(trainer, inputs, targets)
        self._inputs.copy_(inputs, non_blocking=True)
        self._targets.copy_(targets, non_blocking=True)
        assert self._graph is not None  # noqa: S101 - recorded above
        self._graph.replay()
        return {name: value.clone() for name, value in self._found.items()}  # the next replay writes over them

    def _one_by_one(self, trainer: "Trainer", inputs: Tensor, targets: Tensor) -> Found:
        self._beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._beside):
            found = step(trainer, inputs, targets)
        torch.cuda.current_stream().wait_stream(self._beside)
        return found

    def _record(self, trainer: "Trainer", inputs: Tensor, targets: Tensor) -> None:
        """Record a step, by which nothing is computed. Its gradients lie in memory of the graph's own."""
        self._inputs, self._targets = torch.clone(inputs), torch.clone(targets)  # in the memory format that they have
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._beside):
            self._found = step(trainer, self._inputs, self._targets)


def step(trainer: "Trainer", inputs: Tensor, targets: Tensor) -> Found:
    """Go forward and backward and update the weights, all on the device; return what was found."""
    with trainer.device.autocast():
        outputs = trainer.strategy(inputs)
        loss = trainer.task.loss(outputs, targets)
    weight = trainer.task.weight(targets)
    backward_from_mean(loss, weight)
    norm = trainer.clip()
    trainer.optimizer.step()
    clear_gradients(trainer.optimizer)
    with torch.no_grad():
        found = {"loss": mean_loss(loss, weight), "weight": weight, "norm": norm}
        if trainer.measures:
            measures = trainer.task.measure(outputs, targets)
            found |= {"count": trainer.task.count(targets), **{_MEASURE + name: measures[name] for name in measures}}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def keep_rates_on(optimizer: Optimizer, device: torch.device) -> None:
    """Make each learning rate a tensor on the device, where a graph finds what a schedule writes into it."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = True
        elif isinstance(optimizer, torch.optim.SGD):
            group |= {"fused": True, "foreach": False}  # its other kinds read the rate, which waits for the device


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a parameter group's learning rate, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def graphed(device: Device, optimizer: Optimizer, replicas: int, processes: int) -> GraphedStep | None:
    """Return what replays steps if `device.graph` asks for it.

    Raises:
        UsageError: they can't be recorded; the text says why, and what to do.
    """
    settings = device.settings
    if not settings.graph:
        return None
    if device.device.type != "cuda":
        raise UsageError(f"device.graph records CUDA graphs, and this device is {device.device.type}: leave it out")
    if settings.precision == "fp16":
        raise UsageError("device.graph can't skip the steps in which fp16 overflows: use device.precision=bf16")
    if settings.compile:
        raise UsageError("device.graph and device.compile don't go together: leave one out")
    if processes > 1 or replicas > 1:
        raise UsageError(
            f"device.graph records one process's step on a whole batch, and there are {replicas} replicas: "
            "set parallel.replicas=1, or leave it out"
        )
    if any(group.get("rule") == "adamw" for group in optimizer.param_groups):
        raise UsageError("device.graph can't record the AdamW within muon: set optimizer.other=sgd, or leave it out")
    return GraphedStep(device)
