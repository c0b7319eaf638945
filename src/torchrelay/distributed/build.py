"""Step 4: in which way several devices share the work, as `parallel.kind` says."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchrelay.device.device import Device
from torchrelay.distributed.ddp import DDP
from torchrelay.distributed.exact_ddp import ExactDDP
from torchrelay.distributed.process_group import DistributedGroup, ProcessGroup
from torchrelay.distributed.single import Strategy
from torchrelay.errors import UsageError


def share(
    model: nn.Module,
    kind: str,
    group: ProcessGroup,
    device: Device,
    *,
    exact: bool,
    dummy_loss: Callable[[], Tensor] | None = None,
    say: Callable[[str], None] = print,
) -> Strategy:
    """Place a model where it computes, and return what runs its replicas and adds their gradients.

    Args:
        model: is changed in place: moved, and divided if the kind is "fsdp".
        kind: of `ParallelSettings`.
        group: the processes.
        device: where and how this process computes.
        exact: whether the run is.
        dummy_loss: goes through the exchange with any samples and returns their loss: for a process without samples,
            which fsdp needs, and ddp in a run that isn't exact.
        say: told where a kind does nothing.

    Raises:
        UsageError: this can't be done with this model, or with so many processes, or exactly.
    """
    if kind == "fsdp" and group.size > 1:
        from torchrelay.distributed.fsdp import FSDP  # which takes half a second to import

        return FSDP(model, group, device, exact=exact, dummy_loss=dummy_loss)
    if kind == "fsdp":
        say("parallel.kind 'fsdp' does nothing with one process: the model runs as with 'none'")
    device.place(model)
    forward: Callable[[Any], Any] = torch.compile(model, dynamic=False) if device.settings.compile else model
    if kind == "dp":
        forward = _data_parallel(model, forward, group, device, exact, say)
    if not isinstance(group, DistributedGroup):
        return Strategy(model, group, exact=exact, forward=forward)
    if exact:
        return ExactDDP(model, group, forward=forward)
    return DDP(model, group, dummy_loss, forward=forward)


def _data_parallel(
    model: nn.Module,
    forward: Callable[[Any], Any],
    group: ProcessGroup,
    device: Device,
    exact: bool,
    say: Callable[[str], None],
) -> Callable[[Any], Any]:
    """Return PyTorch's DataParallel over all visible CUDA devices, or what there is where it would do nothing."""
    if exact:
        raise UsageError(
            "parallel.kind 'dp' adds gradients in an order that depends on the number of devices, and this run is "
            "exact: use 'ddp', or --set run.exact=false"
        )
    if group.size > 1:
        raise UsageError(f"parallel.kind 'dp' is one process for all devices, and {group.size} were started: use 'ddp'")
    first = device.device
    count = torch.cuda.device_count() if first.type == "cuda" else 0
    if count < 2:
        where = "with one device" if count else f"on {first.type}"
        say(f"parallel.kind 'dp' does nothing {where}: the model runs as with 'none'")
        return forward
    if forward is not model:
        raise UsageError("device.compile and parallel.kind 'dp' don't go together: leave one out, or use 'ddp'")
    own = torch.cuda.current_device() if first.index is None else first.index
    return nn.DataParallel(model, [own, *(other for other in range(count) if other != own)])
