"""Pixels as bytes and as numbers, and sums of them that don't depend on the company.

A transform of one image must give the same bits in a batch of one and of a thousand. Elementwise +, -, *, / and square
roots are rounded alike everywhere, so the transforms are made of them. What isn't: powers, exponentials and angles (the
last few elements of a tensor go through other code than the rest), products of matrices, fused multiply-adds, and
floating-point sums, whose order depends on the shape.
"""

import torch
from torch import Tensor

_FIXED_POINT = 2**24  # steps of a float32 in [0.5, 1]; numbers in [0, 1] are summed as whole multiples of its inverse


def as_floats(images: Tensor) -> Tensor:
    """Return float32 in [0, 1], of uint8 or of floats."""
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images.to(torch.float32)


def as_bytes(images: Tensor) -> Tensor:
    """Return uint8, rounded, of uint8 or of floats in [0, 1]."""
    if images.dtype == torch.uint8:
        return images
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def like(images: Tensor, original: Tensor) -> Tensor:
    """Return float images in [0, 1] as the type that `original` has."""
    return as_bytes(images) if original.dtype == torch.uint8 else images.to(original.dtype)


def exact_mean(images: Tensor) -> Tensor:
    """Return each channel's mean as float32 (batch, channels, 1, 1), on the images' scale.

    Whole numbers add up without rounding in any order, and int64 is known to every device, which float64 is not.
    """
    pixels = images.shape[-2] * images.shape[-1]
    if images.dtype == torch.uint8:
        return images.sum((-2, -1), keepdim=True, dtype=torch.int64).to(torch.float32).div_(pixels)
    total = images.mul(_FIXED_POINT).round_().to(torch.int64).sum((-2, -1), keepdim=True)
    return total.to(torch.float32).div_(pixels * _FIXED_POINT)
