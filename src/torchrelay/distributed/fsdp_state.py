"""Step 3: checkpoints of sharded models are those of unsharded ones: complete tensors under the model's own names.

So `model.safetensors` opens with plain safetensors, a run saved under `fsdp` goes on without it, and the other way
round. One tensor after another is put together: no device holds more than its part and the largest tensor.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.models.ema import EMA


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor put together, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tree: Any, group: ProcessGroup) -> Any:
    """Return a tree of dicts, lists and tuples with every sharded tensor put together, on the CPU, one after another.

    Returns:
        The tree on rank 0; None on the others, which must have the same tree.
    """
    seen: dict[int, Tensor | None] = {}

    def visit(node: Any) -> Any:
        if isinstance(node, Tensor):
            if id(node) not in seen:
                full = whole(node.detach())
                seen[id(node)] = full.cpu() if group.rank == 0 else None
            return seen[id(node)]
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items()}
        return type(node)(visit(value) for value in node) if isinstance(node, list | tuple) else node

    found = visit(tree)
    return found if group.rank == 0 else None


def load_part(target: nn.Module | Optimizer | EMA, state: dict[str, Any]) -> None:
    """Load what `gather` or an unsharded run saved. Every process has all of it, and takes its part.

    Raises:
        RuntimeError: as `nn.Module.load_state_dict` does, names or shapes are another model's.
        RelayError: as `EMA.load_state_dict` does.
        ValueError: as `Optimizer.load_state_dict` does.
    """
    target.load_state_dict(
        _of_optimizer(target, state) if isinstance(target, Optimizer) else divide(state, target.state_dict())
    )


def _of_optimizer(optimizer: Optimizer, full: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with each tensor that belongs to a sharded parameter divided as that is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in full["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=False))  # the optimizer refuses other lengths
    state = {
        number: {key: _part(value, of.get(number)) for key, value in values.items()}
        for number, values in full["state"].items()
    }
    return {**full, "state": state}


def divide(full: dict[str, Tensor], live: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each full tensor's part of this process, where the live tensor of that name is sharded."""
    return {name: _part(value, live.get(name)) for name, value in full.items()}


def _part(full: Any, live: Tensor | None) -> Any:
    """Return the part of a full tensor that a live one of the same shape has here; anything else as it is."""
    if not isinstance(live, DTensor) or not isinstance(full, Tensor) or full.shape != live.shape:
        return full
    there = full.to(live.device)
    return distribute_tensor(there, live.device_mesh, live.placements, src_data_rank=None)  # None: it sends nothing
