"""What is exported: a module from raw inputs to predictions, with the preprocessing and the temperature inside."""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrelay.data.augment.geometry import Resize
from torchrelay.recipe.trained import Trained
from torchrelay.tasks import Binary, Classification, MultiLabel, NextToken
from torchrelay.tasks.task import Task

Kind = Literal["classes", "labels", "tokens", "values"]
_KINDS: dict[Any, Kind] = {
    Classification.predict: "classes",
    MultiLabel.predict: "labels",
    Binary.predict: "labels",
    NextToken.predict: "tokens",
}


def kind_of(task: Task) -> Kind:
    """Return what a task's predictions are: probabilities of classes, labels or tokens, or other values."""
    return _KINDS.get(type(task).predict, "values")


def decided(predictions: Tensor, kind: Kind) -> Tensor | None:
    """Return what predictions decide: the most probable class, or the labels that are there; None for other values."""
    if kind == "labels":
        return predictions > 0.5
    if kind == "values":
        return None if predictions.is_floating_point() else predictions
    return predictions.argmax(1 if kind == "classes" else -1)


class Inference(nn.Module):
    """From raw inputs, such as bytes of pixels, to a task's predictions, with the model's outputs beside them.

    Args:
        trained: the run's model, its task, and what its inputs go through first.
        sample: the inputs of a sample, without a batch dimension; only their shape and type count.
        temperature: by which the model's outputs are divided before they become probabilities.

    Attributes:
        model: a copy of the run's, on the CPU.
        input_name: "images", "tokens" or "inputs".
        output_names: of what `forward` returns.
    """

    def __init__(self, trained: Trained, sample: Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = copy.deepcopy(trained.model).cpu().to(memory_format=torch.contiguous_format)
        self._task, self._temperature = trained.task, temperature
        self._prepare = tuple(trained.pipeline.prepare)
        self._is_image = sample.ndim == 3 and (sample.dtype == torch.uint8 or sample.is_floating_point())
        # The numbers of `Normalize`, which can't be traced: it would cache the tracer's tensors.
        scale = 255.0 if sample.dtype == torch.uint8 else 1.0
        mean, std = (trained.mean, trained.std) if self._is_image and trained.mean else ([0.0], [1.0])
        self.register_buffer("_mean", torch.tensor([m * scale for m in mean]).view(-1, 1, 1), persistent=False)
        self.register_buffer("_factor", torch.tensor([1 / (s * scale) for s in std]).view(-1, 1, 1), persistent=False)
        is_token = sample.ndim == 1 and not sample.is_floating_point()
        self.input_name = "images" if self._is_image else "tokens" if is_token else "inputs"
        self.output_names: tuple[str, ...] = ("probabilities", "logits")
        if kind_of(trained.task) == "values":
            self.output_names = (
                ("predictions",) if type(trained.task).predict is Task.predict else ("predictions", "outputs")
            )
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the predictions, and the model's outputs unless they are the predictions."""
        outputs: Tensor = self.model(self._prepared(inputs) if self._is_image else inputs)
        if len(self.output_names) == 1:
            return outputs
        predictions = self._task.predict(outputs if self._temperature == 1 else outputs.float() / self._temperature)
        return predictions, outputs

    def _prepared(self, images: Tensor) -> Tensor:
        """Return what `Pipeline.evaluate` returns."""
        transform: Any
        for transform in self._prepare:
            images = _resized(images, transform) if isinstance(transform, Resize) else transform(images)
        mean, factor = self.get_buffer("_mean"), self.get_buffer("_factor")
        return (images.to(torch.float32) - mean) * factor


def _resized(images: Tensor, transform: Resize) -> Tensor:
    """Resize in floats that are rounded to bytes, as a GPU does: ONNX has no resizing in integers."""
    size = (transform.size, transform.size)
    if tuple(images.shape[2:]) == size:
        return images
    floats = images.to(torch.float32)
    if transform.interpolation == "nearest":
        return F.interpolate(floats, size, mode="nearest-exact").to(images.dtype)
    resized = F.interpolate(floats, size, mode=transform.interpolation, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else resized.clamp(0, 1)
