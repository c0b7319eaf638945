"""Predict with a trained run: the recipe and a checkpoint suffice, the training data isn't needed."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from torchrelay.checkpoint.format import Contents, read
from torchrelay.checkpoint.retention import find
from torchrelay.data.augment.pipeline import Pipeline
from torchrelay.data.batches import Batches
from torchrelay.data.folder import decode_images, decoder
from torchrelay.data.listing import Listing, nested_folder
from torchrelay.data.listing import find as find_images
from torchrelay.data.sources import ArraySource
from torchrelay.device.device import set_up
from torchrelay.errors import RelayError, UsageError
from torchrelay.models.factory import build as build_model
from torchrelay.recipe.build import custom_task, image_size
from torchrelay.recipe.recipe import Recipe
from torchrelay.tasks.classification import Classification
from torchrelay.train.evaluation import Evaluation, Evaluator


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
        self.recipe = recipe
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

    def images(self, paths: Sequence[Path]) -> Iterator[torch.Tensor | RelayError]:
        """Yield each image file's probabilities (classes,), decoded as the training data was, or why it can't be read.

        Files are decoded and go through the network a batch at a time.
        """
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), self.batch_size):
                decoded = list(pool.map(self._decoded, paths[start : start + self.batch_size]))
                readable = [image for image in decoded if isinstance(image, torch.Tensor)]
                rows = iter(self._probabilities(torch.cat(readable)) if readable else ())
                for image in decoded:
                    yield next(rows) if isinstance(image, torch.Tensor) else image

    def _decoded(self, path: Path) -> torch.Tensor | RelayError:
        try:
            return decode_images([path], self.shape)
        except RelayError as error:
            return error

    def _probabilities(self, inputs: torch.Tensor) -> torch.Tensor:
        source = ArraySource(inputs, torch.zeros(len(inputs), dtype=torch.int64), name="images")
        evaluator = Evaluator(self.model, Classification(), self.device, views=self.test_views)
        probabilities: torch.Tensor = evaluator.predict(self._batches(source))
        return probabilities

    def _batches(self, source: ArraySource) -> Batches:
        return Batches(source, self.batch_size, self.device, self.pipeline, train=False)

    def evaluate(self, root: Path, log: Callable[[str], None] = print) -> dict[str, Evaluation]:
        """Evaluate on a folder of images with a folder for each class, in parts or not; classes are matched by name.

        Args:
            root: the folder.
            log: called with the lines about what was found, decoded and left out.

        Returns:
            The evaluation of each part, "train", "validation" and "test", or of "all".

        Raises:
            RelayError: the folder has none of the run's classes, or an image can't be read.
        """
        found, data = find_images(root), self.recipe.data
        for line in found.report():
            log(line)
        size, channels = (self.shape[1], self.shape[2]), self.shape[0]
        decode = decoder(size, channels, data.cache, data.cache_dir, data.on_error, data.max_errors, log)
        parts = {name: self._batches(decode(self._known(part, log))) for name, part in found.parts.items()}
        loss = self.recipe.loss
        weights = torch.tensor(loss.class_weights) if isinstance(loss.class_weights, list) else None
        task = Classification(loss.label_smoothing, weights, len(self.classes))
        evaluator = Evaluator(self.model, task, self.device, parts, views=self.test_views)
        return {name: evaluation for name in parts if (evaluation := evaluator.evaluate(name)) is not None}

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
            f"{folder} predicts no classes, since its loss.name is '{recipe.loss.name}': use Trainer.predict()"
        )
    contents = read(find(folder / "checkpoints", which))
    return Predictor(recipe, contents, code)
