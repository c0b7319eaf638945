"""Step 5: Muon: momentum whose matrices are orthogonalised (Keller Jordan, https://kellerjordan.github.io/posts/muon/).

Weight matrices and convolutions get it; everything else (biases, norms, the head, what is frozen apart) is trained by
Nesterov momentum in the same optimizer, since an update of a vector has nothing to orthogonalise.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_A, _B, _C = 3.4445, -4.7750, 2.0315  # a quintic that is steep at zero: small singular values grow in few iterations


def orthogonalise(matrix: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """Return nearly the closest matrix with all singular values one, by a Newton-Schulz iteration.

    Args:
        matrix: (rows, columns).
        iterations: 3 to 5; the singular values come to lie between some 0.7 and 1.2.
        dtype: in which to compute; bfloat16 serves.
    """
    x = matrix.to(dtype)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class MuonOptimizer(Optimizer):
    """Muon for the groups that say so, Nesterov momentum for the others.

    Args:
        groups: parameter groups, each with "lr", "weight_decay", "momentum" and "orthogonal".
        iterations: of the orthogonalisation.
        dtype: in which the orthogonalisation computes.
        normalise: scale each orthogonalised weight to a norm of sqrt(rows) before its update, as the CIFAR-10 records do;
            only for weights that a norm layer follows.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], iterations: int, dtype: torch.dtype, normalise: bool) -> None:
        super().__init__(groups, {"momentum": 0.9, "weight_decay": 0.0, "lr": 0.02, "orthogonal": True})
        self._iterations = iterations
        self._dtype = dtype
        self._normalise = normalise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"]
        if not group["orthogonal"]:
            gradient = gradient.add(parameter, alpha=decay)
            buffer.mul_(momentum).add_(gradient)
            parameter.add_(gradient.add(buffer, alpha=momentum), alpha=-lr)
            return
        buffer.mul_(momentum).add_(gradient)
        direction = gradient.add(buffer, alpha=momentum)
        update = orthogonalise(direction.flatten(1), self._iterations, self._dtype).view_as(parameter)
        if self._normalise:
            parameter.mul_(parameter.shape[0] ** 0.5 / parameter.norm())
        else:
            parameter.mul_(1 - lr * decay)
            update = update * max(1.0, update.shape[0] / update[0].numel()) ** 0.5
        parameter.add_(update, alpha=-lr)
