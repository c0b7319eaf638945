"""Small gray copies of images, on which images are compared."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from torchrelay.report.check.findings import Pool

Thumbnails = npt.NDArray[np.uint8]  # (images, height, width)
SIDE = 32  # pixels at most
_BLOCK = 2**23  # values that are converted at once


def thumbnails(pool: Pool) -> Thumbnails:
    """Return a gray copy of each image, of 32 by 32 pixels at most."""
    return np.concatenate([block.mean(1).round().byte().numpy() for block in small(pool)])


def small(pool: Pool) -> list[Tensor]:
    """Return float32 copies (images, channels, height, width) of limited size, from 0 to 255, in blocks."""
    return [resized(block) for source in pool.parts.values() for block in _blocks(source.inputs)]


def resized(images: Tensor) -> Tensor:
    """Return images of bytes, or of floats in any range, as float32 from 0 to 255, of 32 by 32 pixels at most."""
    values = images.float()
    if images.dtype != torch.uint8:
        # A range for each block would tell equal images apart; the usual ranges are [0, 1], and some deviations.
        values = values * 255 if values.min() >= 0 and values.max() <= 1 else (values.clamp(-3, 3) + 3) * 42.5
    height, width = (min(SIDE, side) for side in images.shape[2:])
    if (height, width) == images.shape[2:]:
        return values
    return interpolate(values, (height, width), mode="bilinear", antialias=True).clamp(0, 255)


def _blocks(images: Tensor) -> tuple[Tensor, ...]:
    return torch.split(images, max(_BLOCK // max(images[0].numel(), 1), 1))
