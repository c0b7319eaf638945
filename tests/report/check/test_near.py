"""Near copies are found whatever was done to them, and images that merely look alike are left alone."""

import io

import numpy as np
import pytest
from PIL import Image

from torchrelay.report.check.near import near_pairs


def scene(seed: int, side: int = 32) -> np.ndarray:
    """A picture with structure at all sizes, as photographs have."""
    rng, picture = np.random.default_rng(seed), np.zeros((side, side))
    for cells in (2, 4, 8, 16):
        coarse = Image.fromarray(rng.normal(0, 40 * 4 / cells**0.5, (cells, cells)).astype(np.float32))
        picture += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return (picture + 120).clip(0, 255).astype(np.uint8)


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=70)
    return np.asarray(Image.open(file))


CHANGES = {
    "encoded as JPEG": jpeg,
    "shifted to the right": lambda pixels: np.pad(pixels, ((0, 0), (1, 0)), mode="edge")[:, :-1],
    "shifted up": lambda pixels: np.pad(pixels, ((0, 1), (0, 0)), mode="edge")[1:],
    "brightened": lambda pixels: (pixels * 1.1 + 12).clip(0, 255).astype(np.uint8),
    "shifted and encoded": lambda pixels: jpeg(np.pad(pixels, ((1, 0), (0, 0)), mode="edge")[:-1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_found_that_was(change):
    copies = np.stack([*(scene(seed) for seed in range(60)), *(CHANGES[change](scene(seed)) for seed in (3, 7, 20))])
    pairs, distances = near_pairs(copies, np.arange(len(copies)))
    assert sorted(map(tuple, pairs.tolist())) == [(3, 60), (7, 61), (20, 62)]
    assert (np.diff(distances) >= 0).all()


def test_images_of_one_color_and_those_left_out_are_in_no_pair():
    copies = np.stack([*(scene(seed) for seed in range(30)), scene(4), *(np.full((32, 32), grey) for grey in range(9))])
    assert near_pairs(copies.astype(np.uint8), np.delete(np.arange(len(copies)), 4))[0].tolist() == []


def test_drawings_of_one_thing_are_no_copies_of_each_other():
    drawing = scene(0).astype(float)
    copies = np.stack([(drawing * 0.9 + scene(seed) * 0.1).astype(np.uint8) for seed in range(200)])
    assert len(near_pairs(copies, np.arange(200))[0]) < 20
