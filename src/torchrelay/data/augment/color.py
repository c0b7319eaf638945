"""Transforms that change colours, and the operations that they and the policies are made of.

An operation takes float32 images in [0, 1], (batch, channels, height, width), and returns the like. A `factor`,
(batch, 1, 1, 1), blends: 0 gives the plain version (black, grey, …), 1 the image, 2 as much again.
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
    """The factor is drawn from 1 - brightness to 1 + brightness."""
    contrast: Strength = 0.4
    """Likewise; a factor of 0 gives the image's mean grey."""
    saturation: Strength = 0.4
    """Likewise; a factor of 0 gives grey."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The hue is turned by up to this part of the colour circle, either way."""

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, height, width) images of the same type."""
        amounts = draw.uniform(4)[:, :, None, None, None] * 2 - 1  # (batch, 4, 1, 1, 1) in [-1, 1)
        found = as_floats(images)
        steps = (
            (adjust_brightness, self.brightness),
            (adjust_contrast, self.contrast),
            (adjust_saturation, self.saturation),
        )
        for step, (adjust, strength) in enumerate(steps):
            if strength > 0:
                found = adjust(found, amounts[:, step] * strength + 1)
        if self.hue > 0:
            found = turn_hue(found, amounts[:, 3] * self.hue)
        return like(found, images)


class Normalize(Settings):
    """Shift and scale images by each channel's mean and standard deviation; the last step before the model."""

    name: Literal["normalize"] = "normalize"
    mean: tuple[float, ...]
    """Of each channel, of images in [0, 1]."""
    std: tuple[Annotated[float, Field(gt=0)], ...]
    """Of each channel, of images in [0, 1]."""

    def __call__(self, images: Tensor, draw: Draw | None = None) -> Tensor:  # noqa: ARG002 - it is the same for all
        """Return float32 images, (x - mean) / std.

        Bytes are shifted and scaled in one go, (x - 255 mean) * (1 / (255 std)). It stays a subtraction and a product:
        a fused multiply-add is no faster here and rounds a tensor's last elements otherwise than the rest.
        """
        channels = images.shape[1]
        if {len(self.mean), len(self.std)} != {channels}:
            raise UsageError(
                f"images have {channels} channels, and mean and std have {len(self.mean)} and {len(self.std)} numbers: "
                "give one each for every channel, or a single grey channel one"
            )
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        mean, factor = _constants(self.mean, self.std, scale, images.device)
        return images.to(torch.float32, copy=True).sub_(mean).mul_(factor)


@lru_cache(maxsize=64)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (channels, 1, 1) what is subtracted and multiplied by; kept, as copies to a device aren't free."""
    shift = torch.tensor([m * scale for m in mean], device=device)
    factor = torch.tensor([1 / (s * scale) for s in std], device=device)
    return shift.view(-1, 1, 1), factor.view(-1, 1, 1)


# ------------------------------------------------------------------------------------- operations with a factor


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return images.mul(factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean grey."""
    return _blend(images, exact_mean(_grey(images)), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image in grey."""
    return _blend(images, _grey(images), factor)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image smoothed over 3 x 3 pixels, the middle weighing 5 of 13; the border stays."""
    height, width = images.shape[2:]
    if min(height, width) < 3:
        return images
    smooth = images[:, :, 1:-1, 1:-1] * 4  # and once more below
    for row in range(3):
        for column in range(3):
            smooth += images[:, :, row : height - 2 + row, column : width - 2 + column]
    blurred = images.clone()
    blurred[:, :, 1:-1, 1:-1] = smooth / 13
    return _blend(images, blurred, factor)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn colours on the circle of hue, saturation and value; grey images have no hue.

    Args:
        images: (batch, channels, height, width).
        turn: (batch, 1, 1, 1) parts of the circle, in [-0.5, 0.5].
    """
    if not _is_coloured(images):
        return images
    red, green, blue = images.chunk(3, dim=1)
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - least
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(  # the hue in sixths of the circle: red is 0, green 2, blue 4
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sector = sector + turn * 6
    offsets = (5 - 2 * torch.arange(3, device=images.device)).view(3, 1, 1)
    place = sector + offsets  # (batch, 3, height, width); each channel falls and rises along the circle
    place = place - (place / 6).floor() * 6
    return (value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)).clamp_(0, 1)


def _blend(images: Tensor, plain: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).add_(plain * (1 - factor)).clamp_(0, 1)


def _is_coloured(images: Tensor) -> bool:
    if images.shape[1] not in (1, 3):
        raise UsageError(
            f"images have {images.shape[1]} channels, and colours are changed in 1 or 3: leave the transform out"
        )
    return images.shape[1] == 3


def _grey(images: Tensor) -> Tensor:
    """Return the luma of ITU-R BT.601, (batch, 1, height, width)."""
    if not _is_coloured(images):
        return images
    red, green, blue = images.chunk(3, dim=1)
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114)


# -------------------------------------------------------------------------------------- operations on levels


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper bits of each byte.

    Args:
        images: (batch, channels, height, width).
        bits: (batch, 1, 1, 1), how many, from 0 to 8.
    """
    mask = 255 << (8 - bits.long()) & 255
    return as_floats(as_bytes(images) & mask.to(torch.uint8))


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at or above a threshold, (batch, 1, 1, 1) in [0, 1]."""
    return torch.where(images >= threshold, 1 - images, images)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel so that it begins at 0 and ends at 1; a channel of one colour stays."""
    least, most = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    extent = most - least
    stretched = (images - least) / torch.where(extent == 0, 1.0, extent)
    return torch.where(extent == 0, images, stretched)


def equalize(images: Tensor) -> Tensor:
    """Map each channel's bytes so that all are about as frequent; a channel of one colour stays.

    It is Pillow's rule: a byte becomes the number of darker pixels by a 255th of all but the brightest, rounded.
    """
    levels = as_bytes(images).long().flatten(2).flatten(0, 1)  # (batch * channels, pixels)
    table = torch.arange(len(levels), device=images.device)[:, None] * 256
    counts = torch.bincount((levels + table).flatten(), minlength=256 * len(levels)).view(-1, 256)
    brightest = counts.gather(1, levels.amax(1, keepdim=True))
    step = (levels.shape[1] - brightest) // 255  # (batch * channels, 1)
    darker = counts.cumsum(1) - counts
    mapped = ((darker + step // 2) // step.clamp(min=1)).clamp_(max=255)
    found = torch.where(step == 0, levels, mapped.gather(1, levels))
    return found.view(images.shape).to(torch.float32).div_(255)
