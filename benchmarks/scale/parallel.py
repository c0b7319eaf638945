"""What several processes cost: an exact run's step compared with DistributedDataParallel's, and the scaling to two.

    python -m benchmarks.scale.parallel [--rounds 5] [--out docs/evidence/parallel.md]

Each case runs in one and in two processes of one thread, on the CPU over gloo, or on as many GPUs over nccl. `by hand`
is a loop with PyTorch's DistributedDataParallel that doesn't import torchrelay. All cases read the same batches from
memory and take turns, so other load slows all of them alike. Times are medians over all steps of all rounds.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STEPS, WARM = 12, 3  # steps per round, of which the first ones don't count
EACH = 16  # samples per process and step


class Small(nn.Sequential):
    """Many small layers, whose backward pass produces many small gradients in a short time."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(3 * 32 * 32, 64)]
        for _ in range(60):
            layers += [nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()]
        super().__init__(*layers, nn.Linear(64, 10))


def resnet18() -> nn.Module:
    net: nn.Module = torchvision.models.resnet18(num_classes=10)
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-18, 64x64": resnet18, "60 small layers": Small}
SIZES = {"ResNet-18, 64x64": 64, "60 small layers": 32}


def data(name: str, size: int) -> tuple[Tensor, Tensor]:
    """Return images for all steps of a round."""
    generator, side = torch.Generator().manual_seed(0), SIZES[name]
    samples = EACH * size * STEPS
    return torch.randn(samples, 3, side, side, generator=generator), torch.arange(samples) % 10


def by_hand(name: str, rank: int, size: int, device: torch.device) -> list[float]:
    """Return the seconds of each step of a DistributedDataParallel loop like that in PyTorch's documentation."""
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]().to(device)
    if size > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs, targets = data(name, size)
    times, began = [], time.perf_counter()
    for step in range(STEPS):
        first = (step * size + rank) * EACH
        x, y = inputs[first : first + EACH].to(device), targets[first : first + EACH].to(device)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        times.append(now - began)
        began = now
    return times[WARM:]


def with_torchrelay(name: str, size: int, device: torch.device, exact: bool) -> list[float]:
    """Return the seconds of each step of `fit`."""
    import torchrelay as tr
    from torchrelay.distributed.replicas import ParallelSettings
    from torchrelay.run.settings import RunSettings
    from torchrelay.run.terminal import Terminal

    class Times(tr.Callback):
        def __init__(self) -> None:
            self.at: list[float] = []

        def on_step(self, trainer: Any, batch: Any, loss: Tensor) -> None:  # noqa: ARG002 - a callback's
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.at.append(time.perf_counter())

    torch.manual_seed(0)
    times = Times()
    tr.Trainer(
        MODELS[name](),
        data(name, size),
        optimizer=tr.optim.SGD(lr=0.01, momentum=0.9),
        epochs=1,
        batch_size=EACH * size,
        normalize=False,
        sampling="sequential",
        device=device.type,
        parallel=ParallelSettings(kind="ddp", replicas=size),
        settings=RunSettings(exact=exact),
        callbacks=[times],
        terminal=Terminal(quiet=True),
    ).fit()
    torch.use_deterministic_algorithms(False)
    return [after - before for before, after in zip(times.at, times.at[1:], strict=False)][WARM - 1 :]


def measure(rank: int, size: int, rounds: int, cuda: bool) -> dict[str, list[float]]:
    """Return the times of all cases in this process of the group."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in MODELS:
            for case, run in cases(name, rank, size, device):
                if size > 1:
                    dist.barrier()
                found.setdefault(f"{name}|{case}", []).extend(run())
    return found


def cases(name: str, rank: int, size: int, device: torch.device) -> Iterator[tuple[str, Callable[[], list[float]]]]:
    """Yield each case's name and function."""
    yield "by hand", lambda: by_hand(name, rank, size, device)
    yield "exact", lambda: with_torchrelay(name, size, device, exact=True)
    yield "not exact", lambda: with_torchrelay(name, size, device, exact=False)


def start(size: int, rounds: int, cuda: bool) -> dict[str, float]:
    """Run the cases in `size` processes, and return rank 0's medians in milliseconds."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        out = Path(folder) / "times.json"
        common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.scale.parallel", "--rounds", str(rounds), "--child", str(out)]
        started = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
            own |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)} if size > 1 else {}
            started.append(subprocess.Popen([*command, *(["--cuda"] if cuda else [])], env=common | own))
        codes = [process.wait() for process in started]
        if any(codes):
            sys.exit(f"one of {size} processes failed")
        return {case: 1e3 * median(times) for case, times in json.loads(out.read_text()).items()}


def table(one: dict[str, float], two: dict[str, float]) -> str:
    """Return the tables of both models."""
    lines = []
    for name in MODELS:
        lines += [f"## {name}, {EACH} samples per process", ""]
        lines += [
            "| | one process, ms per step | two, ms per step | relative to DDP | efficiency 1 to 2 "
            "| efficiency, relative to DDP |"
        ]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        hand = f"{name}|by hand"
        usual = one[hand] / two[hand]
        for case in ("by hand", "exact", "not exact"):
            key = f"{name}|{case}"
            efficiency = one[key] / two[key]
            lines.append(
                f"| {case} | {one[key]:.2f} | {two[key]:.2f} | {two[key] / two[hand]:.3f} | {efficiency:.3f} "
                f"| {efficiency / usual:.3f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, and write them to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cuda", action="store_true", help="run on two GPUs")
    parser.add_argument("--out", type=Path, help="where to write the tables")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        found = measure(rank, size, options.rounds, options.cuda)
        if rank == 0:
            options.child.write_text(json.dumps(found))
        return
    from benchmarks.measure import machine

    one, two = (start(size, options.rounds, options.cuda) for size in (1, 2))
    where = "GPUs, nccl" if options.cuda else "One thread per process, gloo"
    text = (
        "# The cost of several processes\n\n"
        "Step times of a hand-written loop with PyTorch's DistributedDataParallel and of torchrelay, exact and not "
        "exact,\nwith one process per replica; medians of cases that take turns. "
        f"{where};\n{machine()}; made by `python -m benchmarks.scale.parallel`.\n\n{table(one, two)}"
        + ("" if options.cuda else "\n## GPUs, nccl\n\nNot measured: it needs two GPUs, and `--cuda`.\n")
    )
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
