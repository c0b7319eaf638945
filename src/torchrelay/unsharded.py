"""Step 3: checkpoints of sharded models are those of unsharded ones: complete tensors under the model's own names.

So `model.safetensors` opens with plain safetensors, a run saved under `fsdp` goes on without it, and the other way
round. One tensor after another is put together: no device holds more than its part and the largest tensor.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torchrelay.world import World


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor put together, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(
    model: nn.Module, optimizer: Optimizer, world: "World"
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the states of an unsharded model and of its optimizer, on the CPU. All processes call it together.

    Tensors that weren't sharded may share their memory with the model's, as in its `state_dict()`.

    Returns:
        What the two `state_dict()` would be without sharding, on rank 0; None on the others.
    """
    weights = gather(dict(model.state_dict(keep_vars=True)), world)  # whose tied weights are one tensor
    state = gather(optimizer.state_dict(), world)
    return (weights, state) if world.rank == 0 else None


def gather(tree: Any, world: "World") -> Any:
    """Return a tree of dicts, lists and tuples with every sharded tensor put together, on the CPU, one after another.

    Returns:
        The tree on rank 0; None on the others, which must have the same tree.
    """
    seen: dict[int, Tensor | None] = {}

    def visit(node: Any) -> Any:
        if isinstance(node, Tensor):
            if id(node) not in seen:
                full = whole(node.detach())
                seen[id(node)] = full.cpu() if world.rank == 0 else None
            return seen[id(node)]
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items()}
        return type(node)(visit(value) for value in node) if isinstance(node, list | tuple) else node

    found = visit(tree)
    return found if world.rank == 0 else None


def load_full_state(
    model: nn.Module, optimizer: Optimizer, model_state: dict[str, Tensor], optimizer_state: dict[str, Any]
) -> None:
    """Load what `full_state`, or an unsharded run, saved. Every process has all of it, and takes its part.

    Raises:
        RuntimeError: as `nn.Module.load_state_dict` does, names or shapes are another model's.
        ValueError: as `Optimizer.load_state_dict` does.
    """
    model.load_state_dict(divide(model_state, dict(model.state_dict(keep_vars=True))))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in optimizer_state["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=False))  # the optimizer refuses other lengths
    state = {
        number: {key: _part(value, of.get(number)) for key, value in values.items()}
        for number, values in optimizer_state["state"].items()
    }
    optimizer.load_state_dict({**optimizer_state, "state": state})


def divide(full: dict[str, Tensor], live: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each full tensor's part of this process, where the live tensor of that name is sharded."""
    return {name: _part(value, live.get(name)) for name, value in full.items()}


def _part(full: Any, live: Tensor | None) -> Any:
    """Return the part of a full tensor that a live one of the same shape has here; anything else as it is."""
    if not isinstance(live, DTensor) or not isinstance(full, Tensor) or full.shape != live.shape:
        return full
    there = full.to(live.device)
    return distribute_tensor(there, live.device_mesh, live.placements, src_data_rank=None)  # None: it sends nothing
