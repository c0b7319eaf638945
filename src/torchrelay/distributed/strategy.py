"""Step 4: the contract of a strategy, by which a model's replicas share a step; `Strategy` itself is for one process.

A step runs this process's replicas, the first one last, and then sums over all processes::

    losses = []
    for replica in reversed(replicas):
        with strategy.replica(last=replica is replicas[0]):
            loss = criterion(strategy(replica.inputs), replica.targets)
            loss.backward()
        losses.append(loss.detach())
    loss = strategy.reduce(losses)  # from here on, .grad holds the sum over all replicas of all processes
    optimizer.step()
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchrelay.data.batch import aligned
from torchrelay.device.device import mapped
from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.distributed.replicas import (
    Buffers,
    GradientTree,
    add_neighbors,
    give_gradients,
    take_gradients,
    tree_sum,
)
from torchrelay.errors import UsageError
from torchrelay.models.ema import EMA


class OneCall:
    """Stands for a model that may only be called as a whole.

    Args:
        call: runs the model.
        kind: of the strategy.
    """

    def __init__(self, call: Callable[..., Any], kind: str) -> None:
        self._call, self._kind = call, kind

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the model's outputs."""
        return self._call(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        raise UsageError(
            f"the task uses model.{name}, and parallel.kind '{self._kind}' runs a model as a whole: use an exact run "
            "with parallel.kind 'ddp', or let forward() do it"
        )


class Strategy:
    """Runs a model's replicas and sums their gradients.

    A subclass for several processes overrides `no_sync` and `sync`, and what else differs.

    Args:
        model: the model, already on its device.
        group: the process group.
        exact: whether gradients are summed in the fixed tree, or in the order that the backend chooses.
        forward: what computes the outputs, such as the compiled model; the model itself if not given.

    Attributes:
        collective_forward: whether all processes must run the same number of forward passes, in evaluation as well.
        model_name: the name of the model's class, before a strategy changes it.
    """

    collective_forward = False

    def __init__(
        self, model: nn.Module, group: ProcessGroup, *, exact: bool, forward: Callable[..., Any] | None = None
    ) -> None:
        self.model = model
        self.model_name = type(model).__name__
        self.group = group
        self.exact = exact
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers = Buffers(model)
        # Not `forward or model`: a module's truth is its length, which may be 0 or missing.
        self._forward = model if forward is None else forward
        self._tree: GradientTree | None = None  # of the current step

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the model's outputs; called once for a replica."""
        return self._forward(*inputs, **named)

    @property
    def module(self) -> Any:
        """What a task of the user's computes with: the model, which may be called often, and its submodules alone."""
        return self._forward

    @contextmanager
    def replica(self, *, last: bool) -> Iterator[None]:
        """Enclose one replica's forward and backward pass; nothing in it if the replica has no samples.

        Each replica starts from the buffers, such as BatchNorm's running statistics, that the step started from.

        Args:
            last: whether this is the process's last replica of the step. Its buffers remain, and gradients are
                synchronized while its backward pass runs.
        """
        if self._tree is not None:
            self.buffers.restore()
        elif not last:
            self.buffers.keep()
        tree, self._tree = self._tree or GradientTree(), None  # an error ends the step
        with self.sync(tree) if last else self.no_sync(tree):
            yield
        self._tree = None if last else tree

    @contextmanager
    def no_sync(self, tree: GradientTree) -> Iterator[None]:
        """Enclose a replica's passes and add its gradients to this process's tree."""
        yield
        tree.add(take_gradients(self.parameters))

    @contextmanager
    def sync(self, tree: GradientTree) -> Iterator[None]:
        """Enclose the last replica's passes; after it and `reduce`, `.grad` holds the sum over all replicas."""
        yield
        if tree.leaves:
            tree.add(take_gradients(self.parameters))
            give_gradients(self.parameters, tree.total())

    def reduce(self, losses: Sequence[Tensor]) -> Tensor:
        """Complete a step's gradient synchronization, and give all processes the buffers of rank 0.

        Args:
            losses: of this process's replicas, each without dimensions, in the order in which they ran.

        Returns:
            The sum over all replicas of all processes.
        """
        loss = tree_sum(losses)
        if self.group.size == 1:
            return loss
        self.group.broadcast(self.buffers.live)
        return add_neighbors(self.group.gather(loss).unbind())

    def broadcast_weights(self) -> None:
        """Give all processes the weights and buffers of rank 0."""
        self.group.broadcast([tensor for _, tensor in sorted(self.model.state_dict().items())])

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise a UsageError if the optimizer can't work on what this process holds of the parameters."""

    def grad_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the whole gradient, without dimensions."""
        return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradient down to `max_norm` if its norm is larger; return the norm before that."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def full_state(self, state: Any) -> Any:
        """Return a state with whole tensors, as a checkpoint holds it, on rank 0. All processes call this together."""
        return state

    def load_state(self, target: nn.Module | Optimizer | EMA, state: dict[str, Any]) -> None:
        """Load a checkpoint's state into a model, its optimizer or its moving average."""
        if not isinstance(target, Optimizer):
            target.load_state_dict(state)
            return
        # A file's tensors begin anywhere, and LBFGS multiplies its own.
        target.load_state_dict(mapped(aligned, state))
        _restore_memory_format(target)


@torch.no_grad()
def _restore_memory_format(optimizer: Optimizer) -> None:
    """Give each state its parameter's strides: a checkpoint doesn't keep them, and fused optimizers rely on them."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
