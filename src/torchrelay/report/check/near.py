"""Find images that are nearly the same: hashes of 64 bits give candidates, small gray copies decide.

A bit is the sign of a coefficient of the discrete cosine transform, one of the 64 lowest frequencies: what a change of
brightness, contrast or compression hardly touches (Zauner, "Implementation and benchmarking of perceptual image hash
functions", 2010). A shift by a pixel turns many bits, so an image is looked up by its four shifts' hashes as well.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from torchrelay.report.check.findings import Pairs
from torchrelay.report.check.thumbnails import Thumbnails

Hashes = npt.NDArray[np.uint64]
_SHIFTS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
_FREQUENCIES = 11  # in each direction; the 64 lowest sums of two, without the mean, are among them
_BANDS, _BITS = 4, 16
_RADIUS = 7  # bits: two hashes within it share a band, or all but one bit of it (Norouzi et al., CVPR 2012)
_BUDGET = 1000  # pairs of hashes that are compared for each image
_KEPT = 5  # pairs for each image that are compared by their copies
_BLOCK = 2**14
_FLAT = 2.0  # deviation below which a hash is noise
_LEAST_SIDE = 16  # pixels; smaller images are alike
_DISTANCE, _PART = 0.05, 1 / 7  # 1 - correlation of two copies; of the nearest images' where those are alike
_QUERIES = 256  # images whose nearest neighbor says how alike images are that aren't copies


def near_pairs(copies: Thumbnails, among: npt.NDArray[np.int64]) -> tuple[Pairs, npt.NDArray[np.float32]]:
    """Return pairs of images that are nearly the same, and their distances, the nearest first.

    Args:
        copies: gray copies of all images.
        among: the images to compare, none of them equal.
    """
    among = among[copies[among].reshape(len(among), -1).std(1) >= _FLAT]
    if len(among) < 2 or min(copies.shape[1:]) < _LEAST_SIDE:
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    copies = copies[among]
    pairs = _candidates(_hashes(copies))
    blocks = np.array_split(pairs, len(pairs) // _BLOCK + 1)
    distances = np.concatenate([_distances(copies, block) for block in blocks])
    near = np.flatnonzero(distances <= _threshold(copies))
    near = near[np.argsort(distances[near], kind="stable")]
    return among[pairs[near]], distances[near]


# ------------------------------------------------------------------------------------------------ hashes


def _hashes(copies: Thumbnails) -> Hashes:
    """Return (images, 5) hashes: of each image, and of the image shifted by a pixel in four directions."""
    waves = _waves(*copies.shape[1:])
    found = []
    for block in np.array_split(copies, len(copies) // _BLOCK + 1):
        coefficients = torch.from_numpy(block.reshape(len(block), -1)).float() @ waves
        bits = np.packbits((coefficients > 0).numpy(), axis=1, bitorder="little")
        found.append(bits.view(np.uint64))
    return np.concatenate(found)


def _waves(height: int, width: int) -> Tensor:
    """Return (pixels, 5 * 64) values by which an image's pixels are multiplied: 64 waves for each shift."""

    def cosines(length: int) -> npt.NDArray[np.float64]:
        waves = np.cos(np.pi * np.arange(_FREQUENCIES)[:, None] * (np.arange(length) + 0.5) / length)
        waves[0] *= np.sqrt(0.5)
        return waves

    both = [(row, column) for row in range(_FREQUENCIES) for column in range(_FREQUENCIES)]
    lowest = sorted(both, key=lambda pair: (sum(pair), pair))[1:65]
    rows, columns = cosines(height), cosines(width)
    waves = np.stack([np.outer(rows[row], columns[column]) for row, column in lowest])
    shifted = []
    for down, right in _SHIFTS:  # instead of the image, whose edge is repeated, the waves are moved
        moved = np.zeros_like(waves)
        at = np.clip(np.arange(height) + down, 0, height - 1), np.clip(np.arange(width) + right, 0, width - 1)
        np.add.at(moved, (slice(None), at[0][:, None], at[1][None]), waves)  # type: ignore[arg-type]
        shifted.append(moved.reshape(64, -1))
    return torch.from_numpy(np.concatenate(shifted)).float().t()


# ------------------------------------------------------------------------------------------------ candidates


@dataclass(frozen=True)
class _Band:
    """A quarter of the hashes' bits, and the images that have each value of them."""

    keys: npt.NDArray[np.uint16]  # (images, 5)

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        return np.argsort(self.keys[:, 0], kind="stable")

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        return np.bincount(self.keys[:, 0], minlength=2**_BITS)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.counts) - self.counts

    def matches(self, keys: npt.NDArray[np.uint16], first: int) -> Pairs:
        """Return pairs (image, other) where the other one's band has the key of the image, counted from `first`."""
        counts, starts = self.counts[keys], self.starts[keys]
        images = np.repeat(np.arange(first, first + len(keys)), counts)
        inside = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([images, self.order[np.repeat(starts, counts) + inside]], 1)


def _candidates(hashes: Hashes) -> Pairs:
    """Return the pairs of images whose hashes are near, by looking up each hash in the bands of all others.

    Equal bands come first, then bands with one other bit, unshifted images before shifted ones, until the budget is
    spent: where most images are alike, as drawings of one thing are, less is compared.
    """
    images = len(hashes)
    bits = np.unpackbits(hashes.view(np.uint8).reshape(images, -1, 8), axis=2, bitorder="little")
    # Neighboring frequencies, which resemble each other, go to different bands.
    mixed = np.packbits(bits.reshape(images, -1, _BITS, _BANDS).swapaxes(2, 3).reshape(images, -1), axis=1)
    keys = mixed.view(np.uint16).reshape(images, len(_SHIFTS), _BANDS)
    bands = [_Band(keys[:, :, band]) for band in range(_BANDS)]
    radius = _radius(hashes)
    turned = [np.uint16(1 << bit) for bit in range(_BITS)] if radius >= _BANDS else []
    shifts = range(len(_SHIFTS))
    probes = [(np.uint16(0), shift) for shift in shifts] + [(bit, shift) for shift in shifts for bit in turned]
    budget, found = _BUDGET * images, [np.empty(0, np.int64)]
    for turn, shift in probes:
        for band in bands:
            wanted = band.keys[:, shift] ^ turn
            cost = int(band.counts[wanted].sum())
            if cost > budget:
                continue
            budget -= cost
            for first in range(0, images, _BLOCK):
                pairs = band.matches(wanted[first : first + _BLOCK], first)
                apart = np.bitwise_count(hashes[pairs[:, 0], shift] ^ hashes[pairs[:, 1], 0])
                near = np.sort(pairs[(apart <= radius) & (pairs[:, 0] != pairs[:, 1])], 1)
                found.append(near[:, 0] * images + near[:, 1])
    both = np.unique(np.concatenate(found))
    return np.stack([both // images, both % images], 1)


def _radius(hashes: Hashes) -> int:
    """Return how many bits may differ so that there aren't too many pairs, judged by some of the images."""
    some = np.random.default_rng(0).permutation(len(hashes))[:_QUERIES]
    within = np.zeros(65)
    for image in some:
        within += np.bincount(np.bitwise_count(hashes[image, 0] ^ hashes[:, 0]), minlength=65)
    pairs = (within.cumsum() - len(some)) / len(some)
    return max((radius for radius in range(_RADIUS + 1) if pairs[radius] <= _KEPT), default=0)


# ------------------------------------------------------------------------------------------------ decisions


def _normalized(copies: Tensor) -> Tensor:
    """Return (images, pixels) with a mean of 0 and a length of 1, which brightness and contrast don't change."""
    values = copies.flatten(1)
    values = values - values.mean(1, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values / length.clamp(min=1e-6)


def _distances(copies: Thumbnails, pairs: Pairs) -> npt.NDArray[np.float32]:
    """Return 1 - correlation of each pair, the least over the shifts."""
    ones, others = (torch.from_numpy(copies[pairs[:, side]]).float() for side in (0, 1))
    best = torch.full((len(pairs),), -1.0)
    height, width = copies.shape[1:]
    for fixed, moved in ((ones, others), (others, ones)):  # what was shifted out of one is still in the other
        target, padded = _normalized(fixed), pad(moved[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        for down, right in _SHIFTS:
            part = padded[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]
            best = torch.maximum(best, (_normalized(part) * target).sum(1))
    return (1 - best).numpy()


def _threshold(copies: Thumbnails) -> float:
    """Return the distance of copies: a part of what is usual between an image and its nearest, if images are alike."""
    some = np.random.default_rng(0).permutation(len(copies))[:_QUERIES]
    queries = _normalized(torch.from_numpy(copies[some]).float())
    nearest = torch.full((len(some),), -1.0)
    for first in range(0, len(copies), _BLOCK):
        block = _normalized(torch.from_numpy(copies[first : first + _BLOCK]).float())
        alike = queries @ block.T
        own = (some >= first) & (some < first + len(block))
        alike[torch.from_numpy(np.flatnonzero(own)), torch.from_numpy(some[own] - first)] = -1
        nearest = torch.maximum(nearest, alike.amax(1))
    return min(_DISTANCE, _PART * float((1 - nearest).median()))
