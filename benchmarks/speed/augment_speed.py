"""Images per second of the input pipeline: gathered, flipped, cropped, normalized.

    python -m benchmarks.speed.augment_speed [--quick] [--out FILE]

torchrelay works on whole batches in one process; torchvision's transforms work image by image, in a `DataLoader` with
two worker processes. Both read the same bytes from memory and return float32 batches.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import page
from benchmarks.page import NOT_MEASURED, Goal, Spread, Table
from torchrelay.data.augment import Flip, PaddedCrop, Pipeline
from torchrelay.data.batches import Batches
from torchrelay.data.sources import ArraySource
from torchrelay.device.device import DeviceSettings, set_up

TITLE = "Input pipeline"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH, WORKERS, PADDING = 256, 2, 4
IMAGES, ROUNDS = 50_000, 5
QUICK_IMAGES, QUICK_ROUNDS = 2_048, 1


def images(count: int) -> Tensor:
    """Return uint8 (count, 3, 32, 32) random images."""
    return torch.empty(count, 3, 32, 32, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0))


class OneByOne(Dataset[tuple[Tensor, int]]):
    """The images as torchvision's CIFAR10 stores them, (height, width, channels), passed through a transform."""

    def __init__(self, found: Tensor) -> None:
        from torchvision import transforms as T

        self.images: npt.NDArray[np.uint8] = found.permute(0, 2, 3, 1).contiguous().numpy()
        steps = [T.RandomCrop(32, padding=PADDING), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
        self.transform = T.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), index % 10


def ours(found: Tensor, device: str) -> Callable[[int], Iterable[Any]]:
    """Return a function that yields the batches of an epoch."""
    transforms = (Flip(), PaddedCrop(padding=PADDING, mode="zeros"))
    source = ArraySource(found, torch.arange(len(found)) % 10)
    placed = set_up(DeviceSettings(name=device), exact=True)
    return Batches(source, BATCH, placed, Pipeline(transforms, mean=MEAN, std=STD)).epoch


def rate(epoch: Iterable[Any], count: int) -> float:
    """Return an epoch's images per second from the first batch to the last, without the start of the workers."""
    batches = iter(epoch)
    next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (count - BATCH) / (time.perf_counter() - began)


def tables(quick: bool = False) -> list[Table]:
    """Return the table; the cases take turns, one epoch each."""
    count, rounds = (QUICK_IMAGES, QUICK_ROUNDS) if quick else (IMAGES, ROUNDS)
    found = images(count)
    loader = DataLoader(OneByOne(found), BATCH, shuffle=True, num_workers=WORKERS)
    here, there = f"torchrelay, one process, {torch.get_num_threads()} threads", f"torchvision, {WORKERS} workers"
    devices = {here: ours(found, "cpu")}
    on_gpu = "torchrelay, on a GPU"
    if torch.cuda.is_available():
        devices[on_gpu] = ours(found, "cuda")
    rates: dict[str, list[float]] = {name: [] for name in (there, *devices)}
    for number in range(rounds):
        rates[there].append(rate(loader, count))
        for name, epoch in devices.items():
            if number == 0:
                rate(epoch(rounds), count)  # warm
            rates[name].append(rate(epoch(number), count))
    spreads = {name: Spread(tuple(values), 0) for name, values in rates.items()}
    base = spreads[there].median
    rows: list[Sequence[str | Spread]] = [
        (name, spread, f"{spread.median / base:.1f}") for name, spread in spreads.items()
    ]
    if on_gpu not in spreads:
        rows.append((on_gpu, NOT_MEASURED, ""))
    times = spreads[here].median / base
    goal = Goal("torchrelay's rate, relative to torchvision", times, 10, 25, "{:.1f} times", more=True)
    note = (
        f"{count:,} images of 32x32 from memory in batches of {BATCH}: gathered in random order, flipped, cropped "
        f"after padding by {PADDING}, normalized. Medians of {rounds} epochs."
    )
    return [Table("Images per second", ("", "images per second", "relative to torchvision"), rows, note, [goal])]


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
