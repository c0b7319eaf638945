"""Step 6: boxes and their classes, as torchvision's detection models learn them."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrelay.data.batch import Batch
from torchrelay.data.labels import TargetError
from torchrelay.tasks.task import Loss, Task

_FIGURES = ("map", "map_50", "map_75")
# What computes torchmetrics' mean average precision.
_BACKENDS = ("pycocotools", "faster_coco_eval")


class Detection(Task):
    """Boxes: the losses that the model itself computes, and mean average precision.

    The model is one of torchvision's detection models, or one that is called alike: in training mode, with a list of
    images and a list of dicts of "boxes", "labels" and what else it needs, it returns a dict of losses, means over the
    images; in evaluation mode, with the images alone, a list of dicts of "boxes", "scores" and "labels".

    Mean average precision needs the extra `detection`; without it, the losses alone are measured.
    """

    def __init__(self) -> None:
        self.has_map = importlib.util.find_spec("torchmetrics") is not None and any(
            importlib.util.find_spec(name) for name in _BACKENDS
        )
        self.headline = "map" if self.has_map else "loss"
        self.higher_is_better = self.percent = self.has_map

    @staticmethod
    def collate(samples: list[tuple[Tensor, Mapping[str, Tensor]]]) -> tuple[list[Any], list[Any]]:
        """Return samples (image, target), whose sizes may differ, as a list of images and a list of targets."""
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    def compute(self, model: Any, batch: Batch, update: str) -> Loss:  # noqa: ARG002 - as in `Task`
        """Return the model's losses, times the number of images, as each is a mean over them."""
        losses = model(batch.inputs, batch.targets)
        if not isinstance(losses, Mapping) or not losses:
            raise TargetError(
                f"in training mode a detection model returns a dict of losses, and {type(model).__name__} returned "
                f"{type(losses).__name__}: give one of torchvision's, or write a task for yours"
            )
        return {name: loss * batch.samples for name, loss in losses.items()}

    def evaluate_batch(self, model: Any, batch: Batch) -> tuple[Loss, Any]:
        """Return the losses and the predictions, each of a pass of its own; the model ends in evaluation mode."""
        found = model(batch.inputs)
        for part in model.modules():
            # A layer, such as BatchNorm or dropout, stays in evaluation mode; what consists of layers returns losses.
            part.training = any(True for _ in part.children())
        try:
            return self.compute(model, batch, self.updates[0]), found
        finally:
            model.eval()

    def metrics(self) -> Mapping[str, Any]:
        """Return mean average precision as COCO defines it, with that at IoUs of 0.5 and 0.75."""
        return {"map": MeanAveragePrecision()} if self.has_map else {}

    def per_sample(self, outputs: list[dict[str, Tensor]], targets: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the number of boxes of each image, and the mean of their IoUs with the best one of their class."""
        from torchvision.ops import box_iou

        best = []
        for found, true in zip(outputs, targets, strict=True):
            same = true["labels"][:, None] == found["labels"]
            overlaps = torch.where(same, box_iou(true["boxes"].float(), found["boxes"].float()), 0.0)
            best.append(F.pad(overlaps, (0, 1)).amax(1).mean())
        boxes = torch.tensor([len(true["labels"]) for true in targets])
        return {"mean_iou": torch.stack(best), "boxes": boxes}

    def predict_batch(self, model: Any, batch: Batch) -> list[dict[str, Tensor]]:
        """Return the boxes, scores and labels of each image."""
        found: list[dict[str, Tensor]] = model(batch.inputs)
        return found


class MeanAveragePrecision:
    """Mean average precision of boxes (Lin et al., "Microsoft COCO", 2014), by torchmetrics."""

    def __init__(self) -> None:
        from torchmetrics.detection import MeanAveragePrecision as Metric

        backend: Any = next(name for name in _BACKENDS if importlib.util.find_spec(name))
        self._metric: Any = Metric(backend=backend)
        self._metric.distributed_available_fn = lambda: False

    def to(self, device: torch.device) -> "MeanAveragePrecision":
        """Move the metric to a device."""
        self._metric.to(device)
        return self

    def update(self, predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        """Add a batch."""
        self._metric.update(predictions, targets)

    def compute(self) -> dict[str, Tensor]:
        """Return "map", "map_50" and "map_75"; 0 where there are no boxes at all."""
        found = self._metric.compute()
        return {name: found[name].clamp(min=0.0) for name in _FIGURES}
