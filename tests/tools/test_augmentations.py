"""The picture of all transforms: it is written, and every row shows a change."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]
ROWS = 11
LAYOUT = f"from tools import augmentations as a; print(a.TILE, a.GAP, a.LEFT, *map(a.row_top, range({ROWS})))"


def python(*arguments: str) -> str:
    """Run Python in the checkout's root, where `benchmarks` is found."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> list[np.ndarray]:
    """Return the images' part of each row of the written picture."""
    path = tmp_path_factory.mktemp("picture") / "folder" / "augmentations.png"
    assert str(path) in python("-m", "tools.augmentations", "--out", str(path))
    tile, gap, left, *tops = map(int, python("-c", LAYOUT).split())
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return [pixels[top : top + tile, left : left + 8 * (tile + gap) - gap] for top in tops]


def test_the_picture_shows_images_in_every_row(bands):
    for band in bands:
        assert (band == 255).all(axis=(0, 2)).sum() < 100  # few columns are white: the gaps
        assert band.std() > 30


@pytest.mark.parametrize("row", range(1, ROWS))
def test_every_row_differs_from_the_originals(bands, row):
    assert (np.abs(bands[row] - bands[0]) > 8).any(axis=2).mean() > 0.05
