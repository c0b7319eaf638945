"""Train one run on 1, 2, 4 and 8 processes, across `kill -9`, and on hosts of which one dies; compare the bytes.

    python -m benchmarks.exactness.elastic [--out docs/evidence/elastic.md]

The network has BatchNorm, dropout and weights that only some replicas use; the gradient is clipped and the weights are
averaged; the last batch of an epoch has three samples for eight replicas. The hashes cover all files of the final
checkpoint. The hosts are network namespaces; where these aren't allowed, the row says so.
"""

import argparse
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.scale.hosts import hosts, why_not

SAMPLES, BATCH, EPOCHS, REPLICAS = 1403, 100, 8, 8
STEPS = EPOCHS * -(-SAMPLES // BATCH)


class Net(nn.Module):
    """A small network with every layer whose result could depend on the number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.seldom = nn.Linear(128, 128)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, 10) logits of (batch, 1, 8, 8) images."""
        x = self.body(images).flatten(1)
        if images[0].sum() > images[-1].sum():  # in some replicas
            x = x + self.seldom(x)
        logits: Tensor = self.head(x)
        return logits


def train(run: Path) -> None:
    """Train, with rank and world size from the environment; resume if a killed process left a run."""
    import torchrelay as tr
    from torchrelay.checkpoint import CheckpointSettings
    from torchrelay.device.device import DeviceSettings
    from torchrelay.distributed.replicas import ParallelSettings
    from torchrelay.run.terminal import Terminal

    torch.manual_seed(0)
    data, test = tr.data.digits()
    trainer = tr.Trainer(
        Net(),
        data.take(torch.arange(SAMPLES)),
        test,
        optimizer=tr.optim.SGD(lr=0.05, momentum=0.9, clip_norm=0.5),
        schedule=tr.optim.OneCycle(),
        augment=[tr.augment.PaddedCrop(padding=1)],
        epochs=EPOCHS,
        batch_size=BATCH,
        ema=0.99,
        run=run,
        device=DeviceSettings(name="cpu", threads=1),
        parallel=ParallelSettings(replicas=REPLICAS, timeout=5),
        checkpoint=CheckpointSettings.model_validate({"every": "2 steps", "keep": 2}),
        terminal=Terminal(quiet=True),
    )
    if (run / "recipe.toml").exists():
        trainer.resume()
    else:
        trainer.fit()


# ------------------------------------------------------------------------------------------------ the processes


def start(run: Path, size: int) -> list["subprocess.Popen[bytes]"]:
    """Start `size` processes on this host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"} if size > 1 else {}
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)} if size > 1 else {}
    command = [sys.executable, "-m", "benchmarks.exactness.elastic", "--child", str(run)]
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {} for rank in range(size)]
    return [subprocess.Popen(command, env=os.environ | meeting | sizes | each) for each in own]


def to_the_end(run: Path, size: int) -> None:
    """Run to the end on `size` processes."""
    codes = [process.wait() for process in start(run, size)]
    if any(codes):
        sys.exit(f"of {size} processes, the exit codes were {codes}")


def killed_at(run: Path, size: int, step: int, chance: random.Random) -> None:
    """Run on `size` processes until a random moment after `step`, and kill all of them."""
    processes = start(run, size)
    until(lambda: newest(run) >= step, processes)
    time.sleep(chance.uniform(0, 0.3))
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()


def on_two_hosts(run: Path) -> None:
    """Run on two hosts, and cut the second one off halfway."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    with tempfile.TemporaryDirectory() as folder, hosts(2) as (first, second):
        logs = [Path(folder) / "0.log", Path(folder) / "1.log"]
        started = [
            host.start(
                *command,
                *host.rendezvous("1:2", first.address),
                "-m",
                "benchmarks.exactness.elastic",
                "--child",
                run,
                log=log,
            )
            for host, log in zip((first, second), logs, strict=True)
        ]
        until(lambda: newest(run) >= STEPS // 3, started)
        second.cut()
        second.kill()
        if started[0].wait() != 0:
            sys.exit(logs[0].read_text())


def until(
    happened: Callable[[], bool], processes: "list[subprocess.Popen[bytes]] | list[subprocess.Popen[str]]"
) -> None:
    """Wait for a condition; exit if a process ends first."""
    while not happened():
        if any(process.poll() is not None for process in processes):
            sys.exit("a process ended too early")
        time.sleep(0.01)


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint."""
    from torchrelay import checkpoint

    whole = checkpoint.complete(run / "checkpoints")
    return int(whole[-1].name.removeprefix("step-")) if whole else -1


def fingerprint(run: Path) -> str:
    """Return a hash of all files of the final checkpoint."""
    final = run / "checkpoints" / f"step-{STEPS:08d}"
    found = hashlib.sha256()
    for path in sorted(final.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ the table


def rows(folder: Path) -> dict[str, str]:
    """Return the hash of each run's final checkpoint."""
    chance, found = random.Random(0), {}
    for size in (1, 2, 4, 8):
        run = folder / str(size)
        to_the_end(run, size)
        found[f"{size} process{'es' * (size > 1)}"] = fingerprint(run)
        print(f"{size} done", flush=True)
    run = folder / "moved"
    killed_at(run, 4, STEPS // 4, chance)
    killed_at(run, 1, STEPS // 2, chance)
    to_the_end(run, 2)
    found["4 processes, `kill -9`, 1 process, `kill -9`, 2 processes"] = fingerprint(run)
    if reason := why_not():
        found["2 hosts, of which one dies"] = f"not measured: {reason}"
    else:
        on_two_hosts(folder / "hosts")
        found["2 hosts, one of which loses power and network; the other continues alone"] = fingerprint(
            folder / "hosts"
        )
    return found


def main() -> None:
    """Train all runs, print the table, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the table")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        train(options.child)
        return
    from benchmarks.measure import machine

    with tempfile.TemporaryDirectory() as folder:
        found = rows(Path(folder))
    lines = "\n".join(f"| {name} | `{value}` |" for name, value in found.items())
    same = len({value for value in found.values() if not value.startswith("not")}) == 1
    text = (
        f"# One run on any number of processes\n\n{STEPS} steps of {BATCH} samples in {REPLICAS} replicas: BatchNorm, "
        "dropout, weights that only some replicas use, clipping,\nEMA, a last batch of three samples. "
        f"gloo, one thread per process; {machine()};\nmade by `python -m benchmarks.exactness.elastic`.\n\n"
        f"| on | SHA-256 of the final checkpoint's files |\n| --- | --- |\n{lines}\n\n"
        f"{'All are equal.' if same else 'They differ.'}\n"
    )
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
