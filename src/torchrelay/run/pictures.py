"""Step 1: a batch of images as one uint8 grid, and a grid as a PNG file."""

import io
import math

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Picture = npt.NDArray[np.uint8]  # (height, width, 3)

_MOST_IMAGES = 64
_GRID_SIDE = 1024  # largest width in pixels; a wider grid would take seconds to write
_FRAME = 2  # white pixels around each image of a grid


def image_grid(images: Tensor) -> Picture:
    """Return images side by side, with small ones enlarged so that their pixels can be seen.

    Args:
        images: float (batch, channels, height, width) in [0, 1]; gray from the first channel unless there are three.

    Returns:
        The grid, uint8 of (height, width, 3).
    """
    count, channels, height, width = images.shape
    across = min(columns(images), count)
    scale = max(_GRID_SIDE // 8 // max(height, width), 1)
    high, wide = height * scale + 2 * _FRAME, width * scale + 2 * _FRAME  # of a framed image
    pixels = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels if channels == 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    grid = np.full((math.ceil(count / across) * high, across * wide, 3), 255, np.uint8)
    for index, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        top, left = index // across * high + _FRAME, index % across * wide + _FRAME
        enlarged = image.repeat(scale, 0).repeat(scale, 1)
        grid[top : top + height * scale, left : left + width * scale] = enlarged
    return grid


def png_file(picture: Picture) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def columns(images: Tensor) -> int:
    """Return how many images (…, height, width) fit side by side, at most eight."""
    return min(max(_GRID_SIDE // max(images.shape[-2:]), 1), math.isqrt(_MOST_IMAGES))
