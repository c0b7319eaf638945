"""Step 4: a sharded model's checkpoint is that of an unsharded one: whole tensors under the model's own names.

So `model.safetensors` opens with plain safetensors, a run saved under `fsdp` resumes without it, and the other way
around. Tensors are gathered one after another: no device holds more than its shards and the largest tensor.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.models.ema import EMA


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a whole one, on every process; other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tree: Any, group: ProcessGroup) -> Any:
    """Return a tree of dicts, lists and tuples with whole tensors on the CPU, gathered one after another.

    Returns:
        The tree on rank 0; None on the others, which must pass the same tree.
    """
    seen: dict[int, Tensor | None] = {}

    def visit(node: Any) -> Any:
        if isinstance(node, Tensor):
            if id(node) not in seen:
                full = gather_tensor(node.detach())
                seen[id(node)] = full.cpu() if group.rank == 0 else None
            return seen[id(node)]
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items()}
        return type(node)(visit(value) for value in node) if isinstance(node, list | tuple) else node

    gathered = visit(tree)
    return gathered if group.rank == 0 else None


def load_sharded(target: nn.Module | Optimizer | EMA, state: dict[str, Any]) -> None:
    """Load what `gather` or an unsharded run saved. Every process passes all of it, and loads its shard.

    Raises:
        RuntimeError: names or shapes don't match, as from `nn.Module.load_state_dict`.
        RelayError: from `EMA.load_state_dict`.
        ValueError: from `Optimizer.load_state_dict`.
    """
    target.load_state_dict(
        _shard_optimizer_state(target, state) if isinstance(target, Optimizer) else shard(state, target.state_dict())
    )


def _shard_optimizer_state(optimizer: Optimizer, full: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with each tensor sharded as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in full["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=False))  # the optimizer raises an error if lengths differ
    state = {
        number: {key: _shard(value, by_number.get(number)) for key, value in values.items()}
        for number, values in full["state"].items()
    }
    return {**full, "state": state}


def shard(full: dict[str, Tensor], live: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's shard of each whole tensor whose live tensor is sharded, and the others unchanged."""
    return {name: _shard(value, live.get(name)) for name, value in full.items()}


def _shard(full: Any, live: Tensor | None) -> Any:
    """Return this process's shard of a whole tensor, sharded as a live one of the same shape; others unchanged."""
    if not isinstance(live, DTensor) or not isinstance(full, Tensor) or full.shape != live.shape:
        return full
    # Without a source rank nothing is sent: every process has the whole tensor.
    return distribute_tensor(full.to(live.device), live.device_mesh, live.placements, src_data_rank=None)
