"""Step 4: the gradients of all processes, added in the one fixed tree.

Each process adds its own replicas' gradients, which gives a node of the tree. The nodes are added by sending each
process its chunk of all of them (all_to_all), adding the chunks pairwise, and handing the sums round (all_gather): as
many bytes as a ring all-reduce moves, and the same bits however many processes share the replicas.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from torchrelay.models import EMA
from torchrelay.parallel import Gradients, GradientTree, give_gradients, take_gradients
from torchrelay.world import ManyProcesses, World


class Exchange:
    """Runs a model's replicas and adds their gradients, here and in the other processes.

    Args:
        model: whose gradients are added.
        world: the processes.
        exact: whether to add in the fixed tree, or as the backend likes to.
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
        """A context for the last replica's passes; after it, each parameter's gradient is the sum of all replicas'."""
        yield
        tree.add(take_gradients(self.parameters))
        gradients = tree.total()
        if isinstance(self.world, ManyProcesses):
            with self.world.named("added gradients"):
                gradients = self._everywhere(gradients)
        give_gradients(self.parameters, gradients)

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

    def add(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes, in the tree."""
        return _tree(list(self.world.gather(value).unbind()))

    def _everywhere(self, own: Gradients) -> Gradients:
        """Return the sums over the processes; None where no process has a gradient."""
        kinds: dict[torch.dtype, list[int]] = defaultdict(list)
        for place, parameter in enumerate(self.parameters):
            kinds[parameter.dtype].append(place)
        found: Gradients = [None] * len(own)
        for places in kinds.values():
            flat, sizes = self._flat([own[place] for place in places], places)
            *sums, there = torch.split(self._add(flat), sizes)
            for place, total, used in zip(places, sums, there.tolist(), strict=True):
                if used:
                    found[place] = total.view(self.parameters[place].shape)
        return found

    def _flat(self, gradients: Gradients, places: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Return gradients as one vector, zeros where one is missing, and behind them which are there."""
        shapes = [self.parameters[place] for place in places]
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, shapes, strict=True)]
        there = torch.tensor([g is not None for g in gradients], dtype=shapes[0].dtype, device=shapes[0].device)
        return torch.cat([*(part.reshape(-1) for part in parts), there]), [*(p.numel() for p in shapes), len(places)]

    def _add(self, flat: Tensor) -> Tensor:
        """Return the sum of a vector over the processes."""
        if not self.exact:
            dist.all_reduce(flat)
            return flat
        size = self.world.size
        each = -(-len(flat) // size)
        sent = torch.nn.functional.pad(flat, (0, each * size - len(flat)))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        chunk = _tree(list(received.view(size, each).unbind()))
        dist.all_gather_into_tensor(sent, chunk)
        return sent[: len(flat)]


def _tree(nodes: list[Tensor]) -> Tensor:
    """Return the sum of a power of two of tensors, neighbours first; of another number, the rest is added last."""
    while len(nodes) > 1:
        pairs = [left + right for left, right in zip(nodes[::2], nodes[1::2], strict=False)]
        nodes = pairs + nodes[2 * len(pairs) :]
    return nodes[0]
