"""Step 4: what runs a model's replicas and adds their gradients; here in one process, elsewhere in several.

The trainer does the same with each: a replica's passes in `keep_here`, the last one's in `send`, and then `add`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchrelay.distributed.process_group import World
from torchrelay.distributed.replicas import GradientTree, add_neighbours, give_gradients, take_gradients
from torchrelay.models import EMA


class Exchange:
    """Runs a model's replicas and adds their gradients.

    Args:
        model: whose gradients are added.
        world: the processes.
        exact: whether gradients are added in the fixed tree, or as the backend likes to.
        forward: the model, or the same compiled.

    Attributes:
        together: whether every process must go as often through the model as the others, in evaluations, too.
    """

    together = False

    def __init__(
        self, model: nn.Module, world: World, *, exact: bool, forward: Callable[[Any], Any] | None = None
    ) -> None:
        self.model = model
        self.model_name = type(model).__name__  # as its author calls it: what is divided gets another class
        self.world = world
        self.exact = exact
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers = list(model.buffers())
        self._forward = forward or model

    def __call__(self, inputs: Any) -> Any:
        """Return the model's outputs."""
        return self._forward(inputs)

    @contextmanager
    def keep_here(self, tree: GradientTree) -> Iterator[None]:
        """A context for a replica's forward and backward pass, whose gradients go into this process's tree."""
        yield
        tree.add(take_gradients(self.parameters))

    @contextmanager
    def send(self, tree: GradientTree) -> Iterator[None]:
        """A context for the last replica's passes; after it, and `add`, gradients are the sums of all replicas'."""
        yield
        tree.add(take_gradients(self.parameters))
        give_gradients(self.parameters, tree.total())

    def start_alike(self) -> None:
        """Give all processes the first one's weights."""
        self.world.broadcast([tensor for _, tensor in sorted(self.model.state_dict().items())])

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that can't work on what this process has of the parameters; here that is all."""

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the whole gradient."""
        return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Scale the gradient down to a largest norm; return its norm before."""
        return nn.utils.clip_grad_norm_(parameters, largest)

    def whole(self, state: Any) -> Any:
        """Return a state as a checkpoint has it, in the first process; all of them ask together."""
        return state

    def load(self, target: nn.Module | Optimizer | EMA, state: dict[str, Any]) -> None:
        """Load a state of a checkpoint into a model, its optimizer or its moving average."""
        target.load_state_dict(state)
        if isinstance(target, Optimizer):
            _lay_out(target)

    def add(self, loss: Tensor) -> Tensor:
        """Return the sum of the processes' losses; give all of them the first one's buffers."""
        self.world.broadcast(self.buffers)
        return add_neighbours(self.world.gather(loss).clone().unbind())


@torch.no_grad()
def _lay_out(optimizer: Optimizer) -> None:
    """Give each state its parameter's memory layout: a checkpoint doesn't keep it, a fused optimizer relies on it."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
