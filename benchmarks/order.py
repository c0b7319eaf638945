"""What it costs to know which sample stands where, and to start inside an epoch.

    python -m benchmarks.order [--out docs/order.md]

The order of an epoch is a keyed permutation, computed place by place: a batch's 256 indices out of 10^3 and of 10^12
samples, beside a table such as `torch.randperm` makes. Then the time from asking to the first batch, at batch 0 and at
batch 10,000 of an epoch.
"""

import argparse
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import torchrelay as tr
from benchmarks.measure import machine, shown, side_by_side
from torchrelay.data.augment import Pipeline
from torchrelay.data.batches import Batches
from torchrelay.data.order import order
from torchrelay.device import DeviceSettings, set_up

BATCH = 256
SIZES = (3, 6, 9, 12)  # powers of ten
LARGEST_TABLE = 8  # of 10^9 int64 would take 8 GB


def orders() -> str:
    """Return a table of times and memory."""

    def batch(samples: int) -> Callable[[], object]:
        places = np.arange(samples - BATCH, samples)  # the last ones: none is easier than another
        return lambda: [order(0, epoch, places, samples) for epoch in range(20)]

    times = side_by_side({f"{power}": batch(10**power) for power in SIZES}, rounds=9)
    rows = []
    for power in SIZES:
        tracemalloc.start()
        batch(10**power)()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        table = f"{8 * 10**power / 1e6:,.3f} MB" if power <= LARGEST_TABLE else f"{8 * 10**power / 1e9:,.0f} GB"
        each = [seconds / 20 for seconds in times[str(power)]]
        ratio = median(each) / median(times[str(SIZES[0])]) * 20
        rows.append(f"| 10^{power} | {shown(each, 1e6, 0)} | {ratio:.2f} | {peak / 1e3:,.0f} kB | {table} |")
    heading = (
        "| samples | us for a batch of 256 | to 10^3 | peak memory | a table would take |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
    )
    return heading + "\n".join(rows)


class Squares(Dataset[tuple[Tensor, int]]):
    """Numbers, computed when asked for."""

    def __len__(self) -> int:
        return 80_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((8,), float(index) ** 2), index % 10


def starts() -> str:
    """Return a table of the time to the first batch, at the beginning of an epoch and far inside it."""
    device = set_up(DeviceSettings(name="cpu"), exact=True)
    inputs = torch.arange(80_000 * 8, dtype=torch.float32).reshape(80_000, 8)
    arrays = tr.data.arrays(inputs, torch.arange(80_000) % 10)
    rows = []
    for what, source, workers in (
        ("arrays", arrays, 0),
        ("a Dataset", tr.data.dataset(Squares()), 0),
        ("a Dataset, 2 workers", tr.data.dataset(Squares()), 2),
    ):
        batches = Batches(source, 8, device, Pipeline(classes=10), workers=workers)

        def first(start: int, batches: Any = batches) -> Callable[[], object]:
            return lambda: next(batches.epoch(0, start))

        times = side_by_side({"0": first(0), "10000": first(9_999)}, rounds=9)
        batches.close()
        ratio = median(times["10000"]) / median(times["0"])
        rows.append(f"| {what} | {shown(times['0'])} | {shown(times['10000'])} | {ratio:.2f} |")
    heading = (
        "| source | ms to batch 0 | ms to batch 10,000 | ratio |\n"
        "| --- | ---: | ---: | ---: |\n"
    )  # fmt: skip
    return heading + "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the tables")
    options = parser.parse_args()
    text = (
        f"# The order of samples\n\n{machine()}; medians of 9, with least and most; made by "
        f"`python -m benchmarks.order`.\n\n## A batch's indices\n\n{orders()}\n\n"
        f"## Starting inside an epoch\n\n{starts()}\n"
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
