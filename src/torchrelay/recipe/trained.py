"""Predict with a trained run: its folder suffices, and the model where a script built it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torchrelay import tasks
from torchrelay.checkpoint.format import Contents, read
from torchrelay.checkpoint.retention import find
from torchrelay.data.accept import as_source, stacked
from torchrelay.data.augment.pipeline import Augment, Pipeline
from torchrelay.data.batches import Batches
from torchrelay.data.folder import decode_images, decoder
from torchrelay.data.listing import Listing, images_below, nested_folder
from torchrelay.data.listing import find as find_images
from torchrelay.data.settings import DataSettings
from torchrelay.data.sources import ArraySource, Source
from torchrelay.device.device import Device, DeviceSettings, set_up
from torchrelay.errors import RelayError, UsageError
from torchrelay.models.factory import build as build_model
from torchrelay.recipe import recipe as recipes
from torchrelay.recipe.build import build_task, image_size
from torchrelay.run.record import read_record
from torchrelay.run.settings import Views
from torchrelay.tasks.task import Task
from torchrelay.train.assemble import dtype_of
from torchrelay.train.evaluation import Evaluation, Evaluator


class Trained:
    """A trained model with all that it needs to predict.

    Args:
        model: its weights become those of the checkpoint, the averaged ones if there are any.
        contents: the checkpoint.
        task: turns the model's outputs into predictions.
        device: where the model computes.
        data: the run's settings: how images are decoded, what they go through first, how many are predicted at once.
        views: over how many views of an image the outputs are averaged.
        prepare: what images go through first, in place of the settings'.

    Attributes:
        classes: the names of the classes; () if there are none.
        step: of the checkpoint.
        shape: of a sample's inputs, such as (channels, height, width); None if the data wasn't in memory.
        mean: by which images in [0, 1] are normalized, per channel; None if they aren't.
        std: by which they are divided then.
        pipeline: what inputs go through before the model.

    Raises:
        RelayError: the weights aren't the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        contents: Contents,
        task: Task,
        device: Device,
        data: DataSettings,
        views: Views = 1,
        prepare: Sequence[Augment] | None = None,
    ) -> None:
        trained_on = contents.state["data"]
        try:
            model.load_state_dict(contents.model if contents.ema is None else contents.ema)
        except RuntimeError as error:
            reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise RelayError(f"the checkpoint's weights don't fit {type(model).__name__}: {reasons}") from None
        self.model, self.task, self.step = device.place(model).eval(), task, contents.step
        self.classes: tuple[str, ...] = tuple(trained_on["classes"])
        self.shape: tuple[int, ...] | None = None if trained_on["shape"] is None else tuple(trained_on["shape"])
        self.mean, self.std = trained_on["mean"], trained_on["std"]
        self._device, self._data, self._views = device, data, views
        prepare = data.prepare if prepare is None else prepare
        self.pipeline = Pipeline(prepare=tuple(prepare), mean=self.mean, std=self.std)

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
            files = [file for path in map(Path, paths) for file in (images_below(path)[0] if path.is_dir() else [path])]
            if not files:
                raise UsageError(f"there are no images in {', '.join(map(str, paths))}")
            data = decode_images(files, self._image_shape())
        return self._predict(as_source(stacked(data), dtype_of(self.model)))

    def outputs(self, source: Source) -> Any:
        """Return the model's outputs for each sample, before the task turns them into predictions; of one view each."""
        return Evaluator(self.model, Task(), self._device).predict(self._batches(source))

    def predict_files(self, paths: Sequence[Path]) -> Iterator[Tensor | RelayError]:
        """Yield the prediction of each image file, decoded as the training images were, or why it can't be read.

        Files are decoded and go through the model a batch at a time.

        Raises:
            UsageError: the run wasn't trained on images in memory.
        """
        shape = self._image_shape()

        def decoded(path: Path) -> Tensor | RelayError:
            try:
                return decode_images([path], shape)
            except RelayError as error:
                return error

        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), self._data.batch_size):
                images = list(pool.map(decoded, paths[start : start + self._data.batch_size]))
                readable = [image for image in images if isinstance(image, Tensor)]
                rows = iter(self._predict(as_source(torch.cat(readable))) if readable else ())
                for image in images:
                    yield next(rows) if isinstance(image, Tensor) else image

    def evaluate(self, root: Path, log: Callable[[str], None] = print) -> dict[str, Evaluation]:
        """Evaluate on a folder of images with a folder for each class, in parts or not; classes are matched by name.

        Args:
            root: the folder.
            log: called with the lines about what was found, decoded and left out.

        Returns:
            The evaluation of each part, "train", "validation" and "test", or of "all".

        Raises:
            UsageError: the run wasn't trained on images in memory, or not with classes.
            RelayError: the folder has none of the run's classes, or an image can't be read.
        """
        if not self.classes:
            raise UsageError("the run was trained without classes, by whose names a folder's images have labels")
        (channels, *size), found, data = self._image_shape(), find_images(root), self._data
        for line in found.report():
            log(line)
        decode = decoder((size[0], size[1]), channels, data.cache, data.cache_dir, data.on_error, data.max_errors, log)
        parts = {name: self._batches(decode(self._known(part, log))) for name, part in found.parts.items()}
        evaluator = Evaluator(self.model, self.task, self._device, parts, views=self._views)
        return {name: evaluation for name in parts if (evaluation := evaluator.evaluate(name)) is not None}

    def _predict(self, source: Source) -> Any:
        return Evaluator(self.model, self.task, self._device, views=self._views).predict(self._batches(source))

    def _batches(self, source: Source) -> Batches:
        dtype = dtype_of(self.model)
        return Batches(source, self._data.batch_size, self._device, self.pipeline, train=False, dtype=dtype)

    def _image_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width)."""
        if self.shape is None or len(self.shape) != 3:
            raise UsageError(
                "the run wasn't trained on images in memory, so files can't be read as it was: give arrays from Python"
            )
        return self.shape

    def _known(self, listing: Listing, log: Callable[[str], None]) -> Listing:
        """Return the images of the classes that the run knows, with its labels; say which classes differ."""
        known, there = set(self.classes), set(listing.classes)
        if not known & there:
            nested = nested_folder(listing.folder)
            raise RelayError(
                f"{listing.folder} has none of the run's classes, {', '.join(self.classes)}, but "
                f"{', '.join(listing.classes)}" + (f": did you mean {nested}?" if nested else ": name them alike")
            )
        if there - known:
            log(f"left out of {listing.folder}, as the run has no such class: {', '.join(sorted(there - known))}")
        if known - there:
            log(f"classes without images in {listing.folder}: {', '.join(sorted(known - there))}")
        return listing.of(self.classes)


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
    table = read_record(folder)
    environment = table.get("environment", {})
    contents = read(find(folder / "checkpoints", which))
    if environment.get("started_from") == "python":
        if model is None:
            raise UsageError(f"{folder} was started from Python: give its model too, tr.load({str(run)!r}, model=...)")
        settings = DeviceSettings(**(table["device"] | {"name": device}))
        where = set_up(settings, table["run"]["exact"], is_portable=table["run"].get("portable"))
        task = task or _task_named(environment.get("task", ""), folder)
        data = DataSettings(batch_size=table["data"]["batch_size"])
        return Trained(model, contents, task, where, data, table["run"]["test_views"], prepare)
    if "code" in environment and code is None:
        raise UsageError(
            f"{folder} was started with a file of code: give code=recipe.load_code({environment['code']!r})"
        )
    recipe = recipes.load(str(file), [f"device.name={device}"])
    return trained(recipe, contents, code, model=model, task=task, prepare=prepare)


def trained(
    recipe: recipes.Recipe,
    contents: Contents,
    code: ModuleType | None = None,
    *,
    model: nn.Module | None = None,
    task: Task | None = None,
    prepare: Sequence[Augment] | None = None,
) -> Trained:
    """Return the trained model of a recipe's run.

    Args:
        recipe: the run's.
        contents: a checkpoint.
        code: a module of the user's own, in which the recipe's names are looked up first.
        model: the recipe's if not given.
        task: the recipe's if not given.
        prepare: what images go through first; the recipe's if not given.
    """
    model = model or _model(recipe, contents, code)
    task = task or _task(recipe, contents, code)
    device = set_up(recipe.device, recipe.run.exact, is_portable=recipe.run.portable)
    return Trained(model, contents, task, device, recipe.data, recipe.run.test_views, prepare)


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
    """Return a recipe's task; without class weights where they follow from the training data."""
    nothing = ArraySource(torch.zeros(1, 1), torch.zeros(1, 0), tuple(contents.state["data"]["classes"]))
    loss = recipe.loss
    if loss.class_weights == "balanced":
        loss = loss.model_copy(update={"class_weights": None})
    return build_task(loss, nothing, code)
