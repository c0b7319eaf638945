"""An image folder: decoding it, reading it from the cache, and four processes that start at the same time.

    python -m benchmarks.speed.folder_cache [--quick] [--out FILE]

The first epoch lists and decodes small JPEG files; later epochs read the decoded images, mapped into memory.
"""

import multiprocessing
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.io import write_jpeg

from benchmarks import page
from benchmarks.page import Goal, Spread, Table
from torchrelay.data import image_folder
from torchrelay.data.augment import Pipeline
from torchrelay.data.batches import Batches
from torchrelay.data.sources import ArraySource, Source
from torchrelay.device.device import DeviceSettings, set_up

TITLE = "An image folder's cache"
IMAGES, ROUNDS, BATCH, PROCESSES = 20_000, 5, 256, 4
QUICK_IMAGES, QUICK_ROUNDS = 500, 1


def make(folder: Path, count: int) -> None:
    """Write random color JPEG files of 32x32 in ten classes."""
    generator = torch.Generator().manual_seed(0)
    for part, images in (("train", count), ("test", count // 10)):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
        for number in range(images):
            coarse = torch.rand(1, 3, 4, 4, generator=generator)
            image = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")[0].mul(255).to(torch.uint8)
            write_jpeg(image, str(folder / part / str(number % 10) / f"{number}.jpg"))


def epoch(folder: Path, cache: Path, said: list[str]) -> tuple[float, float, float]:
    """Return the seconds of listing and the first epoch, of the second epoch, and of an epoch from memory."""
    began = time.perf_counter()
    train, _ = image_folder(folder, cache_dir=cache, log=said.append)
    batches = Batches(train, BATCH, set_up(DeviceSettings(name="cpu"), exact=True), Pipeline())
    for _ in batches.epoch(0):
        pass
    first = time.perf_counter()
    for _ in batches.epoch(1):
        pass
    second = time.perf_counter()
    here = Batches(_in_memory(train), BATCH, batches.device, Pipeline())
    ready = time.perf_counter()
    for _ in here.epoch(1):
        pass
    return first - began, second - first, time.perf_counter() - ready


def _in_memory(source: Source) -> ArraySource:
    assert isinstance(source, ArraySource)  # noqa: S101 - a folder of equal sizes is one
    return replace(source, inputs=source.inputs.clone())


def start(folder: Path, cache: Path) -> int:
    """Read the folder as one of several processes; return how many of its two parts this one decoded."""
    said: list[str] = []
    image_folder(folder, cache_dir=cache, log=said.append)
    return sum("decoding" in line for line in said)


def tables(quick: bool = False) -> list[Table]:
    """Return the table."""
    count, rounds = (QUICK_IMAGES, QUICK_ROUNDS) if quick else (IMAGES, ROUNDS)
    times: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as made:
        folder, cache = Path(made) / "images", Path(made) / "cache"
        make(folder, count)
        for _ in range(rounds):
            shutil.rmtree(cache, ignore_errors=True)
            times.append(epoch(folder, cache, []))
        shutil.rmtree(cache)
        with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
            decoded = sum(pool.map(start, [folder] * PROCESSES, [cache] * PROCESSES))
    first, second, memory = (Spread(tuple(1e3 * t for t in column), 0) for column in zip(*times, strict=True))
    rows = [
        ("first epoch, with decoding", first, f"{first.median / second.median:.0f}"),
        ("second epoch", second, "1"),
        ("an epoch of arrays in memory", memory, f"{memory.median / second.median:.2f}"),
    ]
    goals = [
        Goal("first epoch, relative to the second", first.median / second.median, 20, None, "{:.0f} times", more=True),
        Goal("second epoch, relative to memory", second.median / memory.median, None, 1.1, "{:.2f} times"),
        Goal(f"how often {PROCESSES} processes that start together decode a part", decoded / 2, 1, 1, "{:.1f}"),
    ]
    note = f"{count:,} JPEG files of 32x32 in batches of {BATCH}. Medians of {rounds} rounds."
    return [Table("Milliseconds of an epoch", ("", "ms", "relative to the second"), rows, note, goals)]


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
