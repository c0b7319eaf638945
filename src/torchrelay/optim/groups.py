"""Step 5: parameter groups: which parameters have which learning rate and weight decay."""

import fnmatch
from typing import Any

from pydantic import Field
from torch import nn

from torchrelay.errors import UsageError
from torchrelay.settings import Settings

ParameterGroup = dict[str, Any]  # as torch.optim has it: "params" and the options that differ


class Group(Settings):
    """Parameters, chosen by their names, that are treated in a way of their own."""

    match: list[str]
    """Patterns of parameter names, such as ["layer4.*", "fc.*"]; the first group that matches counts."""
    lr: float | None = Field(default=None, ge=0.0)
    """Their learning rate."""
    weight_decay: float | None = Field(default=None, ge=0.0)
    """Their weight decay."""


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, groups: list[Group], decay_norms_and_biases: bool
) -> list[ParameterGroup]:
    """Return the trainable parameters in groups of one learning rate and weight decay.

    Parameters of equal options are one group, in the order of `model.parameters()`, so that without options of their own
    all are one group, as with a plain torch optimizer.

    Args:
        model: the model.
        lr: of parameters that no group names.
        weight_decay: likewise.
        groups: the exceptions.
        decay_norms_and_biases: whether parameters of less than two dimensions decay, too.

    Raises:
        UsageError: a pattern matches no parameter.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    unused = {pattern for group in groups for pattern in group.match}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        its_lr, its_decay = lr, weight_decay if decay_norms_and_biases or parameter.ndim > 1 else 0.0
        for group in groups:
            matching = {pattern for pattern in group.match if fnmatch.fnmatchcase(name, pattern)}
            unused -= matching
            if matching:
                its_lr = lr if group.lr is None else group.lr
                its_decay = its_decay if group.weight_decay is None else group.weight_decay
                break
        found.setdefault((its_lr, its_decay), []).append(parameter)
    if unused:
        names = ", ".join(name for name, _ in list(model.named_parameters())[:4])
        raise UsageError(f"optimizer.groups: '{min(unused)}' matches no trainable parameter; the names begin with {names}, …")
    if not found:
        raise UsageError("no parameter of the model is trainable: model.freeze leaves nothing to the optimizer")
    return [
        {"params": parameters, "lr": its_lr, "initial_lr": its_lr, "weight_decay": its_decay}
        for (its_lr, its_decay), parameters in found.items()
    ]
