"""Step 6: what a user may give as a task, and what it becomes."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchrelay.data.batches import Batches
from torchrelay.errors import UsageError, nearest
from torchrelay.tasks.binary import Binary
from torchrelay.tasks.classification import Classification
from torchrelay.tasks.criterion import Criterion, OfClasses, OfSamples, OfValues
from torchrelay.tasks.multilabel import MultiLabel
from torchrelay.tasks.next_token import NextToken
from torchrelay.tasks.regression import Regression
from torchrelay.tasks.task import Task

TaskLike = Task | type[Task] | nn.Module | Callable[..., Tensor] | str
"""A task or its class, a name as in a recipe, or a loss of PyTorch's: a module or a function."""

_BY_NAME: dict[str, type[Task]] = {
    "cross_entropy": Classification,
    "bce": MultiLabel,
    "binary": Binary,
    "mse": Regression,
    "next_token": NextToken,
}
_MODULES: dict[str, type[nn.Module]] = {  # by the functions in torch.nn.functional that compute the same
    "cross_entropy": nn.CrossEntropyLoss,
    "nll_loss": nn.NLLLoss,
    "mse_loss": nn.MSELoss,
    "l1_loss": nn.L1Loss,
    "smooth_l1_loss": nn.SmoothL1Loss,
    "huber_loss": nn.HuberLoss,
    "binary_cross_entropy": nn.BCELoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
    "kl_div": nn.KLDivLoss,
    "poisson_nll_loss": nn.PoissonNLLLoss,
    "soft_margin_loss": nn.SoftMarginLoss,
    "hinge_embedding_loss": nn.HingeEmbeddingLoss,
    "multi_margin_loss": nn.MultiMarginLoss,
    "multilabel_margin_loss": nn.MultiLabelMarginLoss,
    "multilabel_soft_margin_loss": nn.MultiLabelSoftMarginLoss,
}
_KINDS: dict[type[nn.Module], type[Criterion]] = {
    **dict.fromkeys(_MODULES.values(), OfValues),
    **dict.fromkeys((nn.CrossEntropyLoss, nn.NLLLoss), OfClasses),
    **dict.fromkeys((nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss), OfSamples),
}
_OWN = (
    "write class Own(tr.Task): def loss(self, outputs, targets): return the sum over the samples, and give task=Own()"
)


def as_task(given: TaskLike | None, batches: Batches, note: Callable[[str], None] = lambda _: None) -> Task:
    """Return the task that a user means; classification if nothing is given.

    Args:
        given: a task or its class, a name, or a loss of PyTorch's.
        batches: of the training data, whose targets tell one class a sample from several.
        note: called with a line about what a loss of PyTorch's became.

    Raises:
        UsageError: it is none.
    """
    if given is None:
        return Classification()
    if isinstance(given, str):
        if given not in _BY_NAME:
            raise UsageError(f"task '{given}' is unknown{nearest(given, _BY_NAME) or ': use ' + ', '.join(_BY_NAME)}")
        return _BY_NAME[given]()
    if isinstance(given, type):
        given = _made(given)
    if isinstance(given, Task):
        return given
    loss = _module(given) or given
    if isinstance(loss, nn.Module):
        task = _of_module(loss, batches)
    elif callable(loss):
        task = _of_function(loss)
    else:
        raise UsageError(f"task is {given!r:.40}: give tr.Classification() or another task, or a loss of PyTorch's")
    name = task.name if isinstance(task, Criterion) else type(loss).__name__
    note(
        f"{name} is computed as {type(task).__name__}: its sums over parts of a global batch, divided such that the "
        "loss is its mean over the whole batch"
    )
    return task


def _module(given: Any) -> nn.Module | None:
    """Return the module that does what a function of torch.nn.functional does, with the arguments in a partial."""
    function, options = (given.func, given.keywords) if isinstance(given, functools.partial) else (given, {})
    made = _MODULES.get(getattr(function, "__name__", ""))
    if made is None or getattr(nn.functional, function.__name__) is not function:
        return None
    module: nn.Module = _made(functools.partial(made, **options))
    return module


def _made(given: Any) -> Any:
    """Return an object of a class, or of a partial of one."""
    try:
        return given()
    except TypeError as error:
        name = getattr(given, "func", given).__name__
        raise UsageError(f"task is the class {name}, which needs other arguments: give an object ({error})") from None


def _of_module(loss: nn.Module, batches: Batches) -> Task:
    """Return the task of a module; one of ours, with more metrics, where it computes the same."""
    kind, name = type(loss), type(loss).__name__
    per_sample = _check_reduction(name, getattr(loss, "reduction", None), kind is nn.KLDivLoss)
    _check_arguments(loss.forward, name)
    if any(parameter.requires_grad for parameter in loss.parameters()):
        raise UsageError(f"loss {name} has parameters, and only the model's are trained: make it a part of the model")
    if isinstance(loss, nn.MSELoss):
        return Regression()
    if isinstance(loss, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss):
        targets, all_targets = batches.dummy_batch().targets, batches.targets_in_memory()
        shape = targets.shape if isinstance(targets, Tensor) else ()
        if isinstance(loss, nn.BCEWithLogitsLoss) and len(shape) == 1 and loss.weight is None:
            return Binary(loss.pos_weight)
        if isinstance(loss, nn.BCEWithLogitsLoss) and len(shape) == 2 and loss.weight is None:
            return MultiLabel(loss.pos_weight, shape[1])
        is_class = isinstance(loss, nn.CrossEntropyLoss) and len(shape) == 1 and not targets.is_floating_point()
        if is_class and (all_targets is None or not all_targets.eq(torch.tensor(loss.ignore_index)).any()):
            return Classification(float(loss.label_smoothing), loss.weight)  # type: ignore[arg-type]
    summed = copy.deepcopy(loss)
    summed.reduction = "sum"  # type: ignore[assignment]
    return (OfSamples if per_sample else _KINDS.get(kind, Criterion))(name, summed, loss)


def _of_function(function: Callable[..., Any]) -> Task:
    """Return the task of a function with a parameter `reduction`."""
    plain = function.func if isinstance(function, functools.partial) else function
    name = getattr(plain, "__name__", type(plain).__name__)
    try:
        reduction = inspect.signature(function).parameters.get("reduction")
    except (TypeError, ValueError):
        reduction = None
    _check_reduction(name, getattr(reduction, "default", None), allows_batchmean=False)
    _check_arguments(function, name)
    return Criterion(name, functools.partial(function, reduction="sum"), functools.partial(function, reduction="mean"))


def _check_reduction(name: str, reduction: Any, allows_batchmean: bool) -> bool:
    """Refuse a loss whose sum can't be had, or that returns none; return whether it is a mean over samples.

    Raises:
        UsageError: the text says how to write a task.
    """
    if reduction in ("mean", "batchmean") and (reduction == "mean" or allows_batchmean):
        return bool(reduction == "batchmean")
    if reduction in ("sum", "none"):
        raise UsageError(
            f'loss {name} has reduction="{reduction}": leave it at "mean", as a loss is a mean over the global batch '
            f"here; or {_OWN}"
        )
    raise UsageError(f"loss {name} has no 'reduction', so a part of a batch has no sum of it: {_OWN}")


def _check_arguments(function: Callable[..., Any], name: str) -> None:
    """Refuse a loss that wants more than outputs and targets.

    Raises:
        UsageError: it does.
    """
    try:
        inspect.signature(function).bind(0, 1)
    except TypeError as error:
        raise UsageError(f"loss {name} isn't called with (outputs, targets) alone ({error}): {_OWN}") from None
