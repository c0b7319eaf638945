"""Step 4: what `parallel.kind = "fsdp"` can divide: the blocks of a model, and what is refused."""

from collections import Counter
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchrelay.device.device import Device
from torchrelay.errors import UsageError
from torchrelay.models.factory import InitFromData

SMALLEST = 100_000  # parameters of a block that is gathered on its own; smaller ones aren't worth a message
_LISTS = (nn.ModuleList, nn.ModuleDict)
_LARGEST_SHARE = 0.25  # of the model that a block may be before its own blocks are looked for

# What these do with an element depends on that element alone, so that a part is updated as the whole is.
_ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
_FUSED = ("Adam", "AdamW")  # which PyTorch can fuse for parts
_WHOLE_MATRICES = ("Muon", "Adafactor")


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a model that are gathered each on its own: large children of its lists and sequences.

    A block that shares a parameter with anything outside it isn't among them: it is gathered with the whole model.
    """
    total, holders = _size(model), _holders(model)

    def inside(module: nn.Module) -> list[nn.Module]:
        found: list[nn.Module] = []
        for child in module.children():
            inner = inside(child)
            # Lists have no forward pass, before which their parameters would be gathered.
            listed = isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(child, _LISTS)
            fits = _size(child) >= SMALLEST and (not inner or _size(child) <= _LARGEST_SHARE * total)
            alone = all(holders[parameter] == count for parameter, count in _holders(child).items())
            found += [child] if listed and fits and alone else inner
        return found

    return list(dict.fromkeys(inside(model)))  # a block may stand in two places


def _holders(module: nn.Module) -> Counter[nn.Parameter]:
    """Return by how many modules, this one and those inside it, each parameter is held."""
    return Counter(parameter for part in module.modules() for parameter in part.parameters(recurse=False))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_model(model: nn.Module, device: Device, exact: bool) -> None:
    """Refuse what can't be sharded.

    Raises:
        UsageError: the text says what, and what to do.
    """
    if device.settings.compile:
        raise UsageError("device.compile and parallel.kind 'fsdp' don't go together: leave one out, or use 'ddp'")
    if isinstance(model, InitFromData):
        raise UsageError(
            f"{type(model).__name__} initializes itself from the data, which parallel.kind 'fsdp' can't do with parts "
            "of it: use 'ddp'"
        )
    if exact and device.settings.channels_last:  # the norm of a gradient in another memory format has other bits
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
        if exact and not parameter.is_contiguous():
            raise UsageError(
                f"the parameter '{name}' isn't contiguous, and parallel.kind 'fsdp' is exact only for those that are: "
                "call contiguous() on it, or --set run.exact=false"
            )


def check_optimizer(optimizer: Optimizer, exact: bool) -> None:
    """Refuse an optimizer that can't work on parts of parameters.

    Raises:
        UsageError: it needs whole matrices, or the run is exact and nobody knows.
    """
    name = type(optimizer).__name__
    rules = {group["rule"] for group in optimizer.param_groups if "rule" in group}  # of our Muon, SGD and AdamW in one
    if name in _WHOLE_MATRICES or "muon" in rules:
        raise UsageError(
            f"optimizer '{name.removesuffix('Optimizer').lower()}' needs whole matrices, of which parallel.kind 'fsdp' "
            "keeps parts: use 'adamw' or 'sgd', or parallel.kind 'ddp'"
        )
    if exact and name not in _ELEMENTWISE and not rules:
        raise UsageError(
            f"nobody knows whether optimizer '{name}' gives the same bits on parts of parameters: use one of "
            f"{', '.join(_ELEMENTWISE)}, or parallel.kind 'ddp', or --set run.exact=false"
        )
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if fused and (exact or name not in _FUSED):  # the last elements of a part are rounded otherwise than in the middle
        raise UsageError(
            f"a fused '{name.lower()}' {'gives other bits' if exact else 'does not work'} on parts of parameters, of "
            "which parallel.kind 'fsdp' is made: leave fused out, or use 'ddp'"
        )


def update_in_one_call(optimizer: Optimizer) -> None:
    """Let an optimizer update all parts in one call, as PyTorch does with whole parameters on CUDA but not with parts.

    Only while it steps: what is saved of its options stays that of an unsharded run.
    """
    free: list[dict[str, Any]] = []  # groups in which nobody has chosen

    def before(stepping: Optimizer, *_: Any) -> None:
        free[:] = [group for group in stepping.param_groups if group.get("foreach", False) is None]
        for group in free:
            group["foreach"] = True

    def after(*_: Any) -> None:
        for group in free:
            group["foreach"] = None

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
