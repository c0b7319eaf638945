"""The cost of computing the order of samples, and of starting inside an epoch.

    python -m benchmarks.speed.order [--quick] [--out FILE]

The order of an epoch is a keyed permutation, computed position by position. Measured: the 256 sample indices of a batch
out of 10^3 to 10^12 samples, compared with a table such as `torch.randperm` makes; and the time to the first batch,
starting at batch 0 and at batch 10,000 of an epoch.
"""

import tracemalloc
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import torchrelay as tr
from benchmarks import page
from benchmarks.measure import side_by_side
from benchmarks.page import Spread, Table
from torchrelay.data.augment import Pipeline
from torchrelay.data.batches import Batches
from torchrelay.data.order import order
from torchrelay.device.device import DeviceSettings, set_up

TITLE = "The order of samples"
BATCH = 256
SIZES = (3, 6, 9, 12)  # powers of ten
LARGEST_TABLE = 8  # of 10^9 int64 would take 8 GB


def orders(rounds: int) -> Table:
    """Return a table of times and memory."""

    def batch(samples: int) -> Callable[[], object]:
        positions = np.arange(samples - BATCH, samples)  # any positions take the same time
        return lambda: [order(0, epoch, positions, samples) for epoch in range(20)]

    times = side_by_side({f"{power}": batch(10**power) for power in SIZES}, rounds)
    rows: list[Sequence[str | Spread]] = []
    for power in SIZES:
        tracemalloc.start()
        batch(10**power)()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        table = f"{8 * 10**power / 1e6:,.3f} MB" if power <= LARGEST_TABLE else f"{8 * 10**power / 1e9:,.0f} GB"
        each = Spread(tuple(seconds / 20 * 1e6 for seconds in times[str(power)]), 0)
        ratio = each.median / median(times[str(SIZES[0])]) * 20 / 1e6
        rows.append((f"10^{power}", each, f"{ratio:.2f}", f"{peak / 1e3:,.0f} kB", table))
    heads = ("samples", f"us for a batch of {BATCH}", "relative to 10^3", "peak memory", "size of a table")
    return Table("A batch's indices", heads, rows, f"Medians of {rounds}.")


class Squares(Dataset[tuple[Tensor, int]]):
    """Numbers that `__getitem__` computes."""

    def __len__(self) -> int:
        return 80_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((8,), float(index) ** 2), index % 10


def starts(rounds: int) -> Table:
    """Return a table of the time to the first batch, at the start of an epoch and far inside it."""
    device = set_up(DeviceSettings(name="cpu"), exact=True)
    inputs = torch.arange(80_000 * 8, dtype=torch.float32).reshape(80_000, 8)
    arrays = tr.data.arrays(inputs, torch.arange(80_000) % 10)
    rows: list[Sequence[str | Spread]] = []
    for what, source, workers in (
        ("arrays", arrays, 0),
        ("a Dataset", tr.data.dataset(Squares()), 0),
        ("a Dataset, 2 workers", tr.data.dataset(Squares()), 2),
    ):
        batches = Batches(source, 8, device, Pipeline(classes=10), workers=workers)

        def first(start: int, batches: Any = batches) -> Callable[[], object]:
            return lambda: next(batches.epoch(0, start))

        times = side_by_side({"0": first(0), "10000": first(9_999)}, rounds)
        batches.close()
        here, far = (Spread(tuple(seconds * 1e3 for seconds in times[start]), 2) for start in ("0", "10000"))
        rows.append((what, here, far, f"{far.median / here.median:.2f}"))
    heads = ("source", "ms to batch 0", "ms to batch 10,000", "ratio")
    return Table("Starting inside an epoch", heads, rows, f"Medians of {rounds}.")


def tables(quick: bool = False) -> list[Table]:
    """Return both tables."""
    rounds = 1 if quick else 9
    return [orders(rounds), starts(rounds)]


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
