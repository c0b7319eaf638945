"""Transforms that move or cover pixels: flips, crops, resizing, cutout and affine maps."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from torchrelay.data.augment.draw import Draw
from torchrelay.data.augment.pixels import exact_mean
from torchrelay.errors import UsageError
from torchrelay.settings import Settings

Probability = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(ge=1)]
Interpolation = Literal["nearest", "bilinear", "bicubic"]


class Flip(Settings):
    """Mirror an image horizontally."""

    name: Literal["flip"] = "flip"
    p: Probability = 0.5
    """The probability that an image is mirrored."""

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, height, width) images, some mirrored."""
        return _mirror(images, draw.uniform()[:, 0] < self.p)


class AlternatingFlip(Settings):
    """Mirror each image in every other epoch, half of the images in the first one.

    So two consecutive epochs always show both versions (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
    arXiv 2404.00498).
    """

    name: Literal["alternating_flip"] = "alternating_flip"

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, height, width) images, some mirrored."""
        first = draw.by_sample()[:, 0] < 0.5
        return _mirror(images, first if draw.epoch % 2 == 0 else ~first)


def _mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images. Copying whole images from both versions is several times as fast as `where`."""
    both = torch.cat((images, images.flip(-1)))
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * chosen)


class PaddedCrop(Settings):
    """Pad an image on all sides and crop it to its size at a random position."""

    name: Literal["crop"] = "crop"
    padding: Annotated[int, Field(ge=0)] = 4
    """Pixels added on each side."""
    mode: Literal["reflect", "edge", "zeros"] = "reflect"
    """The content of the padding: the mirrored image, its outermost pixels, or black."""

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, height, width) images, shifted."""
        batch, channels, height, width = images.shape
        if self.mode == "reflect" and self.padding >= min(height, width):
            raise UsageError(
                f"transform 'crop' can't reflect {self.padding} pixels of an image of {width}x{height}: "
                f"choose a padding below {min(height, width)}, or the mode 'edge' or 'zeros'"
            )
        shift = (draw.uniform(2) * (2 * self.padding + 1)).long()  # (batch, 2): rows, columns
        padded = _pad(images, self.padding, self.mode)
        tall, wide = padded.shape[2:]
        # A row of the result is `width` consecutive pixels of the padded images, so one copy of rows is enough. That
        # is faster than indexing by (row, column), which copies pixel by pixel.
        first = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * (tall * wide)
        down = (shift[:, :1] + torch.arange(height, device=images.device)) * wide + shift[:, 1:]  # (batch, height)
        rows = padded.flatten().unfold(0, width, 1).index_select(0, (first + down[:, None]).flatten())
        return rows.view(batch, channels, height, width)


def _pad(images: Tensor, padding: int, mode: str) -> Tensor:
    """Pad images on all four sides; PyTorch's reflection padding doesn't accept bytes on every device."""
    if mode == "zeros" or padding == 0:
        return F.pad(images, (padding,) * 4)
    for dim in (3, 2):
        size = images.shape[dim]
        pixel = torch.arange(-padding, size + padding, device=images.device)
        source = pixel.clamp(0, size - 1) if mode == "edge" else size - 1 - (size - 1 - pixel.abs()).abs()
        before, after = images.index_select(dim, source[:padding]), images.index_select(dim, source[padding + size :])
        images = torch.cat((before, images, after), dim)
    return images


class Resize(Settings):
    """Resize images to size x size, antialiased, whatever their aspect ratio."""

    name: Literal["resize"] = "resize"
    size: Size
    """Height and width in pixels."""
    interpolation: Interpolation = "bilinear"
    """nearest, bilinear or bicubic; the last two are antialiased."""

    def __call__(self, images: Tensor, draw: Draw | None = None) -> Tensor:  # noqa: ARG002 - nothing is random
        """Return (batch, channels, size, size) images."""
        return _resize(images, self.size, self.interpolation)


class ProgressiveResize(Settings):
    """Resize images to a size that grows with the epochs: small images train faster and are good enough early on.

    After Howard in fast.ai's entry to DAWNBench (fast.ai/2018/04/30/dawnbench-fastai). The last epochs should use the
    size of the test images or more.
    """

    name: Literal["progressive_resize"] = "progressive_resize"
    sizes: tuple[Size, ...] = Field(min_length=1)
    """Height and width in pixels in the first epoch, the second and so on; later epochs use the last size."""
    interpolation: Interpolation = "bilinear"
    """nearest, bilinear or bicubic; the last two are antialiased."""

    def size(self, epoch: int) -> int:
        """Return the height and width in an epoch, counted from 0."""
        return self.sizes[min(epoch, len(self.sizes) - 1)]

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, size, size) images."""
        return _resize(images, self.size(draw.epoch), self.interpolation)


class CenterCrop(Settings):
    """Crop images to size x size pixels at the center."""

    name: Literal["center_crop"] = "center_crop"
    size: Size
    """Height and width in pixels."""

    def __call__(self, images: Tensor, draw: Draw | None = None) -> Tensor:  # noqa: ARG002 - nothing is random
        """Return (batch, channels, size, size) images."""
        height, width = images.shape[2:]
        if self.size > min(height, width):
            raise UsageError(
                f"transform 'center_crop' can't cut {self.size} pixels out of an image of {width}x{height}: "
                f"choose a size up to {min(height, width)}, or resize before it"
            )
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return images[:, :, top : top + self.size, left : left + self.size]


class RandomResizedCrop(Settings):
    """Crop a random part of an image and resize it to size x size, antialiased.

    As Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015), with one change: a part larger than the image is
    clipped to it, where torchvision draws again.
    """

    name: Literal["random_resized_crop"] = "random_resized_crop"
    size: Size
    """Height and width in pixels."""
    scale: tuple[Probability, Probability] = (0.08, 1.0)
    """The part's smallest and largest share of the image's area."""
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (3 / 4, 4 / 3)
    """The part's smallest and largest width divided by height; its logarithm is drawn uniformly."""
    interpolation: Interpolation = "bilinear"
    """nearest, bilinear or bicubic; the last two are antialiased."""

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, size, size) images.

        Images are resized one by one: PyTorch's antialiased resizing of bytes is faster than any batched matrix product
        that gives an image the same bits in every batch.
        """
        height, width = images.shape[2:]
        out = images.new_empty((*images.shape[:2], self.size, self.size))
        for i, numbers in enumerate(draw.uniform(4, cpu=True).tolist()):
            top, left, tall, wide = self.box(numbers, height, width)
            part = images[i : i + 1, :, top : top + tall, left : left + wide]
            out[i] = _resize(part, self.size, self.interpolation)[0]
        return out

    def box(self, numbers: list[float], height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of the part that four numbers in [0, 1) determine."""
        area, shape, down, right = numbers
        pixels = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = math.exp(low + (high - low) * shape)
        tall = min(max(round(math.sqrt(pixels / ratio)), 1), height)
        wide = min(max(round(math.sqrt(pixels * ratio)), 1), width)
        return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide


def _resize(images: Tensor, size: int, interpolation: str) -> Tensor:
    if images.shape[2:] == (size, size):
        return images
    if interpolation == "nearest":
        return F.interpolate(images, (size, size), mode="nearest-exact")
    if images.dtype == torch.uint8 and images.device.type == "cpu":
        return F.interpolate(images, (size, size), mode=interpolation, antialias=True)
    resized = F.interpolate(images.to(torch.float32), (size, size), mode=interpolation, antialias=True)
    if images.dtype == torch.uint8:  # only the CPU resizes bytes
        return resized.round_().clamp_(0, 255).to(torch.uint8)
    return resized.clamp_(0, 1).to(images.dtype)  # bicubic overshoots


class Cutout(Settings):
    """Cover a square with the image's mean color.

    As DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (arXiv 1708.04552):
    the square's center is anywhere in the image, so the square may extend beyond it. They fill with the dataset's mean.
    """

    name: Literal["cutout"] = "cutout"
    size: Size = 8
    """Height and width in pixels."""
    p: Probability = 1.0
    """The probability that a square of an image is covered."""

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, height, width) images, some with a covered square."""
        numbers = draw.uniform(3)
        chosen = numbers[:, 2] < self.p
        height, width = images.shape[2:]
        rows = self._covered(numbers[:, 0], height) & chosen[:, None]  # (batch, height)
        hole = rows[:, None, :, None] & self._covered(numbers[:, 1], width)[:, None, None]
        mean = exact_mean(images)
        fill = mean.round().to(torch.uint8) if images.dtype == torch.uint8 else mean.to(images.dtype)
        return torch.where(hole, fill, images)

    def _covered(self, number: Tensor, length: int) -> Tensor:
        """Return whether the square covers each row or column, bool (batch, length)."""
        first = (number * length).long() - self.size // 2
        offset = torch.arange(length, device=number.device) - first[:, None]
        return (offset >= 0) & (offset < self.size)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Transform images by affine maps with nearest-neighbor sampling; black outside the image.

    Args:
        images: (batch, channels, height, width) uint8 or floats.
        maps: (batch, 6) float32 a, b, c, d, e, f: the output's pixel (x, y) is the input's (a x + b y + c,
            d x + e y + f). (0, 0) is the upper left corner of the image; a pixel's coordinates are those of its center.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = maps[:, :, None, None].unbind(1)  # each (batch, 1, 1)
    x = torch.arange(width, device=images.device, dtype=torch.float32) + 0.5
    y = torch.arange(height, device=images.device, dtype=torch.float32)[:, None] + 0.5
    from_x = (a * x + (b * y + c)) * (2 / width) - 1  # (batch, height, width); the image spans [-1, 1]
    from_y = (d * x + (e * y + f)) * (2 / height) - 1
    grid = torch.stack((from_x, from_y), dim=-1)
    moved = F.grid_sample(images.to(torch.float32), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.to(images.dtype)
