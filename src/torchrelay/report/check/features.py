"""Features on which a linear model does well, without a training: of images the responses to random whitened patches.

Coates, Lee and Ng, "An analysis of single-layer networks in unsupervised feature learning" (AISTATS 2011).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_SIDE, _STRIDE, _FILTERS, _GRID = (
    6,
    2,
    200,
    2,
)  # pixels of a patch and between patches; responses are averaged on a grid
_CUT = 0.25  # below which a response counts as none
_LEARN = 5_000  # images and patches from which the filters come
_WHITE, _CONTRAST = 0.1, 1e-3
_BLOCK = 50  # images at once: their responses fit into a cache


def of_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 (images, features) of images in [0, 1]; images of less than a patch are taken as rows."""
    if min(images.shape[2:]) < 2 * _SIDE:
        return of_rows(images)
    filters, mean = _filters(images, generator)
    return torch.cat([_responses(block, filters, mean) for block in torch.split(images, _BLOCK)])


def of_rows(rows: Tensor) -> Tensor:
    """Return float32 (rows, columns)."""
    return rows.flatten(1).float()


def _filters(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return filters (filters, pixels of a patch) that whiten a patch and compare it with others, and its mean."""
    some = images[torch.randperm(len(images), generator=generator)[:_LEARN]]
    patches = F.unfold(some, _SIDE, stride=_STRIDE).transpose(1, 2).flatten(0, 1)
    patches = patches[torch.randperm(len(patches), generator=generator)[: 4 * _LEARN]]
    patches = patches - patches.mean(1, keepdim=True)
    patches = patches / (patches.var(1, keepdim=True) + _CONTRAST).sqrt()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    whiten = vectors @ torch.diag((values.clamp(min=0) + _WHITE).rsqrt()) @ vectors.T
    chosen = (patches[:_FILTERS] - mean) @ whiten
    return F.normalize(chosen, dim=1) @ whiten, mean


def _responses(images: Tensor, filters: Tensor, mean: Tensor) -> Tensor:
    """Return how strongly each filter answers, averaged over the fields of a grid, both signs apart."""
    average, square = (
        F.avg_pool2d(values, _SIDE, _STRIDE).mean(1, keepdim=True) for values in (images, images.square())
    )
    deviation = ((square - average.square()).clamp(min=0) + _CONTRAST).sqrt()
    found = F.conv2d(images, filters.view(-1, images.shape[1], _SIDE, _SIDE), stride=_STRIDE)
    found = (found - average * filters.sum(1)[:, None, None]) / deviation - (filters @ mean)[:, None, None]
    both = torch.cat([F.relu(found - _CUT), F.relu(-found - _CUT)], 1)
    return F.adaptive_avg_pool2d(both, _GRID).flatten(1)
