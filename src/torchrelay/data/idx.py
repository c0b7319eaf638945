"""Step 2: MNIST, Fashion-MNIST and their kin: images and labels in idx files, compressed or not."""

import gzip
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrelay.data.sources import ArraySource, arrays
from torchrelay.errors import RelayError

_UINT8 = 0x08
_FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def mnist(
    root: str | Path, classes: Sequence[str] = tuple("0123456789"), name: str = "mnist"
) -> tuple[ArraySource, ArraySource]:
    """Return the training and test part of MNIST, uint8 (60,000 and 10,000, 1, 28, 28), or of a dataset in its form.

    Args:
        root: the folder of the four files, such as `train-images-idx3-ubyte` or `train-images-idx3-ubyte.gz`; or that
            for which torchvision downloaded them.
        classes: names of the classes.
        name: the source's name.

    Raises:
        RelayError: a file is missing or damaged; the text names it.
    """

    def part(prefix: str) -> ArraySource:
        images = read_idx(_find(root, f"{prefix}-images-idx3-ubyte"))
        labels = read_idx(_find(root, f"{prefix}-labels-idx1-ubyte"))
        return arrays(images[:, None], labels.long(), classes, name)

    return part("train"), part("t10k")


def fashion_mnist(root: str | Path) -> tuple[ArraySource, ArraySource]:
    """Return the training and test part of Fashion-MNIST (Xiao et al., 2017); see `mnist`."""
    return mnist(root, _FASHION, "fashion-mnist")


def read_idx(path: Path) -> Tensor:
    """Return the content of an idx file of bytes as uint8.

    Raises:
        RelayError: the file isn't one.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise RelayError(f"{path} can't be read: {error}; copy it again") from None
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], dtype=">u4").tolist() if len(content) >= start else []
    if content[:3] != bytes((0, 0, _UINT8)) or not shape or len(content) != start + prod(shape):
        raise RelayError(f"{path} isn't an idx file of bytes, or it is cut off: copy it again")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


def _find(root: str | Path, name: str) -> Path:
    folder = Path(root).expanduser()
    for place in (folder, *sorted(folder.glob("*/raw"))):
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise RelayError(f"there is no {name} and no {name}.gz in {root}: set data.root to the folder of the four files")
