"""Step 4: `parallel.kind = "fsdp"`: PyTorch's fully sharded data parallel, for models larger than a device.

Every process holds a shard of each parameter, of its gradient and of the optimizer's state (`fully_shard`). A block's
weights are gathered only while it computes. Its gradients are reduce-scattered while the backward pass runs.

In an exact run the sum has the bits of one process: each process first sums its own replicas in the tree, then each
shard is summed over the processes in the same tree. Meanwhile a process with several replicas holds up to
log2(replicas) + 1 unsharded gradients. Without exactness it only holds shards: each replica's gradients are
reduce-scattered at once.

A checkpoint is that of an unsharded run: whole tensors under the model's own names. So `model.safetensors` opens with
plain safetensors, a run saved under `fsdp` resumes without it, and the other way around. Tensors are gathered one after
another: no device holds more than its shards and the largest tensor.

Importing this module takes a third as long as importing PyTorch, so `build_strategy` does it only when needed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from torchrelay.device.device import Device
from torchrelay.distributed.fsdp_checks import blocks, check_model, check_optimizer, update_in_one_call
from torchrelay.distributed.process_group import DistributedGroup, ProcessGroup
from torchrelay.distributed.replicas import GradientTree, give_gradients, take_gradients, tree_sum
from torchrelay.distributed.strategy import OneCall, Strategy
from torchrelay.errors import RelayError
from torchrelay.models.ema import EMA


class FSDP(Strategy):
    """Shards a model over several processes, and sums the gradients of their replicas.

    Create it before the optimizer, the moving average and anything else that holds the model's parameters. The model
    may be on the CPU: its blocks are moved to the device one after another.

    All processes must run the same number of forward passes, in evaluation as well, since each one gathers weights. For
    a replica without samples, `dummy_loss` runs one.

    Args:
        model: is changed in place: its parameters become shards of rank 0's.
        group: the process group.
        device: this process's device. Unless the run is exact, blocks compute entirely in its 16-bit dtype, which
            halves the bytes sent. A model with running statistics, and an exact run, leave the dtypes to autocast.
        exact: whether gradients are summed in the fixed tree.
        dummy_loss: runs this strategy on a dummy batch and returns its loss.

    Raises:
        UsageError: the model can't be sharded.
    """

    collective_forward = True

    def __init__(
        self,
        model: nn.Module,
        group: ProcessGroup,
        device: Device,
        *,
        exact: bool,
        dummy_loss: Callable[[], Tensor] | None,
    ) -> None:
        check_model(model, device, exact)
        super().__init__(model, group, exact=exact)
        self._dummy_loss, self._device = dummy_loss, device.device
        self.empty = False  # whether the current replica's gradients count as zeros
        self.local = False  # whether they stay in this process for now
        for _, tensor in sorted(model.state_dict().items()):
            group.broadcast([tensor])  # one by one, as a model may be as large as the memory
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # as FSDP requires
        mesh = init_device_mesh(device.device.type, (group.size,))
        for block in (*blocks(model), model):
            self._shard(block, mesh, _policy(model, device, exact))
        self.parameters = list(model.parameters())

    def _shard(self, block: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        sharded = fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)  # the loss is divided by the global weight already
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_custom_reduce_scatter(_ReduceScatter(self))  # type: ignore[arg-type]  # its base class is private

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the model's outputs."""
        self.empty = False
        with self._explain_failure("gathered weights"):
            return super().__call__(*inputs, **named)

    @property
    def module(self) -> Any:
        """The model, called as a whole, which gathers its weights."""
        return OneCall(self, "fsdp")

    @contextmanager
    def no_sync(self, tree: GradientTree) -> Iterator[None]:
        """Enclose a replica's passes; in an exact run, `_ReduceScatter` keeps its unsharded gradients in a tree.

        Without a forward pass in this context, the replica has no samples.
        """
        with self._run_replica(local=self.exact):
            yield
        gradients = take_gradients(self.parameters)
        if not self.exact:
            tree.add(gradients)

    @contextmanager
    def sync(self, tree: GradientTree) -> Iterator[None]:
        """Enclose the last replica's passes; after it, `.grad` holds this process's shard of all replicas' sum."""
        with self._run_replica(local=False):
            yield
        if not self.exact:
            tree.add(take_gradients(self.parameters))
            give_gradients(self.parameters, tree.total())

    @contextmanager
    def _run_replica(self, local: bool) -> Iterator[None]:
        self.empty, self.local = True, local
        with self._explain_failure("added gradients"):
            yield
            if self.empty and self._dummy_loss is not None:
                loss = self._dummy_loss()
                self.empty = True
                loss.backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def _explain_failure(self, what: str) -> Iterator[None]:
        """Say which communication failed, if the error that PyTorch raises from inside the model is one."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(self.group, DistributedGroup) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                with self.group.explain_failure(what):
                    raise
            raise

    def broadcast_weights(self) -> None:
        """Do nothing: rank 0's weights were broadcast before they were sharded."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Check that an optimizer can work on shards of parameters.

        Raises:
            UsageError: it needs whole matrices, or the run is exact and it isn't known to be elementwise.
        """
        check_optimizer(optimizer, self.exact)
        if self.exact and self._device.type == "cuda":
            update_in_one_call(optimizer)

    def grad_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the whole gradient, the same on every process.

        In an exact run the parameters' gradients are gathered one after another, and the norm of their norms has the
        bits of one process. Otherwise PyTorch adds the squares over the shards.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not self.exact or not gradients:
            return gather_tensor(nn.utils.get_total_norm(gradients))
        # As `get_total_norm` computes them.
        norms = [torch._foreach_norm([gather_tensor(gradient)])[0] for gradient in gradients]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` if its norm is larger; return the norm before that."""
        norm = self.grad_norm(parameters)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def full_state(self, state: Any) -> Any:
        """Return a state with gathered tensors on rank 0; None on the others."""
        return gather(state, self.group)

    def load_state(self, target: nn.Module | Optimizer | EMA, state: dict[str, Any]) -> None:
        """Load this process's shard of what `full_state` or an unsharded run saved; every process passes all of it."""
        if isinstance(target, Optimizer):
            target.load_state_dict(_shard_optimizer_state(target, state))
        else:
            target.load_state_dict(shard(state, target.state_dict()))


class _ReduceScatter:
    """Sums a block's gradients over the processes and leaves each its shard. FSDP calls it in the backward pass.

    Args:
        strategy: says whether the run is exact, and what the current replica is.
    """

    def __init__(self, strategy: FSDP) -> None:
        self._strategy = strategy
        self._elements: int | None = None
        self._tree = GradientTree()  # of this process's replicas, unsharded, if the run is exact

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory to send from or to receive in."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,  # noqa: ARG002 - always a sum
        async_op: bool = False,  # noqa: ARG002 - FSDP never sets it
    ) -> None:
        """Reduce and scatter.

        Args:
            output_tensor: (elements / world size,) this process's shard of the sum.
            input_tensor: (elements,) the block's gradients, one shard after another.
            group: the torch process group.
            op: the reduction that FSDP would use.
            async_op: whether to return before the result is there.
        """
        self._check(input_tensor, group)
        if self._strategy.empty:
            input_tensor.zero_()
        if not self._strategy.exact:
            dist.reduce_scatter_tensor(output_tensor, input_tensor, group=group)
            return
        self._tree.add([input_tensor])
        if self._strategy.local:
            output_tensor.zero_()
            return
        local, self._tree = cast(Tensor, self._tree.total()[0]), GradientTree()
        shards = torch.empty_like(local)
        dist.all_to_all_single(shards, local, group=group)
        output_tensor.copy_(tree_sum(shards.chunk(group.size())))

    def _check(self, gradients: Tensor, group: dist.ProcessGroup) -> None:
        """Raise a RelayError if the processes would sum different parameters, instead of waiting forever."""
        elements = gradients.numel()
        if self._elements is None:
            counts = gradients.new_empty(group.size(), dtype=torch.int64)
            dist.all_gather_into_tensor(counts, counts.new_full((1,), elements), group=group)
            self._elements = elements if len(set(counts.tolist())) == 1 else -1
        if self._elements != elements:
            raise RelayError(
                "a replica uses other parameters of the model than another one, which parallel.kind 'fsdp' doesn't "
                "support: use 'ddp'"
            )


def _policy(model: nn.Module, device: Device, exact: bool) -> MixedPrecisionPolicy:
    """Return the dtypes of blocks' passes and sums; autocast alone would keep 16-bit copies of all weights."""
    statistics = any(name.endswith("running_mean") for name, _ in model.named_buffers())  # they stay float32
    if exact or statistics or device.settings.precision == "float32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=device.dtype, reduce_dtype=torch.float32)


# ------------------------------------------------------------------------------------------------ checkpoints


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
