"""Time from the start of a process to the end of its first training step: the digits recipe, and the same by hand.

    python -m benchmarks.speed.first_step [--quick] [--out FILE]

A post-hook of `Optimizer.step` takes the time and ends the process.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median

from benchmarks import page
from benchmarks.measure import installed
from benchmarks.page import Goal, Spread, Table

TITLE = "Time to the first step"
ROUNDS, QUICK_ROUNDS = 7, 1

# Every case starts with this; perf_counter is the machine's clock, so the parent process can compare.
LEAVE = """
import os, time
from torch.optim.optimizer import register_optimizer_step_post_hook as after_step
def leave(*_):
    print("\\n", time.perf_counter(), flush=True)
    os._exit(0)
after_step(leave)
"""
BY_HAND = """
import numpy as np, torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
digits = load_digits()
images = torch.from_numpy(digits.images / 16).float()[:, None]
targets = torch.from_numpy(digits.target)
order = torch.randperm(len(targets))
train, test = order[len(order) // 5:], order[:len(order) // 5]
mean, std = images[train].mean(), images[train].std()
images = (images - mean) / std
def block(channels, filters):
    return [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
model = nn.Sequential(*block(1, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2), *block(64, 64),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, 460)
for batch in train[torch.randperm(len(train))].split(64):
    padded, (down, right) = F.pad(images[batch], (1, 1, 1, 1)), torch.randint(0, 3, (2,)).tolist()
    optimizer.zero_grad()
    F.cross_entropy(model(padded[:, :, down:down + 8, right:right + 8]), targets[batch]).backward()
    optimizer.step()
    schedule.step()
"""
WITH_TENSORBOARD = """
from torch.utils.tensorboard import SummaryWriter
SummaryWriter("by-hand").add_text("parameters", "lr 0.05")
"""
RECIPE = """
import sys
from torchrelay.cli import main
sys.exit(main(["train", "digits"{}]))
"""
CASES = {
    "by hand": LEAVE + BY_HAND,
    "by hand, with a SummaryWriter": LEAVE + WITH_TENSORBOARD + BY_HAND,
    "`torchrelay train digits`": LEAVE + RECIPE.format(""),
    "`torchrelay train digits --quiet`": LEAVE + RECIPE.format(', "--quiet"'),
}
BESIDE, OURS = "by hand", "`torchrelay train digits`"


def seconds(script: str) -> float:
    """Return the seconds from the start of a new process to the end of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**installed(), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
    return float(done.stdout.split()[-1]) - began


def tables(quick: bool = False) -> list[Table]:
    """Return the table of all cases, which take turns."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name, script in CASES.items():
            taken = seconds(script)
            if number:  # the first round fills the disk's cache and writes bytecode
                found[name].append(taken)
    rows: list[Sequence[str | Spread]] = [
        (name, Spread(tuple(values), 2), f"{median(values) - median(found[BESIDE]):+.2f}")
        for name, values in found.items()
    ]
    later = median(found[OURS]) - median(found[BESIDE])
    goal = Goal(f"{OURS}, compared with the script", later, 0.5, 0.2, "{:+.2f} s")
    note = (
        f"Seconds of new processes, medians of {rounds}. By hand: a script of 23 lines with the same data, network, "
        "optimizer, schedule and crop, without log, checkpoint or run folder; also with TensorBoard's `SummaryWriter`."
    )
    return [Table("Start to first step", ("", "seconds", "difference to the script"), rows, note, [goal])]


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
