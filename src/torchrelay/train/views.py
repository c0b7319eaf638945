"""Step 7, the test: several views of an image, whose outputs' mean says more than one of them alone.

Mirror images and shifts after Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498); that only
unsure images need the shifts, after github.com/hiverge/cifar10-speedrun.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from torchrelay.errors import UsageError
from torchrelay.run.settings import Views

Forward = Callable[[Any], Any]  # from inputs to outputs
_SURE = 0.6  # of a class's probability by the mean of two views, from which the shifts rarely change the class


def check_tta(views: Views, classes: bool) -> None:
    """Refuse six views of a task that has no classes to be unsure of.

    Raises:
        UsageError: it is such a task.
    """
    if views == 6 and not classes:
        raise UsageError("run.test_views of 6 is for classifications, which can be unsure: take 2 or 1")


def with_tta(forward: Forward, views: Views) -> Forward:
    """Return a forward pass whose outputs are means over several views of each image.

    Args:
        forward: from images (batch, channels, height, width) to logits (batch, classes).
        views: 1: the images as they are; 2: and their mirror images; 6: where these two leave a classification unsure,
            both once more, shifted by a pixel up and left, and down and right; the shifted ones count half.

    Raises:
        UsageError: when it is called: the inputs are no images, or the model gives something else.
    """
    return {1: forward, 2: _two(forward), 6: _six(forward)}[views]


def _two(forward: Forward) -> Forward:
    def both(images: Any) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise UsageError("run.test_views mirrors images (batch, channels, height, width): leave it out for others")
        outputs = forward(images), forward(images.flip(-1))
        if not isinstance(outputs[0], Tensor):
            raise UsageError("run.test_views takes the mean of a model's outputs, which gives more than a tensor")
        mean: Tensor = (outputs[0] + outputs[1]) / 2
        return mean

    return both


def _six(forward: Forward) -> Forward:
    two = _two(forward)

    def six_or_two(images: Any) -> Tensor:
        first: Tensor = two(images)
        if first.ndim != 2:
            raise UsageError("run.test_views of 6 takes logits (batch, classes), and this model gives others: take 2")
        unsure = (first.float().softmax(1).amax(1) < _SURE).nonzero()[:, 0]
        # At least one goes through the model again: processes that share its weights must all do so equally often.
        chosen = unsure if len(unsure) else unsure.new_zeros(1)
        shifted = _shifted(images[chosen])
        second = (two(shifted[0]) + two(shifted[1])) / 2
        outputs: Tensor = first.index_copy(0, unsure, (first[unsure] + second[: len(unsure)]) / 2)
        return outputs

    return six_or_two


def _shifted(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images shifted by a pixel up and left, and down and right; the edges are mirrored."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    return padded[..., 2 : 2 + height, 2 : 2 + width], padded[..., :height, :width]
