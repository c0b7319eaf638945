"""Transforms that mix two images and their targets.

An image's partner is the next image of the same replica, so replicas don't depend on each other; the order is random
anyway. Each image draws its own share.
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
_NODES = 4097  # of the distribution's table; interpolated shares are accurate to about 1e-6


class Mixup(Settings):
    """Blend each image with another one, and their targets likewise.

    As Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018), but each image draws its own share.
    """

    name: Literal["mixup"] = "mixup"
    alpha: Alpha = 0.2
    """The image's share is drawn from Beta(alpha, alpha): small: near 0 or 1; 1: uniform; large: near one half."""
    p: Probability = 1.0
    """The probability that an image is blended."""

    def __call__(
        self, images: Tensor, targets: Tensor, draw: Draw, replica_sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return float32 images and targets, blended.

        Args:
            images: (batch, channels, height, width), uint8 or floats in [0, 1].
            targets: (batch, classes) probabilities, or other floats, (batch, …).
            draw: the batch's random numbers.
            replica_sizes: sizes of the consecutive parts within which partners are found.
        """
        share = _shares(draw, self.alpha, self.p).to(torch.float32).to(images.device, non_blocking=True)
        partner = partners(replica_sizes).to(images.device, non_blocking=True)
        images = as_floats(images)
        return _blend(images, images[partner], share), _blend(targets, targets[partner], share)


class CutMix(Settings):
    """Replace a rectangle of each image by the same rectangle of another one, and mix their targets by area.

    As Yun et al., "CutMix" (ICCV 2019), but each image draws its own rectangle.
    """

    name: Literal["cutmix"] = "cutmix"
    alpha: Alpha = 1.0
    """The share that remains is drawn from Beta(alpha, alpha), before the rectangle is clipped at the border."""
    p: Probability = 1.0
    """The probability that an image is cut."""

    def __call__(
        self, images: Tensor, targets: Tensor, draw: Draw, replica_sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return cut images of the same type, and blended targets; arguments as of `Mixup`."""
        height, width = images.shape[2:]
        side = (1 - _shares(draw, self.alpha, self.p)).sqrt()  # the rectangle's, as a fraction of the image's
        center = draw.uniform(4, cpu=True)[:, 2:].double()  # the first two numbers determine the share
        rows = _span(center[:, 0], side, height)  # (batch, height)
        columns = _span(center[:, 1], side, width)
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


def _blend(values: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    share = share.view(-1, *(1,) * (values.ndim - 1))
    return values * share + partners * (1 - share)


def _span(center: Tensor, side: Tensor, length: int) -> Tensor:
    """Return whether the rectangle covers each row or column, bool (batch, length)."""
    half = (side * length).long()[:, None] // 2
    offset = torch.arange(length) - (center * length).long()[:, None]
    return (offset >= -half) & (offset < half)


def _shares(draw: Draw, alpha: float, p: float) -> Tensor:
    """Return the images' shares, float64 (batch,) on the CPU; 1 for an image that stays unchanged."""
    numbers = draw.uniform(2, cpu=True)
    return torch.where(numbers[:, 1] < p, beta_quantile(alpha, numbers[:, 0].double()), 1.0)


def beta_quantile(alpha: float, u: Tensor) -> Tensor:
    """Return the quantiles of Beta(alpha, alpha) at u in [0, 1), float64 on the CPU: they turn uniform into Beta."""
    cumulative, shares = _beta_table(alpha)
    lower = torch.minimum(u, 1 - u)  # the distribution is symmetric
    right = torch.searchsorted(cumulative, lower).clamp(1, _NODES - 1)
    left = right - 1
    slope = (shares[right] - shares[left]) / (cumulative[right] - cumulative[left])
    share = shares[left] + (lower - cumulative[left]) * slope
    return torch.where(u < 0.5, share, 1 - share)


@lru_cache(maxsize=16)
def _beta_table(alpha: float) -> tuple[Tensor, Tensor]:
    """Return Beta(alpha, alpha)'s distribution at nodes from 0 to one half: cumulative probabilities, and shares.

    The density x**(alpha - 1) (1 - x)**(alpha - 1) is infinite at 0 if alpha is below 1. Substituting v = x**alpha
    gives the smooth (1 - x)**(alpha - 1) / alpha, which the trapezoidal rule integrates. By symmetry the integral up to
    one half is 1/2, which fixes the constant.
    """
    nodes = np.linspace(0, 1, _NODES)
    x = 0.5 * nodes ** max(1 / alpha, 1)  # equal steps of v, or of x if alpha is above 1
    v = 0.5**alpha * nodes ** max(1, alpha)  # x**alpha; computed from x it could underflow
    density = (1 - x) ** (alpha - 1) / alpha
    cumulative = np.concatenate(([0.0], np.cumsum(np.diff(v) * (density[1:] + density[:-1]) / 2)))
    return torch.from_numpy(cumulative * (0.5 / cumulative[-1])), torch.from_numpy(x)
