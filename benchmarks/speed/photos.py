"""Photographs of 500x375, randomly cropped to 224x224: images per second and core of the input pipeline.

    python -m benchmarks.speed.photos [--quick] [--out FILE]

The photographs are crops of those that come with scikit-learn, rotated, recolored and overlaid with shapes, all from a
seed. torchvision decodes each in every epoch, in the persistent workers of a `DataLoader`; torchrelay decodes the
folder once, to squares of 256 pixels, and crops these in every epoch.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import page
from benchmarks.page import Goal, Spread, Table
from benchmarks.speed.augment_speed import MEAN, STD
from torchrelay.data import image_folder
from torchrelay.data.augment import Flip, Pipeline, RandomResizedCrop
from torchrelay.data.batches import Batches
from torchrelay.device.device import DeviceSettings, set_up

TITLE = "Large photographs"
IMAGES, ROUNDS, BATCH, WORKERS, SIDE, CROP = 2_000, 5, 64, 2, 256, 224
EPOCHS = 10  # in a short training
QUICK_IMAGES, QUICK_ROUNDS = 128, 1


def make(folder: Path, count: int) -> None:
    """Write JPEG files of two classes, with an eighth as many for testing."""
    from sklearn.datasets import load_sample_images

    scenes = [Image.fromarray(scene).resize((960, 640)) for scene in load_sample_images().images]
    draw = np.random.default_rng(0)
    for number in range(count + count // 8):
        left, top = int(draw.integers(460)), int(draw.integers(265))
        photo = scenes[number % 2].crop((left, top, left + 500, top + 375))
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.integers(2) else photo
        pixels = np.asarray(photo).astype(np.float32) * draw.uniform(0.6, 1.2, 3) + draw.normal(0, 4, (375, 500, 1))
        y, x, side = draw.integers(300), draw.integers(400), draw.integers(20, 90)
        pixels[y : y + side, x : x + side] = draw.uniform(0, 255, 3)
        place = folder / ("train" if number < count else "test") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number:05}.jpg", quality=90)


def seconds(epoch: Iterable[Any]) -> float:
    """Return the seconds of an epoch's batches, including the start of the workers."""
    began = time.perf_counter()
    for _ in epoch:
        pass
    return time.perf_counter() - began


def loader(folder: Path) -> DataLoader[Any]:
    """Return torchvision's pipeline."""
    from torchvision import datasets
    from torchvision import transforms as T

    steps = [T.RandomResizedCrop(CROP), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
    found = datasets.ImageFolder(str(folder / "train"), T.Compose(steps))
    return DataLoader(found, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)


def ours(folder: Path, cache: Path) -> Batches:
    """Return torchrelay's pipeline; decode the folder if it has no cache."""
    train, _ = image_folder(folder, size=SIDE, cache_dir=cache, log=lambda _: None)
    pipeline = Pipeline((RandomResizedCrop(size=CROP), Flip()), mean=MEAN, std=STD)
    return Batches(train, BATCH, set_up(DeviceSettings(name="cpu"), exact=True), pipeline)


def tables(quick: bool = False) -> list[Table]:
    """Return the table; the cases take turns."""
    count, rounds = (QUICK_IMAGES, QUICK_ROUNDS) if quick else (IMAGES, ROUNDS)
    theirs = f"torchvision, {WORKERS} workers, any epoch"
    ours_named = (
        "torchrelay, decoding into the cache",
        "torchrelay, any epoch from the cache",
        "torchrelay, first epoch with decoding",
        f"torchrelay, {EPOCHS} epochs with decoding",
    )
    times: dict[str, list[float]] = {name: [] for name in (theirs, *ours_named)}
    with tempfile.TemporaryDirectory() as made:
        folder, cache = Path(made) / "photographs", Path(made) / "cache"
        make(folder, count)
        there = loader(folder)
        for number in range(rounds):
            times[theirs].append(seconds(there))
            shutil.rmtree(cache, ignore_errors=True)
            began = time.perf_counter()
            batches = ours(folder, cache)
            decoding = (time.perf_counter() - began) * 8 / 9  # without the test images' share
            fresh, again = (seconds(batches.epoch(epoch)) for epoch in (number, number + rounds))
            took = (decoding, again, decoding + fresh, (decoding + fresh + (EPOCHS - 1) * again) / EPOCHS)
            for name, value in zip(ours_named, took, strict=True):
                times[name].append(value)
    cores = len(os.sched_getaffinity(0))
    rates = {name: Spread(tuple(count / t / cores for t in taken), 0) for name, taken in times.items()}
    base = rates[theirs].median
    goals = [
        Goal(
            f"{name}: rate per core, relative to torchvision",
            rates[name].median / base,
            1.5,
            3,
            "{:.1f} times",
            more=True,
        )
        for name in ours_named
    ]
    note = (
        f"{count:,} JPEG files of 500x375, randomly cropped to {CROP}x{CROP}, flipped, normalized; {cores} cores. "
        f"torchrelay crops the central squares of {SIDE}x{SIDE}, "
        f"{3 * SIDE**2 / 1e6:.1f} MB each on disk. Medians of {rounds} rounds; "
        f"the rate of {EPOCHS} epochs is computed from one epoch of each kind."
    )
    rows = [(name, rate, f"{rate.median / base:.1f}") for name, rate in rates.items()]
    heads = ("", "images per second and core", "relative to torchvision")
    return [Table("Images per second and core", heads, rows, note, goals)]


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
