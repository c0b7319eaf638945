"""Predict with a trained run: the recipe and a checkpoint suffice, the training data isn't needed."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from torchrelay.checkpoint.format import Contents, read
from torchrelay.checkpoint.retention import find
from torchrelay.data.augment.pipeline import Pipeline
from torchrelay.data.batches import Batches
from torchrelay.data.folder import decode_images
from torchrelay.data.sources import ArraySource
from torchrelay.device.device import set_up
from torchrelay.errors import RelayError, UsageError
from torchrelay.models.factory import build as build_model
from torchrelay.recipe.build import custom_task, image_size
from torchrelay.recipe.recipe import Recipe
from torchrelay.tasks.classification import Classification
from torchrelay.train.evaluation import Evaluator


class Predictor:
    """A trained network with all that it needs to classify new image files.

    Args:
        recipe: the run's.
        contents: one of the run's checkpoints.
        code: a module of the user's own, in which the recipe's names are looked up first.

    Raises:
        UsageError: the run wasn't trained on images in memory.
        RelayError: the checkpoint's weights don't fit the recipe's model.
    """

    def __init__(self, recipe: Recipe, contents: Contents, code: ModuleType | None = None) -> None:
        data = contents.state["data"]
        if data["shape"] is None or len(data["shape"]) != 3 or not data["classes"]:
            raise UsageError("this run was not trained on images held in memory: use Trainer.predict() from Python")
        self.classes: list[str] = data["classes"]
        self.shape: list[int] = data["shape"]  # (channels, height, width)
        self.batch_size = recipe.data.batch_size
        self.test_views = recipe.run.test_views
        self.device = set_up(recipe.device, recipe.run.exact)
        model = build_model(
            recipe.model.model_copy(update={"pretrained": False}),
            classes=len(self.classes),
            channels=self.shape[0],
            image_size=image_size(self.shape[-1], recipe),
            code=code,
            log=lambda _: None,
        )
        try:
            model.load_state_dict(contents.model if contents.ema is None else contents.ema)
        except RuntimeError as error:
            raise RelayError(
                f"the weights of the checkpoint aren't those of model '{recipe.model.name}': "
                + "; ".join(line.strip() for line in str(error).splitlines()[1:])
            ) from None
        self.model = self.device.place(model)
        self.pipeline = Pipeline(prepare=tuple(recipe.data.prepare), mean=data["mean"], std=data["std"])

    def images(self, paths: Sequence[Path]) -> torch.Tensor:
        """Return the probabilities (images, classes) of image files, decoded as the training data was."""
        inputs = decode_images(paths, self.shape)
        source = ArraySource(inputs, torch.zeros(len(inputs), dtype=torch.int64), name="images")
        batches = Batches(source, self.batch_size, self.device, self.pipeline, train=False)
        evaluator = Evaluator(self.model, Classification(), self.device, views=self.test_views)
        return evaluator.predict(batches)


def load_predictor(recipe: Recipe, folder: Path, which: str = "best", *, code: ModuleType | None = None) -> Predictor:
    """Load the predictor of a run.

    Args:
        recipe: the run's.
        folder: the run's folder.
        which: the checkpoint: "best", "last" or a step's number.
        code: a module of the user's own, in which the recipe's names are looked up first.

    Raises:
        UsageError: there is no such checkpoint, or the run's task isn't classification.
    """
    if recipe.loss.name != "cross_entropy" and not isinstance(custom_task(recipe.loss.name, code), Classification):
        raise UsageError(
            f"predict shows classes, and {folder} has none (loss.name '{recipe.loss.name}'): use Trainer.predict()"
        )
    contents = read(find(folder / "checkpoints", which))
    return Predictor(recipe, contents, code)
