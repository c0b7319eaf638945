"""Step 5: what a user may give as an optimizer and as a schedule, and what it becomes."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchrelay.errors import UsageError
from torchrelay.optim.optimizers import SGD, OptimizerBase, OptimizerSettings
from torchrelay.optim.schedules import Constant, Schedule, ScheduleBase, ScheduleSettings
from torchrelay.settings import Settings, explain

OptimizerFactory = Callable[[nn.Module], Optimizer]
OptimizerLike = OptimizerFactory | Optimizer | str | Mapping[str, Any]
"""Settings, a torch optimizer or its class, a name, a table, or a function from a model to an optimizer."""
ScheduleLike = ScheduleBase | type[ScheduleBase] | str | Mapping[str, Any] | Callable[[int], float]
"""Settings or their class, a name, a table, or a function from a step to a factor of the rate."""


class _Table(Settings):
    """What a name or a table may stand for."""

    optimizer: OptimizerSettings = SGD()
    schedule: ScheduleSettings = Constant()


_INSTEAD_OF = {
    "CosineAnnealingLR": 'tr.optim.Cosine(per="epoch")',
    "OneCycleLR": "tr.optim.OneCycle()",
    "StepLR": 'tr.optim.Step(every="10 epochs")',
    "MultiStepLR": 'tr.optim.MultiStep(milestones=["30 epochs"])',
    "LinearLR": "tr.optim.Linear()",
    "ConstantLR": "tr.optim.Constant()",
    "ReduceLROnPlateau": "tr.optim.Plateau()",
}


def as_optimizer(given: Any) -> OptimizerFactory:
    """Return the function from a model to its optimizer that a user means by an `OptimizerLike`, or SGD by None.

    Raises:
        UsageError: it is no optimizer.
    """
    if given is None:
        return SGD()
    if isinstance(given, str | Mapping):
        return _table("optimizer", given).optimizer
    if isinstance(given, Optimizer):
        return lambda _model: given
    made = given.func if isinstance(given, functools.partial) else given
    if isinstance(made, type) and issubclass(made, Optimizer):
        return lambda model: _made(given, model)
    if isinstance(made, type) and issubclass(made, OptimizerBase):
        given = given()
    if not callable(given):
        raise UsageError(
            f"optimizer is {_described(given)}: give tr.optim.SGD(lr=0.1), torch.optim.Adam(model.parameters()), or a "
            "function from a model to a torch optimizer"
        )
    factory: OptimizerFactory = given
    return factory


def _made(optimizer: Callable[..., Optimizer], model: nn.Module) -> Optimizer:
    try:
        return optimizer(model.parameters())
    except TypeError as error:
        raise UsageError(f"the optimizer's class can't be called with the parameters alone ({error})") from None


def make(given: OptimizerFactory, model: nn.Module) -> Optimizer:
    """Return a model's optimizer.

    Raises:
        UsageError: what was given makes no optimizer, or one of another model's parameters.
    """
    made = given(model)
    if not isinstance(made, Optimizer):
        raise UsageError(f"the optimizer's function returns {_described(made)}: return a torch optimizer")
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in made.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in own for parameter in held)
    if foreign:
        raise UsageError(
            f"{foreign} of {len(held)} parameters in the optimizer aren't the model's: give it the parameters of the "
            f"very model that is trained, or a function: optimizer=lambda model: torch.optim.{type(made).__name__}"
            "(model.parameters()), which parallel.kind 'fsdp' needs on several processes"
        )
    return made


class Factor:
    """A schedule by a function of the step, as LambdaLR has it.

    Args:
        function: from the step, counted from 0, to the factor of the learning rate.
    """

    def __init__(self, function: Callable[[int], float]) -> None:
        self._function = function

    def bind(self, steps_per_epoch: int, total_steps: int) -> Schedule:  # noqa: ARG002 - as of the settings
        """Return the schedule of a run."""
        return Schedule(lambda step, base_lr: base_lr * float(self._function(step)), 0, 1.0)


def as_schedule(given: Any) -> ScheduleBase | Factor:
    """Return the schedule that a user means by a `ScheduleLike`; a constant rate by None.

    Raises:
        UsageError: it is none; of a scheduler of PyTorch's, the text names the equivalent.
    """
    if given is None:
        return Constant()
    if isinstance(given, str | Mapping):
        return _table("schedule", given).schedule
    made = given.func if isinstance(given, functools.partial) else given
    kind = made if isinstance(made, type) else type(made)
    if issubclass(kind, LRScheduler):
        instead = _INSTEAD_OF.get(kind.__name__, "a function from the step to the factor of the rate")
        raise UsageError(
            f"schedule is torch's {kind.__name__}, which counts its own steps, so a run couldn't resume exactly: give "
            f"{instead}"
        )
    if issubclass(kind, ScheduleBase):
        settings: ScheduleBase = made if isinstance(made, ScheduleBase) else given()
        return settings
    if not callable(given) or isinstance(given, type):
        raise UsageError(
            f"schedule is {_described(given)}: give tr.optim.Cosine(), a name such as 'cosine', or a function from the "
            "step to the factor of the rate"
        )
    _check_function(given)
    return Factor(given)


def _check_function(function: Callable[[int], float]) -> None:
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        raise UsageError(
            "schedule is a function that doesn't take one step: write schedule=lambda step: 0.99**step"
        ) from None
    except ValueError:  # a built-in function without a signature
        return


def _table(what: str, given: str | Mapping[str, Any]) -> _Table:
    """Return the settings that a name or a table stands for."""
    try:
        return _Table.model_validate({what: {"name": given} if isinstance(given, str) else dict(given)})
    except ValidationError as error:
        raise UsageError(explain(error, _Table)) from None


def _described(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else f"{value!r:.40} ({type(value).__name__})"
