"""Step 7, on a CUDA device: a step recorded once as a CUDA graph, and replayed.

A small network's step is hundreds of kernels of a few microseconds, which Python can't launch as fast as they run. A
graph launches them all at once. It reads the memory that it was recorded with: batches are copied there, and the
learning rate is a tensor. See "CUDA Graphs" in PyTorch's notes on CUDA semantics.

The first steps are called one by one, since kernels are chosen and optimizers create their state in them; so is a step
whose batch has another shape, such as an epoch's last one.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchrelay.data.batch import Batch
from torchrelay.device.device import Device
from torchrelay.errors import UsageError
from torchrelay.optim.update import Update

# Steps before one is recorded, as PyTorch's notes advise.
_WARMUP = 3
Result = TypeVar("Result")


class CudaGraph(Generic[Result]):
    """Calls a function of a batch, records it once, and replays the recording.

    Args:
        device: where the batches are.
        function: works on the device alone and returns a dataclass, whose tensors are copied out of a replay.
    """

    def __init__(self, device: torch.device, function: Callable[[Batch], Result]) -> None:
        self._function = function
        # PyTorch records a graph on a stream of its own.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.forget()

    def forget(self) -> None:
        """Record again: the memory that the recording works on was replaced."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._batch: Batch | None = None
        self._result: Result | None = None

    def __call__(self, batch: Batch) -> Result:
        """Return the function's result for a batch.

        Raises:
            UsageError: the inputs are more than a tensor.
        """
        if not (isinstance(batch.inputs, Tensor) and isinstance(batch.targets, Tensor) and batch.data is None):
            raise UsageError("device.graph takes batches of one input and one target tensor: leave it out")
        self._calls += 1
        if self._calls <= _WARMUP:
            return self._call(batch)
        if self._graph is None or self._batch is None or self._result is None:
            self._record(batch)
        assert self._graph is not None and self._batch is not None and self._result is not None  # noqa: S101, PT018
        if batch.inputs.shape != self._batch.inputs.shape or batch.targets.shape != self._batch.targets.shape:
            return self._call(batch)
        self._batch.inputs.copy_(batch.inputs, non_blocking=True)
        self._batch.targets.copy_(batch.targets, non_blocking=True)
        self._graph.replay()
        # The next replay overwrites the recording's own tensors.
        found = {each.name: _cloned(getattr(self._result, each.name)) for each in fields(self._result)}  # type: ignore[arg-type]
        return type(self._result)(**found)

    def _call(self, batch: Batch) -> Result:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._function(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _record(self, batch: Batch) -> None:
        """Record the function, which computes nothing; its gradients lie in the graph's own memory."""
        # Cloned, tensors keep their memory format.
        self._batch = replace(batch, inputs=batch.inputs.clone(), targets=batch.targets.clone())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._result = self._function(self._batch)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return type(value)(_cloned(item) for item in value) if isinstance(value, list | tuple) else value


def move_rates_to_device(optimizer: Optimizer, device: torch.device) -> None:
    """Make each learning rate a tensor on the device, where a graph reads what a schedule writes into it."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = True
        elif isinstance(optimizer, torch.optim.SGD):
            # Its other implementations read the rate on the host, which waits for the device.
            group |= {"fused": True, "foreach": False}


def check_recordable(device: Device, updates: Sequence[Update], replicas: int) -> None:
    """Refuse to record steps that a CUDA graph can't hold.

    Raises:
        UsageError: the text says why, and what to do.
    """
    settings = device.settings
    if device.device.type != "cuda":
        raise UsageError(
            f"device.graph records CUDA graphs, and this device is {device.device.type}: set device.graph=false"
        )
    if settings.precision == "fp16":
        raise UsageError("device.graph can't skip the steps in which fp16 overflows: use device.precision=bf16")
    if settings.compile:
        raise UsageError("device.graph and device.compile exclude each other: leave one out")
    if replicas > 1:
        raise UsageError(
            f"device.graph records a step of one replica, and there are {replicas}: set parallel.replicas=1, or leave "
            "it out"
        )
    if len(updates) > 1 or updates[0].wants_closure:
        raise UsageError("device.graph records a step of one update without a closure: leave it out")
    if any(group.get("rule") == "adamw" for group in updates[0].optimizer.param_groups):
        raise UsageError("device.graph can't record the AdamW within muon: set optimizer.other=sgd, or leave it out")
