"""Predict with a trained run from Python: the run's folder suffices, and the model where a script built it."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from torchrelay import tasks
from torchrelay.checkpoint.format import Contents, read
from torchrelay.checkpoint.retention import find
from torchrelay.data.accept import as_source
from torchrelay.data.augment.pipeline import Augment, Pipeline
from torchrelay.data.batches import Batches
from torchrelay.data.folder import decode_images
from torchrelay.data.listing import images_below
from torchrelay.data.sources import ArraySource
from torchrelay.device.device import Device, DeviceSettings, set_up
from torchrelay.errors import RelayError, UsageError
from torchrelay.models.factory import build as build_model
from torchrelay.recipe import recipe as recipes
from torchrelay.recipe.build import build_task, image_size
from torchrelay.run.settings import Views
from torchrelay.tasks.task import Task
from torchrelay.train.assemble import dtype_of, stacked
from torchrelay.train.evaluation import Evaluator


class Trained:
    """A trained model with all that it needs to predict.

    Args:
        model: its weights become those of the checkpoint, the averaged ones if there are any.
        contents: the checkpoint.
        task: turns the model's outputs into predictions.
        device: where the model computes.
        prepare: what images go through first.
        batch_size: how many samples are predicted at once.
        views: over how many views of an image the outputs are averaged.

    Attributes:
        classes: the names of the classes; () if there are none.
        step: of the checkpoint.

    Raises:
        RelayError: the weights aren't the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        contents: Contents,
        task: Task,
        device: Device,
        *,
        prepare: Sequence[Augment] = (),
        batch_size: int = 256,
        views: Views = 1,
    ) -> None:
        data = contents.state["data"]
        try:
            model.load_state_dict(contents.model if contents.ema is None else contents.ema)
        except RuntimeError as error:
            reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise RelayError(f"the checkpoint's weights don't fit {type(model).__name__}: {reasons}") from None
        self.model, self.task, self.step = device.place(model).eval(), task, contents.step
        self.classes: tuple[str, ...] = tuple(data["classes"])
        self._shape: list[int] | None = data["shape"]
        self._device, self._batch_size, self._views = device, batch_size, views
        self._pipeline = Pipeline(prepare=tuple(prepare), mean=data["mean"], std=data["std"])

    def predict(self, data: Any) -> Any:
        """Return the task's predictions, such as (samples, classes) probabilities, in the order of the data.

        Args:
            data: inputs (samples, …), a list of arrays, a Dataset or what else `Trainer.predict` takes; or where the
                run was trained on images in memory, the path of an image, of a folder of them, or a list of paths.

        Raises:
            UsageError: it is none of these.
            RelayError: a file can't be read as an image.
        """
        paths = [data] if isinstance(data, str | Path) else data
        if isinstance(paths, list | tuple) and paths and all(isinstance(path, str | Path) for path in paths):
            data = self._decoded([Path(path) for path in paths])
        dtype = dtype_of(self.model)
        source = as_source(stacked(data), dtype)
        batches = Batches(source, self._batch_size, self._device, self._pipeline, train=False, dtype=dtype)
        return Evaluator(self.model, self.task, self._device, views=self._views).predict(batches)

    def _decoded(self, paths: list[Path]) -> torch.Tensor:
        if self._shape is None or len(self._shape) != 3:
            raise UsageError(
                "the run wasn't trained on images in memory, so files can't be read as it was: give arrays"
            )
        files = [file for path in paths for file in (images_below(path)[0] if path.is_dir() else [path])]
        if not files:
            raise UsageError(f"there are no images in {', '.join(map(str, paths))}")
        return decode_images(files, self._shape)


def load(
    run: str | Path,
    which: str = "best",
    *,
    model: nn.Module | None = None,
    task: Task | None = None,
    prepare: Sequence[Augment] | None = None,
    device: str = "auto",
    code: ModuleType | None = None,
) -> Trained:
    """Load a trained model from its run's folder.

    Args:
        run: the folder.
        which: the checkpoint: "best", "last" or a step's number.
        model: of a run that was started from Python: the same module, with any weights.
        task: of a run from Python with a task of one's own; only its `predict` counts.
        prepare: what images go through first, where a run from Python had `prepare=`; a recipe says it itself.
        device: where to compute.
        code: the module of the user's own that a recipe was trained with; see `recipe.load_code`.

    Raises:
        UsageError: there is no such run or checkpoint, or the model isn't known.
    """
    folder, file = Path(run), Path(run) / "recipe.toml"
    if not file.is_file():
        raise UsageError(f"{folder} isn't a run: it has no recipe.toml; give the folder of a run")
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    environment = table.get("environment", {})
    contents = read(find(folder / "checkpoints", which))
    if environment.get("started_from") == "python":
        if model is None:
            raise UsageError(f"{folder} was started from Python: give its model too, tr.load({str(run)!r}, model=...)")
        where = set_up(DeviceSettings(**(table["device"] | {"name": device})), exact=table["run"]["exact"])
        task = task or _task_named(environment.get("task", ""), folder)
        views, batch_size = table["run"]["test_views"], table["data"]["batch_size"]
        return Trained(model, contents, task, where, prepare=prepare or (), batch_size=batch_size, views=views)
    if "code" in environment and code is None:
        raise UsageError(
            f"{folder} was started with a file of code: give code=recipe.load_code({environment['code']!r})"
        )
    recipe = recipes.load(str(file))
    return Trained(
        model or _model(recipe, contents, code),
        contents,
        task or _task(recipe, contents, code),
        set_up(recipe.device.model_copy(update={"name": device}), recipe.run.exact),
        prepare=recipe.data.prepare if prepare is None else prepare,
        batch_size=recipe.data.batch_size,
        views=recipe.run.test_views,
    )


def _task_named(name: str, folder: Path) -> Task:
    """Return the task of a run from Python; its arguments don't change what it predicts."""
    if name in ("Criterion", "OfValues", "OfSamples"):  # losses of PyTorch's
        return Task()
    found = tasks.Classification if name == "OfClasses" else getattr(tasks, name, None)
    if found is None:
        raise UsageError(f"{folder} was trained by a task of your own, {name}: give tr.load(..., task={name}(...))")
    made: Task = found()
    return made


def _model(recipe: recipes.Recipe, contents: Contents, code: ModuleType | None) -> nn.Module:
    """Build a recipe's model for the data of a run.

    Raises:
        UsageError: the checkpoint doesn't say how many outputs it has.
    """
    data, settings = contents.state["data"], recipe.model.model_copy(update={"pretrained": False})
    shape = data["shape"]
    if not shape or not data["classes"]:
        raise UsageError("the run doesn't say which inputs and outputs its model has: give tr.load(..., model=...)")
    is_image = len(shape) == 3
    return build_model(
        settings,
        classes=len(data["classes"]),
        channels=shape[0] if is_image else shape[-1],
        image_size=image_size(shape[-1], recipe) if is_image else None,
        code=code,
        log=lambda _: None,
    )


def _task(recipe: recipes.Recipe, contents: Contents, code: ModuleType | None) -> Task:
    """Return a recipe's task without the weights of its classes, which predictions don't depend on."""
    nothing = ArraySource(torch.zeros(1, 1), torch.zeros(1, 0), tuple(contents.state["data"]["classes"]))
    return build_task(recipe.loss.model_copy(update={"class_weights": None}), nothing, code)
