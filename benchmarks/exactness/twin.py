"""A hand-written training loop in plain PyTorch, as a user would write it. It needs nothing of torchrelay.

`agreement.py` runs it on the batches that a recipe trained on, and compares losses and weights bit by bit:

    python benchmarks/exactness/twin.py FOLDER

reads `FOLDER/case.json` (the parameters) and `FOLDER/batch-*.safetensors`, trains, and writes
`FOLDER/twin.safetensors` (losses and weights).
"""

import json
import math
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


def small_cnn() -> nn.Module:
    """The network of the digits recipe."""

    def block(channels: int, filters: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)
        )

    layers = OrderedDict(block1=block(1, 32), pool1=nn.MaxPool2d(2), block2=block(32, 64), pool2=nn.MaxPool2d(2))
    layers |= OrderedDict(block3=block(64, 64), mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return nn.Sequential(layers | OrderedDict(head=nn.Linear(64, 10)))


def resnet18() -> nn.Module:
    from torchvision import models

    model: nn.Module = models.resnet18(num_classes=10)
    return model


def learning_rate(case: dict[str, Any], step: int) -> float:
    """Half a cosine by epoch, as the tutorial's CosineAnnealingLR, or PyTorch's one-cycle curve by step."""
    lr, epochs, steps_per_epoch = float(case["lr"]), int(case["epochs"]), int(case["steps_per_epoch"])
    if case["schedule"] == "cosine":
        final = float(case["final_lr"])
        return final + (lr - final) * (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs)) / 2
    steps = epochs * steps_per_epoch
    start, end, peak = lr / 25, lr / 25 / 1e4, 0.3 * steps - 1
    if step < peak:
        return lr + (start - lr) * (1 + math.cos(math.pi * step / peak)) / 2
    return end + (lr - end) * (1 + math.cos(math.pi * (step - peak) / (steps - 1 - peak))) / 2


def train(case: dict[str, Any], folder: Path) -> None:
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(case["seed"])
    model = {"resnet18": resnet18, "small-cnn": small_cnn}[case["model"]]()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=case["lr"], momentum=case["momentum"], weight_decay=case["weight_decay"]
    )
    losses = []
    started = time.perf_counter()
    model.train()
    for step, path in enumerate(sorted(folder.glob("batch-*.safetensors"))):
        batch = load_file(path)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(case, step)
        loss = F.cross_entropy(model(batch["inputs"]), batch["targets"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    print(json.dumps({"seconds": time.perf_counter() - started, "steps": len(losses)}))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({"losses": torch.stack(losses), **weights}, folder / "twin.safetensors")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    train(json.loads((where / "case.json").read_text()), where)
