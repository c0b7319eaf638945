"""Step 6: from a summed loss to the mean that people read, and to the gradients of that mean."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward as _run_backward


def mean_loss(loss: Tensor, weight: Tensor | float) -> Tensor:
    """Return the mean whose sum is `loss`, for people to read: it is outside of the graph."""
    divisor = weight if isinstance(weight, Tensor) else _constants(weight, loss.shape, loss.dtype, loss.device)[0]
    return loss.detach() / divisor


def backward_from_mean(
    loss: Tensor, weight: Tensor | float, scale: Callable[[Tensor], Tensor] = lambda first: first
) -> None:
    """Add the gradients of the mean whose sum is `loss` to the parameters'.

    It begins at the sum, with the mean's gradient with respect to it: a division less to record and to go back through.

    Args:
        loss: summed, without dimensions.
        weight: what it is divided by.
        scale: what the gradient goes through first, as fp16 wants it.
    """
    if isinstance(weight, Tensor):
        first = torch.ones_like(loss) / weight
    else:
        first = _constants(weight, loss.shape, loss.dtype, loss.device)[1]
    # What `loss.backward(first)` calls once it has checked its arguments, which takes as long as the loss itself.
    _run_backward((loss,), (scale(first),), False, False, (), allow_unreachable=True, accumulate_grad=True)


@lru_cache(maxsize=16)  # nearly all batches have one size
def _constants(weight: float, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a weight and its reciprocal as tensors: to make one of a number takes longer than to use it."""
    divisor = torch.tensor(weight, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return divisor, torch.ones(shape, dtype=dtype, device=device) / weight
