"""Small datasets in MNIST's format."""

import gzip
from pathlib import Path

import numpy as np


def idx(values: np.ndarray) -> bytes:
    """The bytes of an idx file of bytes: the type and the number of dimensions, the dimensions, the values."""
    head = bytes((0, 0, 8, values.ndim))
    return head + np.array(values.shape, dtype=">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, samples: int = 20, compress: bool = False) -> dict[str, np.ndarray]:
    """Write a training part, and a test part of half as many samples; each image is as bright as its label."""
    written = {}
    for part, count in (("train", samples), ("t10k", samples // 2)):
        labels = np.arange(count) % 10
        images = np.random.default_rng(count).integers(0, 25, (count, 28, 28)) + 25 * labels[:, None, None]
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            written[name] = values
            path = folder / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(idx(values)) if compress else idx(values))
    return written
