"""Step 4: from `parallel.kind` to a strategy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchrelay.device.device import Device
from torchrelay.distributed.ddp import DDP
from torchrelay.distributed.dp import data_parallel
from torchrelay.distributed.exact_ddp import ExactDDP
from torchrelay.distributed.process_group import DistributedGroup, ProcessGroup
from torchrelay.distributed.strategy import Strategy


def build_strategy(
    model: nn.Module,
    kind: str,
    group: ProcessGroup,
    device: Device,
    *,
    exact: bool,
    dummy_loss: Callable[[], Tensor] | None = None,
    say: Callable[[str], None] = print,
) -> Strategy:
    """Move a model to the device and return the strategy that runs its replicas.

    Args:
        model: is changed in place: moved, and sharded if the kind is "fsdp".
        kind: as in `ParallelSettings`.
        group: the process group.
        device: this process's device.
        exact: whether the run is exact.
        dummy_loss: runs the strategy on a dummy batch and returns its loss, for a process without samples. "fsdp"
            needs it, and so does "ddp" in a run that isn't exact.
        say: called with a line of text if the kind has no effect.

    Raises:
        UsageError: the kind doesn't work with this model, this number of processes, or exactly.
    """
    if kind == "fsdp" and group.size > 1:
        from torchrelay.distributed.fsdp import FSDP  # takes half a second to import

        return FSDP(model, group, device, exact=exact, dummy_loss=dummy_loss)
    if kind == "fsdp":
        say("parallel.kind 'fsdp' has no effect with one process: the model runs as with 'none'")
    device.place(model)
    forward: Callable[[Any], Any] = torch.compile(model, dynamic=False) if device.settings.compile else model
    if kind == "dp":
        forward = data_parallel(model, forward, group, device, exact, say)
    if not isinstance(group, DistributedGroup):
        return Strategy(model, group, exact=exact, forward=forward)
    if exact:
        return ExactDDP(model, group, forward=forward)
    return DDP(model, group, dummy_loss, forward=forward)
