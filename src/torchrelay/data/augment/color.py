"""Transforms that change colors, and the operations on colors that they and the policies use.

An operation maps float32 images in [0, 1], (batch, channels, height, width), to such images. A `factor`,
(batch, 1, 1, 1), interpolates: 0 gives the plain version (black, gray, …), 1 the image, 2 extrapolates as far again.
"""

from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from torchrelay.data.augment.draw import Draw
from torchrelay.data.augment.pixels import as_bytes, as_floats, exact_mean, like
from torchrelay.errors import UsageError
from torchrelay.settings import Settings

Strength = Annotated[float, Field(ge=0, le=1)]


class ColorJitter(Settings):
    """Change brightness, contrast, saturation and hue, in this order, each by a random amount."""

    name: Literal["color_jitter"] = "color_jitter"
    brightness: Strength = 0.4
    """The factor is drawn uniformly from 1 - brightness to 1 + brightness."""
    contrast: Strength = 0.4
    """Likewise; a factor of 0 gives the image's mean gray."""
    saturation: Strength = 0.4
    """Likewise; a factor of 0 gives gray."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The hue is shifted by up to this fraction of the color circle in either direction."""

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, height, width) images of the same type."""
        amounts = draw.uniform(4)[:, :, None, None, None] * 2 - 1  # (batch, 4, 1, 1, 1) in [-1, 1)
        changed = as_floats(images)
        steps = (
            (adjust_brightness, self.brightness),
            (adjust_contrast, self.contrast),
            (adjust_saturation, self.saturation),
        )
        for step, (adjust, strength) in enumerate(steps):
            if strength > 0:
                changed = adjust(changed, amounts[:, step] * strength + 1)
        if self.hue > 0:
            changed = adjust_hue(changed, amounts[:, 3] * self.hue)
        return like(changed, images)


class Normalize(Settings):
    """Shift and scale images by each channel's mean and standard deviation; the last step before the model."""

    name: Literal["normalize"] = "normalize"
    mean: tuple[float, ...]
    """Each channel's mean, of images in [0, 1]."""
    std: tuple[Annotated[float, Field(gt=0)], ...]
    """Each channel's standard deviation, of images in [0, 1]."""

    def __call__(self, images: Tensor, draw: Draw | None = None) -> Tensor:  # noqa: ARG002 - nothing is random
        """Return float32 images, (x - mean) / std.

        Bytes need no division by 255: (x - 255 mean) * (1 / (255 std)). Subtraction and product aren't fused: that
        would be no faster and would round the last elements of a tensor differently from the rest.
        """
        channels = images.shape[1]
        if {len(self.mean), len(self.std)} != {channels}:
            raise UsageError(
                f"images have {channels} channels, and mean and std have {len(self.mean)} and {len(self.std)} numbers: "
                "give one number per channel"
            )
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        mean, factor = _constants(self.mean, self.std, scale, images.device)
        return images.to(torch.float32, copy=True).sub_(mean).mul_(factor)


@lru_cache(maxsize=64)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what is subtracted and multiplied, (channels, 1, 1) each; cached, as copies to a device take time."""
    shift = torch.tensor([m * scale for m in mean], device=device)
    factor = torch.tensor([1 / (s * scale) for s in std], device=device)
    return shift.view(-1, 1, 1), factor.view(-1, 1, 1)


# ------------------------------------------------------------------------------------- operations with a factor


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Interpolate between black and the image."""
    return images.mul(factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Interpolate between the image's mean gray and the image."""
    return _blend(images, exact_mean(_gray(images)), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Interpolate between the grayscale image and the image."""
    return _blend(images, _gray(images), factor)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Interpolate between a smoothed image and the image: 3 x 3 pixels, the center weighs 5 of 13; borders stay."""
    height, width = images.shape[2:]
    if min(height, width) < 3:
        return images
    smooth = images[:, :, 1:-1, 1:-1] * 4  # the loop adds the fifth
    for row in range(3):
        for column in range(3):
            smooth += images[:, :, row : height - 2 + row, column : width - 2 + column]
    blurred = images.clone()
    blurred[:, :, 1:-1, 1:-1] = smooth / 13
    return _blend(images, blurred, factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue (of hue, saturation and value) on its circle; grayscale images are returned unchanged.

    Args:
        images: (batch, channels, height, width).
        shift: (batch, 1, 1, 1), fractions of the circle in [-0.5, 0.5].
    """
    if not _has_colors(images):
        return images
    red, green, blue = images.chunk(3, dim=1)
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - least
    divisor = torch.where(chroma == 0, 1.0, chroma)
    # The hue in sixths of the circle: red is 0, green 2, blue 4.
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sector = sector + shift * 6
    offsets = (5 - 2 * torch.arange(3, device=images.device)).view(3, 1, 1)
    angle = sector + offsets  # (batch, 3, height, width); each channel falls and rises along the circle
    angle = angle - (angle / 6).floor() * 6
    return (value - chroma * torch.minimum(angle, 4 - angle).clamp_(0, 1)).clamp_(0, 1)


def _blend(images: Tensor, plain: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).add_(plain * (1 - factor)).clamp_(0, 1)


def _has_colors(images: Tensor) -> bool:
    if images.shape[1] not in (1, 3):
        raise UsageError(
            f"images have {images.shape[1]} channels, and colors are changed in 1 or 3: leave the transform out"
        )
    return images.shape[1] == 3


def _gray(images: Tensor) -> Tensor:
    """Return the luma of ITU-R BT.601, (batch, 1, height, width)."""
    if not _has_colors(images):
        return images
    red, green, blue = images.chunk(3, dim=1)
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114)


# -------------------------------------------------------------------------------------- operations on levels


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper bits of each byte.

    Args:
        images: (batch, channels, height, width).
        bits: (batch, 1, 1, 1), the number of upper bits, from 0 to 8.
    """
    mask = 255 << (8 - bits.long()) & 255
    return as_floats(as_bytes(images) & mask.to(torch.uint8))


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values at or above a threshold, (batch, 1, 1, 1) in [0, 1]."""
    return torch.where(images >= threshold, 1 - images, images)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel's values to [0, 1]; a channel with a single value stays unchanged."""
    least, most = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    extent = most - least
    stretched = (images - least) / torch.where(extent == 0, 1.0, extent)
    return torch.where(extent == 0, images, stretched)


def equalize(images: Tensor) -> Tensor:
    """Equalize each channel's histogram; a channel with a single value stays unchanged.

    Pillow's rule: a byte becomes the number of darker pixels divided by 1/255 of all but the brightest ones, rounded.
    """
    levels = as_bytes(images).long().flatten(2).flatten(0, 1)  # (batch * channels, pixels)
    table = torch.arange(len(levels), device=images.device)[:, None] * 256
    counts = torch.bincount((levels + table).flatten(), minlength=256 * len(levels)).view(-1, 256)
    brightest = counts.gather(1, levels.amax(1, keepdim=True))
    step = (levels.shape[1] - brightest) // 255  # (batch * channels, 1)
    darker = counts.cumsum(1) - counts
    mapped = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)
    equalized = torch.where(step == 0, levels, mapped.gather(1, levels))
    return equalized.view(images.shape).to(torch.float32).div_(255)
