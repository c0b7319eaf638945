"""Plant wrong labels and copies in real data, and count what `torchrelay check` finds.

    python -m benchmarks.check [--photographs FOLDER] [--fashion FOLDER] [--out docs/evidence/check.md]

The photographs are an image folder, such as CIFAR-10's as JPEG files; Fashion-MNIST is in its idx files. In each, 1% of
the training labels become wrong, and 50 copies of test images join the training data: equal, encoded as JPEG, shifted
by a pixel, brightened, or all of these. How many alarms the data gives by itself is counted before;
whether they are right needs eyes.
"""

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from benchmarks.page import circumstances, markdown
from torchrelay.data import fashion_mnist, image_folder
from torchrelay.data.sources import ArraySource
from torchrelay.report.check import duplicates, labels, near
from torchrelay.report.check.findings import Pool
from torchrelay.report.check.thumbnails import thumbnails

Pixels = npt.NDArray[np.uint8]  # (channels, height, width)
COPIES, WRONG = 50, 0.01


def encoded(pixels: Pixels) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(file, "JPEG", quality=75)
    again = np.asarray(Image.open(file))
    return again[None] if again.ndim == 2 else again.transpose(2, 0, 1)


def shifted(pixels: Pixels) -> Pixels:
    return np.pad(pixels, ((0, 0), (0, 0), (1, 0)), mode="edge")[:, :, :-1]


def brightened(pixels: Pixels) -> Pixels:
    return (pixels * 1.1 + 12).clip(0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "equal": lambda pixels: pixels,
    "encoded as JPEG, quality 75": encoded,
    "shifted by a pixel": shifted,
    "brightened by a tenth": brightened,
    "all three": lambda pixels: encoded(shifted(brightened(pixels))),
}


def planted(train: ArraySource, test: ArraySource) -> tuple[Pool, dict[tuple[int, int], str], set[int]]:
    """Return the data with errors, the pairs of copies with what was done to them, and the wrongly labelled samples."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(test), COPIES, replace=False)
    kinds = [list(CHANGES)[number % len(CHANGES)] for number in range(COPIES)]
    made = [CHANGES[kind](test.inputs[i].numpy()) for kind, i in zip(kinds, chosen, strict=True)]
    targets = torch.cat([train.targets, test.targets[torch.from_numpy(chosen)]])
    wrong = rng.choice(len(train), round(WRONG * len(train)), replace=False)
    others = torch.from_numpy(rng.integers(1, len(train.classes), len(wrong)))
    targets[torch.from_numpy(wrong)] = (targets[torch.from_numpy(wrong)] + others) % len(train.classes)
    inputs = torch.cat([train.inputs, torch.from_numpy(np.stack(made))])
    pool = Pool(
        {"train": replace(train, inputs=inputs, targets=targets, files=None), "test": replace(test, files=None)}
    )
    pairs = {
        (len(train) + number, len(inputs) + int(i)): kind
        for number, (i, kind) in enumerate(zip(chosen, kinds, strict=True))
    }
    return pool, pairs, set(wrong.tolist())


def copies(pool: Pool) -> set[tuple[int, int]]:
    """Return the pairs, equal or nearly equal, of a training and a test image."""
    first = duplicates.first_copies(pool)
    again = np.flatnonzero(first != np.arange(len(first)))
    near_ones, _ = near.near_pairs(thumbnails(pool), np.unique(first))
    pairs = np.concatenate([np.stack([first[again], again], 1), near_ones])
    across = pairs[(pool.part[pairs[:, 0]] == 0) & (pool.part[pairs[:, 1]] == 1)]
    return set(map(tuple, across.tolist()))


def copies_table(pool: Pool, pairs: dict[tuple[int, int], str], train: ArraySource, test: ArraySource) -> str:
    began = time.perf_counter()
    found = copies(pool)
    seconds = time.perf_counter() - began
    before = len(copies(Pool({"train": train, "test": test})))
    rows = []
    for kind in CHANGES:
        those = {pair for pair, what in pairs.items() if what == kind}
        rows.append((kind, str(len(those)), str(len(those & found)), str(len(those - found))))
    more = len(found - set(pairs))
    return (
        f"{len(pool.part):,} images are compared in {seconds:.0f} s. Before anything was planted, {before:,} pairs of "
        f"training and test images are found; beside the planted ones, {more:,}.\n\n"
        + markdown(("copies of test images in the training data", "planted", "found", "missed"), rows)
    )


def labels_table(pool: Pool, wrong: set[int]) -> str:
    began = time.perf_counter()
    found = labels.suspects(pool)
    seconds = time.perf_counter() - began
    assert found is not None  # noqa: S101 - there are enough samples
    among, rows = wrong & set(found.considered.tolist()), []
    for name, count in (("the first 100", 100), ("the first 500", 500), ("all", len(found.samples))):
        alarms = set(found.samples[:count].tolist())
        row = (len(alarms), len(alarms & among), len(among - alarms), len(alarms - among))
        rows.append((name, *(f"{value:,}" for value in row)))
    return (
        f"Labels: {len(found.considered):,} training samples, of which the small model has {found.right:.1%} right, in "
        f"{seconds:.0f} s; {len(among):,} of them have a planted wrong label.\n\n"
        + markdown(("suspicious labels", "alarms", "planted ones found", "missed", "others"), rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="an image folder with train/ and test/, all of one size")
    parser.add_argument("--fashion", type=Path, help="the folder of Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, help="where to write the tables")
    options = parser.parse_args()
    data = []
    if options.photographs is not None:
        data.append(("CIFAR-10's photographs", *image_folder(options.photographs, cache=False, log=lambda _: None)))
    if options.fashion is not None:
        data.append(("Fashion-MNIST", *fashion_mnist(options.fashion)))
    text = (
        "# What a check finds\n\n"
        f"{circumstances()}\n\nMade by `python -m benchmarks.check --photographs FOLDER --fashion FOLDER`: {WRONG:.0%} "
        f"of the training labels are made wrong, and {COPIES} copies of test images join the training data.\n"
    )
    for name, train, test in data:
        assert isinstance(train, ArraySource)  # noqa: S101 - both are held in memory
        assert isinstance(test, ArraySource)  # noqa: S101
        pool, pairs, wrong = planted(train, test)
        text += f"\n## {name}\n\n{copies_table(pool, pairs, train, test)}\n\n{labels_table(pool, wrong)}\n"
        print(text, flush=True)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
