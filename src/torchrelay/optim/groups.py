"""Step 5: parameter groups: parameters with a learning rate or weight decay of their own, or frozen ones."""

import fnmatch
from collections.abc import Callable
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from torchrelay.duration import Duration, StepDuration
from torchrelay.errors import UsageError, nearest
from torchrelay.settings import Settings

Options = dict[str, Any]  # of a parameter: "lr", "weight_decay" and further options of its optimizer
OptionsOf = Callable[[str, nn.Parameter], Options]  # (parameter's name, parameter) -> its options


class Group(Settings):
    """Parameters, selected by name, with options of their own."""

    match: list[str] = Field(min_length=1)
    """Shell patterns of parameter names, such as ["layer4.*", "fc.*"]; the first matching group applies."""
    lr: float | None = Field(default=None, ge=0.0)
    """Their learning rate."""
    lr_scale: float | None = Field(default=None, ge=0.0)
    """Or a factor by which their learning rate is multiplied."""
    weight_decay: float | None = Field(default=None, ge=0.0)
    """Their weight decay."""
    freeze: bool | StepDuration = False
    """Whether they aren't trained; or how long, from the start, they aren't: "3 epochs"."""
    train_for: StepDuration | None = None
    """How long, from the start, they are trained: "1 epoch". Unset: to the end."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("lr and lr_scale exclude each other: keep one of them")
        if self.freeze is True and {self.lr, self.lr_scale, self.weight_decay, self.train_for} != {None}:
            raise ValueError("a frozen group has no lr, lr_scale, weight_decay or train_for: leave them out")
        return self


def parameter_groups(
    model: nn.Module,
    options: OptionsOf,
    groups: list[Group],
    decay_norms_and_biases: bool,
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of equal options, as a torch optimizer takes them.

    Within a group, parameters keep the order of `model.parameters()`. If all have the same options, they are one group,
    as in a plain torch optimizer.

    Args:
        model: `requires_grad` of the parameters that `groups` freeze is set to False.
        options: the options of a parameter outside of `groups`, including "lr" and "weight_decay".
        groups: override these options.
        decay_norms_and_biases: if False, parameters with fewer than two dimensions have no weight decay, whatever a
            group sets.

    Raises:
        UsageError: a pattern matches no trainable parameter that earlier groups leave, or none is left to train.
    """
    by_options: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    _check_patterns(groups, [name for name, _ in trainable])
    for name, parameter in trainable:
        group = next((g for g in groups if matches(name, g.match)), None)
        if group is not None and group.freeze is True:
            parameter.requires_grad_(False)
            continue
        chosen = _with_exceptions(options(name, parameter), group)
        if parameter.ndim < 2 and not decay_norms_and_biases:
            chosen["weight_decay"] = 0.0
        by_options.setdefault(tuple(chosen.items()), []).append(parameter)
    if not by_options:
        raise UsageError("no parameter is left to train: let some go in model.freeze or optimizer.groups")
    return [
        {"params": members, "initial_lr": dict(chosen)["lr"], **dict(chosen)} for chosen, members in by_options.items()
    ]


def matches(name: str, patterns: list[str]) -> bool:
    """Return whether a parameter's name matches one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def nearest_pattern(pattern: str, names: list[str]) -> str:
    """Return ``"; did you mean 'layer4.*'?"`` for the name most similar to a pattern, or else the first names."""
    modules = {name.rsplit(".", depth)[0] + ".*" for name in names for depth in range(1, name.count(".") + 1)}
    return nearest(pattern, [*names, *sorted(modules)]) or f"; the names begin with {', '.join(names[:4])}"


def _check_patterns(groups: list[Group], names: list[str]) -> None:
    """Refuse a pattern that matches nothing, or only parameters of earlier groups."""
    remaining = names
    for group in groups:
        for pattern in group.match:
            if not any(matches(name, [pattern]) for name in names):
                near = nearest_pattern(pattern, names)
                raise UsageError(f"optimizer.groups: '{pattern}' matches no trainable parameter{near}")
            if not any(matches(name, [pattern]) for name in remaining):
                raise UsageError(
                    f"optimizer.groups: '{pattern}' comes too late: earlier groups have all that it matches"
                )
        remaining = [name for name in remaining if not matches(name, group.match)]


def _with_exceptions(options: Options, group: Group | None) -> Options:
    if group is None:
        return dict(options)
    lr = options["lr"] * (1.0 if group.lr_scale is None else group.lr_scale) if group.lr is None else group.lr
    decay = options["weight_decay"] if group.weight_decay is None else group.weight_decay
    spans = {"freeze": group.freeze or None, "train_for": group.train_for}
    return {**options, "lr": lr, "weight_decay": decay, **{name: str(span) for name, span in spans.items() if span}}


class Freezing:
    """Freezes and unfreezes the parameter groups that are trained in a part of the run only.

    What a step trains follows from its number, so a resumed run trains the same.

    Args:
        groups: of the optimizers; "freeze" and "train_for" are durations.
        steps_per_epoch: global batches of an epoch.
        total_steps: steps of the whole run.
    """

    def __init__(self, groups: list[dict[str, Any]], steps_per_epoch: int, total_steps: int) -> None:
        def span(group: dict[str, Any], name: str, default: int) -> int:
            return Duration(group[name]).steps(steps_per_epoch, total_steps) if name in group else default

        self._spans = [
            (group["params"], span(group, "freeze", 0), span(group, "train_for", total_steps))
            for group in groups
            if "freeze" in group or "train_for" in group
        ]
        spans = [(first, end) for _, first, end in self._spans]
        for step in (0, *(end for _, end in spans if end < total_steps)) if len(spans) == len(groups) else ():
            if not any(first <= step < end for first, end in spans):
                raise UsageError(f"optimizer.groups: nothing is trained in step {step + 1}: let some parameters go")

    def apply(self, step: int) -> None:
        """Let the parameters that a step, counted from 0, trains require gradients, and no others of these groups."""
        for parameters, first, end in self._spans:
            is_trained = first <= step < end
            for parameter in parameters:
                if parameter.requires_grad != is_trained:
                    parameter.requires_grad_(is_trained)

    def __bool__(self) -> bool:
        """Return whether there is such a group."""
        return bool(self._spans)


def set_learning_rate(group: dict[str, Any], rate: float) -> None:
    """Set a parameter group's learning rate, in place where it is a tensor that a CUDA graph reads."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def clear_gradients(optimizer: Optimizer) -> None:
    """Set all gradients to None as `zero_grad` does, without its profiler record, which costs about 10 us a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
