"""Step 4: models larger than a device: `parallel.kind = "fsdp"`.

Under `fsdp` every process keeps a part of each parameter, of its gradient and of the optimizer's state (PyTorch's
`fully_shard`); a block's weights are whole only while it computes. Gradients are added over the processes, and divided
again, while backward runs.

In an exact run the sum has the bits of one process: each process first adds its own replicas in the tree, then each
part is added over the processes in the same tree. So a process with several replicas holds up to log2(replicas) + 1
whole gradients meanwhile. Without exactness it never holds more than its part: every replica's is added at once.

Checkpoints know nothing of all this: see unsharded.py. Importing this module costs a third of what PyTorch costs: the
trainer does so where it is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from torchrelay.device.device import Device
from torchrelay.distributed.fsdp_checks import blocks, check_model, check_optimizer, update_in_one_call
from torchrelay.distributed.fsdp_state import gather, load_part, whole
from torchrelay.distributed.process_group import DistributedGroup, ProcessGroup
from torchrelay.distributed.replicas import GradientTree, give_gradients, take_gradients
from torchrelay.distributed.strategy import Strategy
from torchrelay.errors import RelayError
from torchrelay.models.ema import EMA


class FSDP(Strategy):
    """Shards a model over several processes, and adds the gradients of their replicas.

    Make it before the optimizer, the moving average and anything else that holds the model's parameters. The model may
    stand on the CPU: its blocks are moved to the device one after another.

    Every process must go as often through the model as the others, in evaluations, too: each time they exchange
    weights. For a replica without samples `dummy_loss` does.

    Args:
        model: is changed in place: its parameters become parts of the first process's.
        group: the processes.
        device: where and how this process computes. Unless the run is exact, blocks compute wholly in its 16-bit type,
            which halves what is sent; a model with running statistics, and an exact run, keep to autocast's choice.
        exact: whether the sum of gradients follows the fixed tree.
        dummy_loss: goes through this object with any samples, and returns their loss.

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
        self.empty = self.keeps = False  # whether what backward brings counts as zeros, and whether it stays here
        for _, tensor in sorted(model.state_dict().items()):
            group.broadcast([tensor])  # one by one: a model may be as large as the memory
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP takes no other
        mesh = init_device_mesh(device.device.type, (group.size,))
        for block in (*blocks(model), model):
            self._shard(block, mesh, _policy(model, device, exact))
        self.parameters = list(model.parameters())

    def _shard(self, block: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        sharded = fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)  # sums: the loss is divided by the global weight
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_custom_reduce_scatter(_ReduceScatter(self))  # type: ignore[arg-type]  # as its base class is private

    def __call__(self, inputs: Any) -> Any:
        """Return the model's outputs."""
        self.empty = False
        with self._explained("put weights together"):
            return super().__call__(inputs)

    @contextmanager
    def no_sync(self, tree: GradientTree) -> Iterator[None]:
        """A context for a replica's passes; in an exact run its gradients wait whole in this process, beside the tree.

        Where nobody goes through the model in this context, the replica has no samples.
        """
        with self._replica(keeps=self.exact):
            yield
        gradients = take_gradients(self.parameters)
        if not self.exact:
            tree.add(gradients)

    @contextmanager
    def sync(self, tree: GradientTree) -> Iterator[None]:
        """A context for the last replica's passes; after it, `.grad` has this process's part of all replicas' sum."""
        with self._replica(keeps=False):
            yield
        if not self.exact:
            tree.add(take_gradients(self.parameters))
            give_gradients(self.parameters, tree.total())

    @contextmanager
    def _replica(self, keeps: bool) -> Iterator[None]:
        self.empty, self.keeps = True, keeps
        with self._explained("added gradients"):
            yield
            if self.empty and self._dummy_loss is not None:
                loss = self._dummy_loss()
                self.empty = True
                loss.backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say which exchange failed, if that is what PyTorch raises from inside the model."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(self.group, DistributedGroup) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                with self.group.explain_failure(what):
                    raise
            raise

    def broadcast_weights(self) -> None:
        """Do nothing: the weights were the first process's before they were divided."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that can't work on parts of parameters.

        Raises:
            UsageError: it needs whole matrices, or the run is exact and nobody knows.
        """
        check_optimizer(optimizer, self.exact)
        if self.exact and self._device.type == "cuda":
            update_in_one_call(optimizer)

    def grad_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the whole gradient, the same on every process.

        In an exact run each parameter's gradient is put together for it, one after another, and the norm of their norms
        is that of one process, bit for bit. Otherwise PyTorch adds the squares of each process's parts.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not self.exact or not gradients:
            return whole(nn.utils.get_total_norm(gradients))
        norms = [torch._foreach_norm([whole(gradient)])[0] for gradient in gradients]  # as get_total_norm takes them
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Scale the gradient down to a largest norm; return its norm before."""
        norm = self.grad_norm(parameters)
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    def full_state(self, state: Any) -> Any:
        """Return a state put together, in the first process; None in the others."""
        return gather(state, self.group)

    def load_state(self, target: nn.Module | Optimizer | EMA, state: dict[str, Any]) -> None:
        """Load this process's part of a state."""
        load_part(target, state)


class _ReduceScatter:
    """Adds the gradients of a block over the processes and leaves each its part; FSDP calls it while backward runs.

    Args:
        owner: says whether the run is exact, and what to do with this replica.
    """

    def __init__(self, owner: FSDP) -> None:
        self._owner = owner
        self._elements: int | None = None
        self._own = GradientTree()  # the whole gradients of this process's replicas, if the run is exact

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for what is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,  # noqa: ARG002 - always a sum
        async_op: bool = False,  # noqa: ARG002 - FSDP never asks for it
    ) -> None:
        """Add.

        Args:
            output_tensor: (elements / processes,) this process's part of the sum.
            input_tensor: (elements,) the block's gradients, for each process its part.
            group: the processes.
            op: how FSDP would reduce.
            async_op: whether to return at once.
        """
        self._check(input_tensor, group)
        if self._owner.empty:
            input_tensor.zero_()
        if not self._owner.exact:
            dist.reduce_scatter_tensor(output_tensor, input_tensor, group=group)
            return
        self._own.add([input_tensor])
        if self._owner.keeps:
            output_tensor.zero_()
            return
        own, self._own = cast(Tensor, self._own.total()[0]), GradientTree()
        parts = torch.empty_like(own)
        dist.all_to_all_single(parts, own, group=group)
        tree = GradientTree()
        for part in parts.chunk(group.size()):
            tree.add([part])
        output_tensor.copy_(cast(Tensor, tree.total()[0]))

    def _check(self, gradients: Tensor, group: dist.ProcessGroup) -> None:
        """Raise a RelayError where what the processes add doesn't belong together, instead of waiting for ever."""
        elements = gradients.numel()
        if self._elements is None:
            there = gradients.new_empty(group.size(), dtype=torch.int64)
            dist.all_gather_into_tensor(there, there.new_full((1,), elements), group=group)
            self._elements = elements if len(set(there.tolist())) == 1 else -1
        if self._elements != elements:
            raise RelayError(
                "a replica uses other parameters of the model than another one, which parallel.kind 'fsdp' can't add: "
                "use 'ddp'"
            )


def _policy(model: nn.Module, device: Device, exact: bool) -> MixedPrecisionPolicy:
    """Return in which types blocks compute and add; autocast alone would keep 16-bit copies of all weights."""
    running = any(name.endswith("running_mean") for name, _ in model.named_buffers())  # which stays float32
    if exact or running or device.settings.precision == "float32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=device.dtype, reduce_dtype=torch.float32)
