"""Pixels as bytes and as floats, and means that don't depend on the rest of the batch.

A transform of an image must give the same bits in a batch of one and of a thousand. Elementwise `+ - * /` and square
roots are rounded identically everywhere, so transforms use only these. They avoid powers, exponentials and trigonometry
(the last elements of a tensor take another code path), matrix products, fused multiply-adds, and floating-point sums,
whose order depends on the shape.
"""

import torch
from torch import Tensor

_FIXED_POINT = 2**24  # floats in [0, 1] are summed as integer multiples of 2**-24, the spacing of float32 below 1


def as_floats(images: Tensor) -> Tensor:
    """Return float32 in [0, 1] from uint8 or floats."""
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images.to(torch.float32)


def as_bytes(images: Tensor) -> Tensor:
    """Return uint8, rounded, from uint8 or floats in [0, 1]."""
    if images.dtype == torch.uint8:
        return images
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def like(images: Tensor, original: Tensor) -> Tensor:
    """Return float images in [0, 1] in the type of `original`."""
    return as_bytes(images) if original.dtype == torch.uint8 else images.to(original.dtype)


def exact_mean(images: Tensor) -> Tensor:
    """Return each channel's mean as float32 (batch, channels, 1, 1), on the scale of the images.

    Integers add up without rounding in any order, and unlike float64, every device has int64.
    """
    pixels = images.shape[-2] * images.shape[-1]
    if images.dtype == torch.uint8:
        return images.sum((-2, -1), keepdim=True, dtype=torch.int64).to(torch.float32).div_(pixels)
    total = images.mul(_FIXED_POINT).round_().to(torch.int64).sum((-2, -1), keepdim=True)
    return total.to(torch.float32).div_(pixels * _FIXED_POINT)
