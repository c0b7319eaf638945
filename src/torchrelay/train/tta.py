"""Step 7, the test: test-time augmentation, the mean of a model's outputs over several views of each image.

Mirror images and shifts after Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498); shifting
only the images that the model is unsure of after github.com/hiverge/cifar10-speedrun.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from torchrelay.errors import UsageError
from torchrelay.run.settings import Views

# From inputs to outputs.
Forward = Callable[[Any], Any]
# From this probability on, by the mean of two views, the shifts rarely change the predicted class.
_SURE = 0.6


def check_tta(views: Views, has_classes: bool) -> None:
    """Refuse six views for a task without classes to be unsure of.

    Raises:
        UsageError: it is such a task.
    """
    if views == 6 and not has_classes:
        raise UsageError("run.test_views=6 needs a classification, which can be unsure: use 2 or 1")


def with_tta(forward: Forward, views: Views) -> Forward:
    """Return a forward pass whose outputs are means over several views of each image.

    Args:
        forward: from images (batch, channels, height, width) to logits (batch, classes).
        views: 1: the images themselves; 2: they and their mirror images; 6: where these two leave a classification
            unsure, both again, shifted by a pixel up and left, and down and right; the shifted ones count half.

    Raises:
        UsageError: on a call, if the inputs are not images or the outputs are not a tensor.
    """
    return {1: forward, 2: _two(forward), 6: _six(forward)}[views]


def _two(forward: Forward) -> Forward:
    def both(images: Any) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise UsageError("run.test_views mirrors images (batch, channels, height, width): use 1 for other inputs")
        outputs = forward(images), forward(images.flip(-1))
        if not isinstance(outputs[0], Tensor):
            raise UsageError("run.test_views averages a model's outputs, and this model's are not a tensor: use 1")
        mean: Tensor = (outputs[0] + outputs[1]) / 2
        return mean

    return both


def _six(forward: Forward) -> Forward:
    two = _two(forward)

    def two_or_six(images: Any) -> Tensor:
        first: Tensor = two(images)
        if first.ndim != 2:
            raise UsageError("run.test_views=6 needs logits (batch, classes), and this model returns others: use 2")
        unsure = (first.float().softmax(1).amax(1) < _SURE).nonzero()[:, 0]
        # At least one image goes through the model again, since sharded models need equally many passes on all ranks.
        chosen = unsure if len(unsure) else unsure.new_zeros(1)
        shifted = _shifted(images[chosen])
        second = (two(shifted[0]) + two(shifted[1])) / 2
        outputs: Tensor = first.index_copy(0, unsure, (first[unsure] + second[: len(unsure)]) / 2)
        return outputs

    return two_or_six


def _shifted(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return images shifted by a pixel up and left, and down and right, with mirrored edges."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    return padded[..., 2 : 2 + height, 2 : 2 + width], padded[..., :height, :width]
