"""Step 4: what runs a model's replicas and adds their gradients; here in one process, elsewhere in several.

The trainer does the same with each: a replica's passes in `no_sync`, the last one's in `sync`, and then `reduce`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.distributed.replicas import GradientTree, add_neighbours, give_gradients, take_gradients
from torchrelay.models.ema import EMA


class Strategy:
    """Runs a model's replicas and adds their gradients.

    Args:
        model: whose gradients are added.
        group: the processes.
        exact: whether gradients are added in the fixed tree, or as the backend likes to.
        forward: the model, or the same compiled.

    Attributes:
        collective_forward: whether every process must go as often through the model as the others, in evaluations, too.
    """

    collective_forward = False

    def __init__(
        self, model: nn.Module, group: ProcessGroup, *, exact: bool, forward: Callable[[Any], Any] | None = None
    ) -> None:
        self.model = model
        self.model_name = type(model).__name__  # as its author calls it: what is divided gets another class
        self.group = group
        self.exact = exact
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers = list(model.buffers())
        self._forward = forward or model

    def __call__(self, inputs: Any) -> Any:
        """Return the model's outputs."""
        return self._forward(inputs)

    @contextmanager
    def no_sync(self, tree: GradientTree) -> Iterator[None]:
        """A context for a replica's forward and backward pass, whose gradients go into this process's tree."""
        yield
        tree.add(take_gradients(self.parameters))

    @contextmanager
    def sync(self, tree: GradientTree) -> Iterator[None]:
        """A context for the last replica's passes; after it, and `reduce`, gradients are the sums of all replicas'."""
        yield
        tree.add(take_gradients(self.parameters))
        give_gradients(self.parameters, tree.total())

    def broadcast_weights(self) -> None:
        """Give all processes the first one's weights."""
        self.group.broadcast([tensor for _, tensor in sorted(self.model.state_dict().items())])

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that can't work on what this process has of the parameters; here that is all."""

    def grad_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the whole gradient."""
        return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Scale the gradient down to a largest norm; return its norm before."""
        return nn.utils.clip_grad_norm_(parameters, largest)

    def full_state(self, state: Any) -> Any:
        """Return a state as a checkpoint has it, in the first process; all of them ask together."""
        return state

    def load_state(self, target: nn.Module | Optimizer | EMA, state: dict[str, Any]) -> None:
        """Load a state of a checkpoint into a model, its optimizer or its moving average."""
        target.load_state_dict(state)
        if isinstance(target, Optimizer):
            _lay_out(target)

    def reduce(self, loss: Tensor) -> Tensor:
        """Return the sum of the processes' losses; give all of them the first one's buffers."""
        self.group.broadcast(self.buffers)
        return add_neighbours(self.group.gather(loss).clone().unbind())


@torch.no_grad()
def _lay_out(optimizer: Optimizer) -> None:
    """Give each state its parameter's memory layout: a checkpoint doesn't keep it, a fused optimizer relies on it."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
