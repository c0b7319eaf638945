"""Transforms that mix two images and their classes.

An image's partner is the next one of its own replica's part of the batch, so that a part needs no other; the order is
random anyway. Each image has a share of its own, and its partner's share for it is another.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from torchrelay.data.augment.draw import Draw
from torchrelay.data.augment.geometry import Probability
from torchrelay.data.augment.pixels import as_floats
from torchrelay.settings import Settings

Alpha = Annotated[float, Field(gt=0, le=64)]
_NODES = 4097  # of the distribution's table; the interpolated shares are right to some 1e-6


class Mixup(Settings):
    """Blend an image with another, and their classes likewise.

    As Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018), with a share for each image.
    """

    name: Literal["mixup"] = "mixup"
    alpha: Alpha = 0.2
    """The image's share is from Beta(alpha, alpha): small: mostly near 0 or 1; 1: any alike; large: near a half."""
    p: Probability = 1.0
    """How likely an image is blended."""

    def __call__(
        self, images: Tensor, targets: Tensor, draw: Draw, replica_sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return float32 images and targets, blended.

        Args:
            images: (batch, channels, height, width), uint8 or floats in [0, 1].
            targets: (batch, classes) probabilities, or other floats, (batch, …).
            draw: the batch's randomness.
            replica_sizes: sizes of the consecutive parts within which partners are found.
        """
        share = _shares(draw, self.alpha, self.p).to(torch.float32).to(images.device, non_blocking=True)
        partner = partners(replica_sizes).to(images.device, non_blocking=True)
        images = as_floats(images)
        return _blend(images, images[partner], share), _blend(targets, targets[partner], share)


class CutMix(Settings):
    """Replace a rectangle of an image by the same place of another, and mix their classes by area.

    As Yun et al., "CutMix" (ICCV 2019), with a rectangle for each image.
    """

    name: Literal["cutmix"] = "cutmix"
    alpha: Alpha = 1.0
    """The share of the image that stays is from Beta(alpha, alpha), before the rectangle is cut at the border."""
    p: Probability = 1.0
    """How likely an image is cut."""

    def __call__(
        self, images: Tensor, targets: Tensor, draw: Draw, replica_sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return images of the same type, cut, and targets, blended; arguments as of `Mixup`."""
        height, width = images.shape[2:]
        side = (1 - _shares(draw, self.alpha, self.p)).sqrt()  # of the rectangle, as a part of the image's
        place = draw.uniform(4, cpu=True)[:, 2:].double()  # the first two numbers went into the shares
        rows = _span(place[:, 0], side, height)  # (batch, height)
        columns = _span(place[:, 1], side, width)
        share = (1 - rows.sum(1) * columns.sum(1) / (height * width)).to(images.device, non_blocking=True)
        hole = (rows[:, None, :, None] & columns[:, None, None]).to(images.device, non_blocking=True)
        partner = partners(replica_sizes).to(images.device, non_blocking=True)
        return torch.where(hole, images[partner], images), _blend(targets, targets[partner], share)


def partners(replica_sizes: Sequence[int]) -> Tensor:
    """Return each sample's partner, int64 (batch,): the next one of its replica; the last one's is the first."""
    starts = np.cumsum([0, *replica_sizes[:-1]])
    parts = [
        int(start) + (torch.arange(size) + 1) % size for start, size in zip(starts, replica_sizes, strict=True) if size
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _blend(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
    share = share.view(-1, *(1,) * (own.ndim - 1))
    return own * share + other * (1 - share)


def _span(centre: Tensor, side: Tensor, length: int) -> Tensor:
    """Return (batch, length): which rows or columns the rectangle covers."""
    half = (side * length).long()[:, None] // 2
    place = torch.arange(length) - (centre * length).long()[:, None]
    return (place >= -half) & (place < half)


def _shares(draw: Draw, alpha: float, p: float) -> Tensor:
    """Return the images' own shares, float64 (batch,) on the CPU; 1 where an image stays as it is."""
    numbers = draw.uniform(2, cpu=True)
    return torch.where(numbers[:, 1] < p, beta_quantile(alpha, numbers[:, 0].double()), 1.0)


def beta_quantile(alpha: float, u: Tensor) -> Tensor:
    """Return the quantiles of Beta(alpha, alpha) at u in [0, 1), float64 on the CPU: uniform numbers become shares."""
    cumulated, shares = _beta_table(alpha)
    lower = torch.minimum(u, 1 - u)  # the distribution is symmetric
    right = torch.searchsorted(cumulated, lower).clamp(1, _NODES - 1)
    left = right - 1
    slope = (shares[right] - shares[left]) / (cumulated[right] - cumulated[left])
    share = shares[left] + (lower - cumulated[left]) * slope
    return torch.where(u < 0.5, share, 1 - share)


@lru_cache(maxsize=16)
def _beta_table(alpha: float) -> tuple[Tensor, Tensor]:
    """Return Beta(alpha, alpha)'s distribution at nodes from 0 to a half: cumulated probabilities, and shares.

    The density x**(alpha - 1) (1 - x)**(alpha - 1) is infinite at 0 if alpha is below 1. By v = x**alpha it becomes
    (1 - x)**(alpha - 1) / alpha, smooth, and a sum of trapezoids integrates it. Its constant follows from the half.
    """
    nodes = np.linspace(0, 1, _NODES)
    x = 0.5 * nodes ** max(1 / alpha, 1)  # even steps of v, or of x where alpha is above 1
    v = 0.5**alpha * nodes ** max(1, alpha)  # x**alpha, but x itself may be too small for a float
    density = (1 - x) ** (alpha - 1) / alpha
    cumulated = np.concatenate(([0.0], np.cumsum(np.diff(v) * (density[1:] + density[:-1]) / 2)))
    return torch.from_numpy(cumulated * (0.5 / cumulated[-1])), torch.from_numpy(x)
