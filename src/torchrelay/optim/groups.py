"""Step 5: parameter groups: which parameters have a learning rate or a weight decay of their own, or aren't trained."""

import fnmatch
from collections.abc import Callable
from typing import Any, Self

from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from torchrelay.errors import UsageError, nearest
from torchrelay.settings import Settings

Options = dict[str, Any]  # what a parameter is trained with: "lr", "weight_decay" and what else its optimizer wants
OptionsOf = Callable[[str, nn.Parameter], Options]  # from a parameter and its name


class Group(Settings):
    """Parameters, chosen by their names, that are treated in a way of their own."""

    match: list[str] = Field(min_length=1)
    """Shell patterns of parameter names, such as ["layer4.*", "fc.*"]; the first group that matches counts."""
    lr: float | None = Field(default=None, ge=0.0)
    """Their learning rate."""
    lr_scale: float | None = Field(default=None, ge=0.0)
    """Or the factor between their learning rate and the one that they would have."""
    weight_decay: float | None = Field(default=None, ge=0.0)
    """Their weight decay."""
    freeze: bool = False
    """Whether they stay as they are."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("lr and lr_scale say the same thing: keep one of them")
        if self.freeze and {self.lr, self.lr_scale, self.weight_decay} != {None}:
            raise ValueError("a frozen group has no lr, lr_scale or weight_decay: leave them out")
        return self


def parameter_groups(
    model: nn.Module,
    options: OptionsOf,
    groups: list[Group],
    decay_norms_and_biases: bool,
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of equal options, as a torch optimizer takes them.

    The parameters of a group are in the order of `model.parameters()`, so that without options of their own all are one
    group, as with a plain torch optimizer.

    Args:
        model: parameters that `groups` freeze have their `requires_grad` turned off.
        options: what a parameter has that no group names, among them "lr" and "weight_decay".
        groups: the exceptions.
        decay_norms_and_biases: if not, parameters of less than two dimensions don't decay, whatever a group says.

    Raises:
        UsageError: a pattern has no trainable parameter of its own, or none is left to train.
    """
    found: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    _check_patterns(groups, [name for name, _ in trainable])
    for name, parameter in trainable:
        group = next((g for g in groups if matches(name, g.match)), None)
        if group is not None and group.freeze:
            parameter.requires_grad_(False)
            continue
        its = _with_exceptions(options(name, parameter), group)
        if parameter.ndim < 2 and not decay_norms_and_biases:
            its["weight_decay"] = 0.0
        found.setdefault(tuple(its.items()), []).append(parameter)
    if not found:
        raise UsageError("no parameter is left to train: let some go in model.freeze or optimizer.groups")
    return [{"params": members, "initial_lr": dict(its)["lr"], **dict(its)} for its, members in found.items()]


def matches(name: str, patterns: list[str]) -> bool:
    """Return whether a parameter's name is among those that shell patterns mean."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def nearest_pattern(pattern: str, names: list[str]) -> str:
    """Return ``"; did you mean 'layer4.*'?"`` for what is most like a pattern, or else the first names."""
    modules = {name.rsplit(".", depth)[0] + ".*" for name in names for depth in range(1, name.count(".") + 1)}
    return nearest(pattern, [*names, *sorted(modules)]) or f"; the names begin with {', '.join(names[:4])}"


def _check_patterns(groups: list[Group], names: list[str]) -> None:
    """Refuse a pattern that matches nothing, or nothing that an earlier group leaves over."""
    left = names
    for group in groups:
        for pattern in group.match:
            if not any(matches(name, [pattern]) for name in names):
                near = nearest_pattern(pattern, names)
                raise UsageError(f"optimizer.groups: '{pattern}' matches no trainable parameter{near}")
            if not any(matches(name, [pattern]) for name in left):
                raise UsageError(
                    f"optimizer.groups: '{pattern}' comes too late: earlier groups have all that it matches"
                )
        left = [name for name in left if not matches(name, group.match)]


def _with_exceptions(options: Options, group: Group | None) -> Options:
    if group is None:
        return dict(options)
    lr = options["lr"] * (1.0 if group.lr_scale is None else group.lr_scale) if group.lr is None else group.lr
    decay = options["weight_decay"] if group.weight_decay is None else group.weight_decay
    return {**options, "lr": lr, "weight_decay": decay}


def clear_gradients(optimizer: Optimizer) -> None:
    """Do what the optimizer's `zero_grad` does, without its bookkeeping for the profiler: some 10 us less a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
