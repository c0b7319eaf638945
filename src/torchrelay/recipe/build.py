"""From a recipe to a trainer: the seven steps as a table of contents."""

import hashlib
import importlib.util
import inspect
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchrelay import __version__, data
from torchrelay.checkpoint import format as checkpoint
from torchrelay.checkpoint.format import Contents
from torchrelay.data.augment.pipeline import Pipeline
from torchrelay.data.batches import Batches
from torchrelay.data.folder import decode_images
from torchrelay.data.sources import ArraySource, Source
from torchrelay.device.device import set_up
from torchrelay.errors import RelayError, UsageError, nearest
from torchrelay.models.factory import build as build_model
from torchrelay.recipe.recipe import Recipe
from torchrelay.run.terminal import Terminal
from torchrelay.tasks.classification import Classification, balanced_weights
from torchrelay.tasks.multilabel import MultiLabel
from torchrelay.tasks.next_token import NextToken
from torchrelay.tasks.regression import Regression
from torchrelay.tasks.task import LossSettings, Task
from torchrelay.train.callbacks import Callback, EarlyStopping
from torchrelay.train.evaluation import predict
from torchrelay.train.trainer import Trainer
from torchrelay.train.views import with_tta


def trainer(
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
        run: the run's folder; nothing is written without one.
        code: a module of the user's own, in which the recipe's names are looked up first.
        terminal: where people read along.
        callbacks: what else shall happen around a step.
        fresh: whether the run starts; one that goes on doesn't need the pretrained weights again.

    Raises:
        UsageError: the recipe names what isn't there.
        RelayError: the data or the weights can't be loaded.
    """
    # 1. Prepare
    terminal, notes = terminal or Terminal(), list[str]()

    def say(text: str) -> None:
        terminal.say(text)
        notes.append(text)

    if recipe.device.threads is not None:
        torch.set_num_threads(recipe.device.threads)

    # 2. Data
    parts = data.load(recipe.data, recipe.run.seed, code=code, log=say)

    # 3. Model: its initial weights follow from the seed
    classes, channels, size = _shape(parts.train, recipe)
    torch.manual_seed(recipe.run.seed)
    chosen = recipe.model if fresh else recipe.model.model_copy(update={"pretrained": False})
    model = build_model(chosen, classes=classes, channels=channels, image_size=size, code=code, log=say)

    # 4. Device, 5. optimizer and schedule, 6. loss, 7. train and test
    patience = recipe.run.patience
    built = Trainer(
        model,
        parts.train,
        parts.test,
        validation=parts.validation,
        device=recipe.device,
        parallel=recipe.parallel,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        task=task(recipe.loss, parts.train, code),
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
        callbacks=[*([EarlyStopping(patience)] if patience else []), *callbacks],
        terminal=terminal,
        record={**recipe.model_dump(mode="json", exclude_none=True), "environment": environment(code)},
    )
    built.notes = [*notes, *built.notes]
    return built


class Predictor:
    """A trained network with what it needs to judge new images; the training data isn't needed.

    Args:
        recipe: the run's.
        contents: one of its checkpoints.
        code: a module of the user's own, in which the recipe's names are looked up first.
    """

    def __init__(self, recipe: Recipe, contents: Contents, code: ModuleType | None = None) -> None:
        saw = contents.state["data"]
        if saw["shape"] is None or len(saw["shape"]) != 3 or not saw["classes"]:
            raise UsageError("this run was not trained on images held in memory: use Trainer.predict() from Python")
        self.classes: list[str] = saw["classes"]
        self.shape: list[int] = saw["shape"]  # (channels, height, width)
        self.batch_size = recipe.data.batch_size
        self.test_views = recipe.run.test_views
        self.device = set_up(recipe.device, recipe.run.exact)
        model = build_model(
            recipe.model.model_copy(update={"pretrained": False}),
            classes=len(self.classes),
            channels=self.shape[0],
            image_size=_image_size(self.shape[-1], recipe),
            code=code,
            log=Terminal(quiet=True).say,
        )
        try:
            model.load_state_dict(contents.model if contents.ema is None else contents.ema)
        except RuntimeError as error:
            raise RelayError(
                f"the weights of the checkpoint aren't those of model '{recipe.model.name}': "
                + "; ".join(line.strip() for line in str(error).splitlines()[1:])
            ) from None
        self.model = self.device.place(model)
        self.pipeline = Pipeline(prepare=tuple(recipe.data.prepare), mean=saw["mean"], std=saw["std"])

    def images(self, paths: Sequence[Path]) -> torch.Tensor:
        """Return (images, classes) probabilities for image files, read as the training data was."""
        inputs = decode_images(paths, self.shape)
        source = ArraySource(inputs, torch.zeros(len(inputs), dtype=torch.int64), name="images")
        batches = Batches(source, self.batch_size, self.device, self.pipeline, train=False)
        return predict(self.model, batches, Classification(), self.device, with_tta(self.model, self.test_views))


def predictor(recipe: Recipe, folder: Path, which: str = "best", *, code: ModuleType | None = None) -> Predictor:
    """Return the predictor of a run's checkpoint: "best", "last" or a step's number.

    Raises:
        UsageError: there is no such checkpoint, or the run's task has no classes.
    """
    if recipe.loss.name != "cross_entropy" and not isinstance(_own_task(recipe.loss.name, code), Classification):
        raise UsageError(
            f"predict shows classes, and {folder} has none (loss.name '{recipe.loss.name}'): use Trainer.predict()"
        )
    contents = checkpoint.read(checkpoint.find(folder / "checkpoints", which))
    return Predictor(recipe, contents, code)


def task(settings: LossSettings, train: Source, code: ModuleType | None = None) -> Task:
    """Return the task that the loss's name stands for."""
    if (own := _own_task(settings.name, code)) is not None:
        return own
    weights = _class_weights(settings, train)
    tasks: dict[str, Callable[[], Task]] = {
        "cross_entropy": lambda: Classification(settings.label_smoothing, weights, len(train.classes) or None),
        "bce": lambda: MultiLabel(weights, len(train.classes) or None),
        "mse": Regression,
        "next_token": lambda: NextToken(settings.label_smoothing),
    }
    if settings.name not in tasks:
        raise UsageError(
            f"loss.name '{settings.name}' is unknown{nearest(settings.name, tasks) or '; known: ' + ', '.join(tasks)}"
        )
    return tasks[settings.name]()


def _own_task(name: str, code: ModuleType | None) -> Task | None:
    """Return the task of that name in the user's file, if there is one."""
    own = getattr(code, name, None)
    if isinstance(own, Task):
        return own
    if not isinstance(own, type) or not issubclass(own, Task):
        return None
    if inspect.isabstract(own):
        raise UsageError(f"loss.name '{name}': this task in --code has no method 'loss': write one")
    try:
        inspect.signature(own).bind()
    except TypeError as error:
        raise UsageError(f"loss.name '{name}': the task in --code must need no arguments ({error})") from None
    return own()


def _class_weights(settings: LossSettings, train: Source) -> torch.Tensor | None:
    weights = settings.class_weights
    if weights is None:
        return None
    if weights == "balanced":
        if not isinstance(train, ArraySource) or train.targets.is_floating_point():
            raise UsageError("loss.class_weights 'balanced' needs one class a sample, held in memory: give the numbers")
        return balanced_weights(train.targets, len(train.classes))
    if len(weights) != len(train.classes):
        raise UsageError(
            f"loss.class_weights has {len(weights)} numbers for {len(train.classes)} classes: give one each"
        )
    return torch.tensor(weights)


def _shape(source: Source, recipe: Recipe) -> tuple[int, int, int | None]:
    """Return how many classes, channels and pixels a side the model will see; what can't be told is 1, 1 and None."""
    sample, target = (source.inputs[0], source.targets[0]) if isinstance(source, ArraySource) else source.dataset[0]
    outputs = len(source.classes) or torch.as_tensor(target).numel()
    if not isinstance(sample, torch.Tensor) or sample.ndim == 0:
        return outputs, 1, None
    if sample.ndim == 3:
        return outputs, sample.shape[0], _image_size(sample.shape[-1], recipe)
    return outputs, sample.shape[-1], None


def _image_size(size: int, recipe: Recipe) -> int:
    """Return the size of the images that the model sees, after what resizes or crops them."""
    for transform in (*recipe.data.prepare, *recipe.data.augment):
        if transform.name in ("resize", "center_crop", "random_resized_crop"):
            size = transform.size
    return size


def load_code(path: str | Path) -> ModuleType:
    """Run a Python file that the user named, and return it as a module.

    Raises:
        UsageError: there is no such file.
        RelayError: it fails; the text has its error.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--code {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"torchrelay_code_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--code {path}: give a Python file, such as my_net.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there, and so does pickle
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # the file may import what stands beside it, as if it were run as a script
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f" (line {lines[-1]})" if lines else ""
        raise RelayError(f"--code {path} fails: {type(error).__name__}: {error}{where}") from error
    return module


def environment(code: ModuleType | None = None) -> dict[str, Any]:
    """Return what ran, beside the parameters: versions, and the git commit of the folder that it was started in."""
    found = {"torchrelay": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if code is not None and code.__file__ is not None:
        found["code"] = code.__file__
        found["code_sha256"] = hashlib.sha256(Path(code.__file__).read_bytes()).hexdigest()
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return found  # no git here: then there is no commit to name
    return found | ({"git": git.stdout.strip()} if git.returncode == 0 else {})
