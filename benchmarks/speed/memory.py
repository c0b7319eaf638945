"""Peak memory of a training, compared with a hand-written loop on the same data.

    python -m benchmarks.speed.memory [--quick] [--out FILE]

Each case runs in its own process. The figures are the kernel's high-water mark of resident memory (VmHWM), which is
reset for a new process; `ru_maxrss` would include the parent's peak. It needs Linux.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import page
from benchmarks.page import Goal, Spread, Table

TITLE = "Peak memory"
BATCH, STEPS, ROUNDS = 128, 60, 3
QUICK_STEPS, QUICK_ROUNDS = 3, 1
SHAPES = {"digits": (1797, 1, 8, 8), "cifar": (50_000, 3, 32, 32)}  # samples, channels, height, width
SHARE_OF_TEST = 5  # the test data has a fifth as many samples


def samples(name: str, test: bool) -> tuple[Tensor, Tensor]:
    """Return random uint8 images and int64 classes."""
    count, *shape = SHAPES[name]
    count = count // SHARE_OF_TEST if test else count
    random = torch.Generator().manual_seed(0)
    images = torch.empty(count, *shape, dtype=torch.uint8).random_(generator=random)
    return images, torch.randint(0, 10, (count,), generator=random)


def network(channels: int) -> nn.Module:
    """Return a small convolutional network."""
    layers = [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def by_hand(name: str, steps: int) -> None:
    """Train for some steps and evaluate, with a plain loop for images in memory."""
    (images, targets), (test_images, test_targets) = samples(name, test=False), samples(name, test=True)
    model = network(images.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    mean, std = 127.5, 73.9  # of uniformly distributed bytes
    model.train()
    for indices in torch.split(torch.randperm(len(targets)), BATCH)[:steps]:
        inputs = (images[indices].float() - mean) / std
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets[indices]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for part, truth in zip(torch.split(test_images, BATCH), torch.split(test_targets, BATCH), strict=True):
            found = model((part.float() - mean) / std).argmax(1)
            right += int((found == truth).sum())


def by_torchrelay(name: str, steps: int, folder: str | None = None) -> None:
    """Train and evaluate likewise with the trainer."""
    import torchrelay as tr
    from torchrelay.run.terminal import Terminal

    train = samples(name, test=False)
    tr.Trainer(
        network(train[0].shape[1]),
        train,
        samples(name, test=True),
        optimizer=tr.optim.SGD(lr=0.01, momentum=0.9, weight_decay=0.0),
        batch_size=BATCH,
        device="cpu",
        run=None if folder is None else Path(folder) / "run",
        settings=tr.RunSettings(max_steps=steps),
        terminal=Terminal(quiet=True),
    ).fit()


def with_run_folder(name: str, steps: int) -> None:
    """Train with a run folder: checkpoints, TensorBoard and plots."""
    with tempfile.TemporaryDirectory() as folder:
        by_torchrelay(name, steps, folder)


CASES: dict[str, Callable[[str, int], None]] = {
    "by hand": by_hand,
    "torchrelay": by_torchrelay,
    "torchrelay, with a run folder": with_run_folder,
}


def peak() -> float:
    """Return this process's high-water mark in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("error: the kernel doesn't report the peak memory: this benchmark needs Linux")


def measure(case: str, data: str, steps: int) -> float:
    """Return the peak MB of a case in its own process."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", "--case", case, "--data", data, "--steps", str(steps)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def tables(quick: bool = False) -> list[Table]:
    """Return a table for each data set."""
    steps, rounds = (QUICK_STEPS, QUICK_ROUNDS) if quick else (STEPS, ROUNDS)
    return [table(data, steps, rounds) for data in SHAPES]


def table(data: str, steps: int, rounds: int) -> Table:
    found: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            found[case].append(measure(case, data, steps))
    spreads = {case: Spread(tuple(values)) for case, values in found.items()}
    least = spreads["by hand"].median
    rows: list[Sequence[str | Spread]] = [
        (case, spread, f"{spread.median / least - 1:+.1%}") for case, spread in spreads.items()
    ]
    goals = [
        Goal(f"{case}, relative to the hand-written loop", spread.median / least - 1, 0.05, 0.02, "{:+.1%}")
        for case, spread in spreads.items()
        if case.startswith("torchrelay")
    ]
    count, *shape = SHAPES[data]
    note = (
        f"{count:,} training images of {'x'.join(map(str, shape))} bytes and a fifth as many test images, a small "
        f"convolutional network, {steps} steps of {BATCH} samples and an evaluation; MB, medians of {rounds}."
    )
    return Table(f"Data like {data}", ("", "MB", "relative to the loop"), rows, note, goals)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--data", choices=SHAPES, default="cifar")
    parser.add_argument("--steps", type=int, default=STEPS)
    options, _ = parser.parse_known_args()
    if options.case is None:
        page.main(__doc__ or "", TITLE, tables)
        return
    CASES[options.case](options.data, options.steps)
    print(peak())


if __name__ == "__main__":
    main()
