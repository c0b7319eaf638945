"""Step 4: `parallel.kind = "dp"`: PyTorch's DataParallel, one process for all CUDA devices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchrelay.device.device import Device
from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.errors import UsageError


def data_parallel(
    model: nn.Module,
    forward: Callable[..., Any],
    group: ProcessGroup,
    device: Device,
    exact: bool,
    say: Callable[[str], None],
) -> Callable[..., Any]:
    """Return the model in DataParallel over all visible CUDA devices, or `forward` if there are fewer than two.

    Raises:
        UsageError: the run is exact, compiled, or has several processes.
    """
    if exact:
        raise UsageError(
            "parallel.kind 'dp' adds gradients in an order that depends on the number of devices, and this run is "
            "exact: use 'ddp', or --set run.exact=false"
        )
    if group.size > 1:
        raise UsageError(f"parallel.kind 'dp' is one process for all devices, and {group.size} were started: use 'ddp'")
    count = torch.cuda.device_count() if device.device.type == "cuda" else 0
    if count < 2:
        where = "with one device" if count else f"on {device.device.type}"
        say(f"parallel.kind 'dp' has no effect {where}: the model runs as with 'none'")
        return forward
    if forward is not model:
        raise UsageError("device.compile and parallel.kind 'dp' don't go together: leave one out, or use 'ddp'")
    first = torch.cuda.current_device() if device.device.index is None else device.device.index
    return nn.DataParallel(model, [first, *(other for other in range(count) if other != first)])
