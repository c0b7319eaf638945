"""Step 3: gradient checkpointing: activations of chosen modules are computed again in the backward pass, not kept.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174); PyTorch's `torch.utils.checkpoint`. The
second pass draws the same random numbers, so the results are those without it.
"""

import fnmatch
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchrelay.errors import UsageError, nearest


def recompute(model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """Let the modules whose names match shell patterns, such as ["layer3.*"], compute their activations again.

    A module inside another one that matches is part of it.

    Args:
        model: is changed in place.
        patterns: of names of modules.

    Returns:
        The model.

    Raises:
        UsageError: a pattern matches no module, or one with running statistics, which would be updated twice.
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"model.recompute: '{pattern}' matches no module{nearest(pattern, names)}")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for name in chosen:
        if any(name.startswith(f"{other}.") for other in chosen):
            continue
        module = model.get_submodule(name)
        if any(getattr(each, "track_running_stats", False) for each in module.modules()):
            raise UsageError(
                f"model.recompute: '{name}' has running statistics, which a second pass would update again: choose "
                "modules without BatchNorm"
            )
        module.forward = _checkpointed(module.forward)
    return model


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def again(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return again
