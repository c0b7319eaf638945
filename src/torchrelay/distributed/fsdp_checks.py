"""Step 4: what `parallel.kind = "fsdp"` supports: the blocks of a model, and checks of models and optimizers."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torchrelay.device.device import Device
from torchrelay.errors import UsageError
from torchrelay.models.factory import InitFromData

SMALLEST = 100_000  # parameters of a block that is gathered on its own; smaller ones aren't worth a collective
_LISTS = (nn.ModuleList, nn.ModuleDict)
_LARGEST_SHARE = 0.25  # of the model's parameters; a larger block is divided into its own blocks if it has any

# They update each element on its own, so a shard is updated as the whole parameter would be.
_ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
# PyTorch's `add_` with an alpha rounds a tensor's last elements differently, and which are the last is up to the shard.
_HALF = (torch.bfloat16, torch.float16)
_FUSED = ("Adam", "AdamW")  # whose fused versions accept sharded parameters
_WHOLE_MATRICES = ("Muon", "Adafactor")


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model that are each gathered on their own: large children of its lists and sequences.

    A block that shares a parameter with a module outside it isn't one of them: it is gathered with the whole model.
    """
    total, holders = _size(model), _holders(model)

    def inside(module: nn.Module) -> list[nn.Module]:
        result: list[nn.Module] = []
        for child in module.children():
            inner = inside(child)
            # Parameters are gathered before a forward pass, which lists don't have.
            listed = isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(child, _LISTS)
            fits = _size(child) >= SMALLEST and (not inner or _size(child) <= _LARGEST_SHARE * total)
            alone = all(holders[parameter] == count for parameter, count in _holders(child).items())
            result += [child] if listed and fits and alone else inner
        return result

    return list(dict.fromkeys(inside(model)))  # a block may occur twice


def _holders(module: nn.Module) -> Counter[nn.Parameter]:
    """Return for each parameter how many modules hold it, this one and those inside it."""
    return Counter(parameter for part in module.modules() for parameter in part.parameters(recurse=False))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_model(model: nn.Module, device: Device, exact: bool) -> None:
    """Check that a model can be sharded.

    Raises:
        UsageError: it can't; the text says why, and what to do.
    """
    if device.settings.compile:
        raise UsageError("device.compile and parallel.kind 'fsdp' don't go together: leave one out, or use 'ddp'")
    if isinstance(model, InitFromData):
        raise UsageError(
            f"{type(model).__name__} initializes itself from the data, which parallel.kind 'fsdp' can't do with "
            "shards of it: use 'ddp'"
        )
    if exact and device.settings.channels_last:  # a gradient's norm depends on its memory format
        raise UsageError(
            "device.channels_last and parallel.kind 'fsdp' aren't exact together: leave one out, or "
            "--set run.exact=false"
        )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise UsageError(
                f"parallel.kind 'fsdp' can't divide the parameter '{name}', which is a single number: "
                "give it the shape (1,), or use 'ddp'"
            )
        if exact and parameter.dtype in _HALF:
            raise UsageError(
                f"the parameter '{name}' is {str(parameter.dtype).removeprefix('torch.')}, whose update rounds by the "
                "length of a shard, so parallel.kind 'fsdp' isn't exact: keep it in float32 with device.precision "
                "'bf16', use 'ddp', or --set run.exact=false"
            )
        if exact and not parameter.is_contiguous():
            raise UsageError(
                f"the parameter '{name}' isn't contiguous, and parallel.kind 'fsdp' is exact only for those that are: "
                "call contiguous() on it, or --set run.exact=false"
            )


def check_optimizer(optimizer: Optimizer, exact: bool) -> None:
    """Check that an optimizer can work on shards of parameters.

    Raises:
        UsageError: it needs whole matrices, or the run is exact and it isn't known to be elementwise.
    """
    name = type(optimizer).__name__
    rules = {group["rule"] for group in optimizer.param_groups if "rule" in group}  # of our Muon, SGD and AdamW in one
    if name in _WHOLE_MATRICES or "muon" in rules:
        raise UsageError(
            f"optimizer '{name.removesuffix('Optimizer').lower()}' needs whole matrices, which parallel.kind 'fsdp' "
            "shards: use 'adamw' or 'sgd', or parallel.kind 'ddp'"
        )
    if exact and name not in _ELEMENTWISE and not rules:
        raise UsageError(
            f"optimizer '{name}' isn't known to give the same bits on shards of parameters: use one of "
            f"{', '.join(_ELEMENTWISE)}, or parallel.kind 'ddp', or --set run.exact=false"
        )
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if fused and (exact or name not in _FUSED):  # they round a tensor's last elements differently
        raise UsageError(
            f"a fused '{name.lower()}' {'gives other bits' if exact else 'does not work'} on shards of parameters, as "
            "parallel.kind 'fsdp' has them: leave fused out, or use 'ddp'"
        )


def update_in_one_call(optimizer: Optimizer) -> None:
    """Let an optimizer update all shards in one call, as PyTorch does with unsharded parameters on CUDA by default.

    The option is set only during the step: a checkpoint holds the options of an unsharded run.
    """
    default_groups: list[dict[str, Any]] = []  # groups that leave the choice to PyTorch

    def before(stepping: Optimizer, *_: Any) -> None:
        default_groups[:] = [group for group in stepping.param_groups if group.get("foreach", False) is None]
        for group in default_groups:
            group["foreach"] = True

    def after(*_: Any) -> None:
        for group in default_groups:
            group["foreach"] = None

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
