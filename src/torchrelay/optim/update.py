"""Step 5: an optimizer update of a step: the optimizer, its parameters, and how it is called."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchrelay.errors import UsageError


class Update:
    """An optimizer and the parameters that it updates; most tasks have one in a step.

    Args:
        name: the update's name in `Task.updates`.
        optimizer: of its parameters.
        clip_norm: the largest norm of their gradient; None: it isn't clipped.
        stream: the name of the random numbers that its forward pass draws.
    """

    def __init__(self, name: str, optimizer: Optimizer, clip_norm: float | None = None, stream: str = "model") -> None:
        self.name, self.optimizer, self.clip_norm, self.stream = name, optimizer, clip_norm, stream
        self.parameters: list[nn.Parameter] = [each for group in optimizer.param_groups for each in group["params"]]
        self.wants_closure = wants_closure(optimizer)

    def step(self, loss: Tensor, recompute: Callable[[], Tensor]) -> None:
        """Call an optimizer with a closure that computes the same loss and gradient again.

        Args:
            loss: of the gradient that the parameters have.
            recompute: leaves the gradient in the parameters and returns the loss.
        """
        # LBFGS begins with the loss at the weights as they are; SAM has moved them before its first call.
        known = [loss] if isinstance(self.optimizer, torch.optim.LBFGS) else []

        def closure() -> Tensor:
            if known:
                return known.pop()
            self.optimizer.zero_grad()
            with torch.enable_grad():
                return recompute()

        self.optimizer.step(closure)  # type: ignore[arg-type]


def left_out(model: nn.Module, updates: Sequence[Update]) -> list[str]:
    """Return the names of the parameters that require gradients and that no optimizer has."""
    held = {id(parameter) for update in updates for parameter in update.parameters}
    return [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in held]


def check_unfrozen(model: nn.Module, updates: Sequence[Update], before: Sequence[str]) -> None:
    """Refuse parameters that were unfrozen though no optimizer has them.

    Args:
        model: has the parameters.
        updates: have the optimizers.
        before: what `left_out` returned before the training.

    Raises:
        UsageError: there are some.
    """
    names = [name for name in left_out(model, updates) if name not in before]
    if names:
        raise UsageError(
            f"'{names[0]}' was unfrozen ({len(names):,} parameters in all), but the optimizer left out what was frozen "
            "when it was made: freeze it by the optimizer's settings, such as groups=[tr.optim.Group(match=['head.*'], "
            "freeze='1 epoch')], which a resume repeats"
        )


def wants_closure(optimizer: Optimizer) -> bool:
    """Return whether `optimizer.step` needs a closure: its argument has no default, or `needs_closure` says so."""
    if hasattr(optimizer, "needs_closure"):
        return bool(optimizer.needs_closure)
    # PyTorch wraps the method of an instance.
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


@contextmanager
def alone(update: Update, updates: Sequence[Update]) -> Iterator[None]:
    """Let only an update's parameters require gradients."""
    own: set[Any] = set(update.parameters)
    others = [each for other in updates for each in other.parameters if each.requires_grad and each not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
