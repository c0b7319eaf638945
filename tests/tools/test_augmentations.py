"""The picture of all transforms: every row shows a change."""

import numpy as np
import pytest
from PIL import Image

from tools import augmentations

pytest.importorskip("sklearn")
ROWS = 11


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> list[np.ndarray]:
    """Return the image area of each row of the picture."""
    path = tmp_path_factory.mktemp("picture") / "folder" / "augmentations.png"
    augmentations.main(["--out", str(path)])
    tile, gap, left = augmentations.TILE, augmentations.GAP, augmentations.LEFT
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return [
        pixels[top : top + tile, left : left + 8 * (tile + gap) - gap]
        for top in map(augmentations.row_top, range(ROWS))
    ]


def test_the_picture_shows_images_in_every_row(bands):
    for band in bands:
        assert (band == 255).all(axis=(0, 2)).sum() < 100  # few columns are white: the gaps
        assert band.std() > 30


@pytest.mark.parametrize("row", range(1, ROWS))
def test_every_row_differs_from_the_originals(bands, row):
    assert (np.abs(bands[row] - bands[0]) > 8).any(axis=2).mean() > 0.05
