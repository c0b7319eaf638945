"""Step 5: Muon: orthogonalized momentum.

After Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon), and
Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982). A gradient's matrix is often dominated by a few
directions; orthogonalizing it makes all of them move by the same amount. Biases and norms have no directions, and
embeddings and the head train better without it (both sources), so the same optimizer trains them by SGD or AdamW.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

# Jordan's quintic a·x + b·x³ + c·x⁵: as steep at zero as possible while it maps [0, 1] into about [0, 1.2]. It doesn't
# converge to one and needn't: five iterations bring singular values above 0.01 to between 0.68 and 1.14.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST = 1e-30  # below any norm that matters: the result doesn't depend on the gradient's scale


def orthogonalize(matrix: Tensor, iterations: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix with its singular vectors kept and its singular values brought near one (Newton-Schulz).

    Args:
        matrix: (rows, columns), of any scale; zeros stay zeros.
        iterations: 3 to 5 are enough.
        dtype: of the matrix products; the result has the matrix's dtype.
    """
    # No singular value exceeds the Frobenius norm.
    x = (matrix / matrix.norm().clamp(min=_SMALLEST)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # gives the products below the size of the smaller side
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    near: Tensor = (x.T if tall else x).to(matrix.dtype)
    return near


class MuonOptimizer(Optimizer):
    """Muon, SGD and AdamW in one optimizer; the "rule" of a parameter group selects one of them.

    Its groups hold only plain numbers and strings and its state only tensors, so a checkpoint resumes exactly. SGD and
    AdamW compute the same bits as those of torch.optim.

    Args:
        groups: each with "lr", "weight_decay", "rule" ("muon", "sgd" or "adamw") and the options of that rule:
            muon: "momentum", "nesterov", "iterations", "dtype" and "normalise_weights" (`optim.Muon`
            explains them; the last is spelled so in checkpoints);
            sgd: "momentum" and "nesterov"; adamw: "betas" and "eps".
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.02, "weight_decay": 0.0, "rule": "muon"})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        rules = {"muon": self._muon, "sgd": self._sgd, "adamw": self._adamw}
        for group in self.param_groups:
            rules[group["rule"]]([parameter for parameter in group["params"] if parameter.grad is not None], group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None  # noqa: S101 - `step` skips the others
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
            direction = gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
            # A convolution (filters, channels, height, width) is a matrix with a row for each filter.
            update = orthogonalize(direction.flatten(1), group["iterations"], getattr(torch, group["dtype"]))
            rows, columns = update.shape
            if group["normalise_weights"]:
                parameter.mul_(rows**0.5 / parameter.flatten(1).norm().clamp(min=_SMALLEST))
            else:
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                # A layer's output then moves by the same amount whatever the shape.
                update = update * max(1.0, rows / columns) ** 0.5
            _subtract(parameter, update.view(parameter.shape), group["lr"])

    def _sgd(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        buffers = [self.state[parameter].get("momentum_buffer") for parameter in parameters]
        options = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        # Only the fused kernel takes a learning rate on the device without copying it to the CPU.
        fused = True if isinstance(group["lr"], Tensor) else None
        sgd(parameters, _gradients(parameters), buffers, fused=fused, **options, dampening=0.0, maximize=False)
        for parameter, buffer in zip(parameters, buffers, strict=True):
            if buffer is not None:
                self.state[parameter]["momentum_buffer"] = buffer

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["step"] = torch.tensor(0.0, dtype=torch.float32)
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        state = {name: [self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq", "step")}
        adamw(
            parameters,
            _gradients(parameters),
            state["exp_avg"],
            state["exp_avg_sq"],
            [],
            state["step"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _subtract(parameter: Tensor, update: Tensor, rate: float | Tensor) -> None:
    """Subtract `rate` times an update; a rate on the device stays there, so a CUDA graph can record this."""
    if isinstance(rate, Tensor):
        parameter.addcmul_(update, -rate)
    else:
        parameter.add_(update, alpha=-rate)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
