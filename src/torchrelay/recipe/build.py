"""From a recipe to a trainer: the seven steps as a table of contents."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from torchrelay import data
from torchrelay.data.sources import ArraySource, Source
from torchrelay.device.device import set_up
from torchrelay.distributed.process import rank
from torchrelay.errors import UsageError, nearest
from torchrelay.models.factory import build as build_model
from torchrelay.recipe.code import environment
from torchrelay.recipe.recipe import Recipe
from torchrelay.run.terminal import Terminal
from torchrelay.tasks.classification import Classification, balanced_weights
from torchrelay.tasks.detection import Detection
from torchrelay.tasks.multilabel import MultiLabel
from torchrelay.tasks.next_token import NextToken
from torchrelay.tasks.regression import Regression
from torchrelay.tasks.segmentation import Segmentation
from torchrelay.tasks.task import LossSettings, Task
from torchrelay.train.callbacks import Callback
from torchrelay.train.trainer import Trainer


def build_trainer(
    recipe: Recipe,
    run: str | Path | None = None,
    *,
    code: ModuleType | None = None,
    terminal: Terminal | None = None,
    callbacks: Sequence[Callback] = (),
    fresh: bool = True,
) -> Trainer:
    """Build the trainer that a recipe describes.

    Args:
        recipe: all parameters.
        run: the run's folder; None: nothing is written.
        code: a module of the user's own, in which the recipe's names are looked up first.
        terminal: where lines and the progress bar go; standard output if not given.
        callbacks: more callbacks for the trainer.
        fresh: whether the run starts; a resumed one doesn't need the pretrained weights again.

    Raises:
        UsageError: the recipe names something that doesn't exist.
        RelayError: the data or the weights can't be loaded.
    """
    # 1. Prepare, 4. device: before the data, which it may decode
    terminal, notes = terminal or Terminal(), list[str]()

    def say(text: str) -> None:
        terminal.say(text)
        notes.append(text)

    device = set_up(recipe.device, recipe.run.exact, is_portable=recipe.run.portable)
    # 2. Data
    parts = load_data(recipe, code, fresh, say)

    # 3. Model
    model = initial_model(recipe, parts.train, code, fresh, say)

    # 5. Optimizer and schedule, 6. loss, 7. train and test
    return Trainer(
        model,
        parts.train,
        parts.test,
        validation=parts.validation,
        device=device,
        parallel=recipe.parallel,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        task=build_task(recipe.loss, parts.train, code),
        settings=recipe.run,
        run=run,
        batch_size=recipe.data.batch_size,
        augment=recipe.data.augment,
        prepare=recipe.data.prepare,
        normalize=recipe.data.normalize,
        sampling=recipe.data.sampling,
        drop_last=recipe.data.drop_last,
        workers=recipe.data.workers,
        ema=recipe.model.ema,
        checkpoint=recipe.checkpoint,
        callbacks=callbacks,
        terminal=terminal,
        record={**recipe.model_dump(mode="json", exclude_none=True), "environment": environment(code)},
        notes=notes,
    )


def build_task(settings: LossSettings, train: Source, code: ModuleType | None = None) -> Task:
    """Return the task that `loss.name` names.

    Raises:
        UsageError: there is no such task, or its class weights don't fit the data.
    """
    if (own := custom_task(settings.name, code)) is not None:
        return own
    weights = _class_weights(settings, train)
    tasks: dict[str, Callable[[], Task]] = {
        "cross_entropy": lambda: Classification(settings.label_smoothing, weights, len(train.classes) or None),
        "bce": lambda: MultiLabel(weights, len(train.classes) or None),
        "mse": Regression,
        "next_token": lambda: NextToken(settings.label_smoothing),
        "segmentation": lambda: Segmentation(len(train.classes) or None),
        "detection": Detection,
    }
    if settings.name not in tasks:
        raise UsageError(
            f"loss.name '{settings.name}' is unknown{nearest(settings.name, tasks) or '; known: ' + ', '.join(tasks)}"
        )
    return tasks[settings.name]()


def custom_task(name: str, code: ModuleType | None) -> Task | None:
    """Return the task of that name in the user's file, or None where the file has none."""
    own = getattr(code, name, None)
    if isinstance(own, Task):
        return own
    if not isinstance(own, type) or not issubclass(own, Task):
        return None
    if own.loss is Task.loss and own.compute is Task.compute:
        raise UsageError(f"loss.name '{name}': the task in --code has no method 'loss': write one")
    try:
        inspect.signature(own).bind()
    except TypeError as error:
        raise UsageError(
            f"loss.name '{name}': the task in --code must be constructible without arguments ({error})"
        ) from None
    return own()


def _class_weights(settings: LossSettings, train: Source) -> torch.Tensor | None:
    weights = settings.class_weights
    if weights is None:
        return None
    if weights == "balanced":
        if not isinstance(train, ArraySource) or train.targets.is_floating_point():
            raise UsageError("loss.class_weights 'balanced' needs one class per sample, in memory: list the weights")
        return balanced_weights(train.targets, len(train.classes))
    if len(weights) != len(train.classes):
        raise UsageError(
            f"loss.class_weights has {len(weights)} weights for {len(train.classes)} classes: give one for each class"
        )
    return torch.tensor(weights)


def load_data(recipe: Recipe, code: ModuleType | None, fresh: bool, say: Callable[[str], None]) -> data.Parts:
    """Return the data; say which of its settings have no effect, when the run starts."""
    if fresh and rank() == 0 and (unused := recipe.data.without_effect()):
        say(f"hint: {', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect on {recipe.data.name}")
    return data.load(recipe.data, recipe.run.seed, code=code, log=say)


def initial_model(
    recipe: Recipe, train: Source, code: ModuleType | None, fresh: bool, say: Callable[[str], None]
) -> nn.Module:
    """Return the model for the data; its initial weights follow from the seed."""
    classes, channels, size = _shape(train, recipe)
    torch.manual_seed(recipe.run.seed)
    settings = recipe.model if fresh else recipe.model.model_copy(update={"pretrained": False})
    return build_model(settings, classes=classes, channels=channels, image_size=size, code=code, log=say)


def _shape(source: Source, recipe: Recipe) -> tuple[int, int, int | None]:
    """Return the model's outputs, and the channels and the size of its input images; where unknown, 1 and None."""
    sample, target = (source.inputs[0], source.targets[0]) if isinstance(source, ArraySource) else source.dataset[0]
    outputs = len(source.classes) or torch.as_tensor(target).numel()
    if not isinstance(sample, torch.Tensor) or sample.ndim == 0:
        return outputs, 1, None
    if sample.ndim == 3:
        return outputs, sample.shape[0], image_size(sample.shape[-1], recipe)
    return outputs, sample.shape[-1], None


def image_size(size: int, recipe: Recipe) -> int:
    """Return the size of the images that the model sees, after the transforms that resize or crop them."""
    for transform in (*recipe.data.prepare, *recipe.data.augment):
        if transform.name in ("resize", "center_crop", "random_resized_crop"):
            size = transform.size
    return size
