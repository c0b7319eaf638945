"""Measure what real processes send, by the kernel's count, and the work of one process for many devices."""

import os
import time
from collections.abc import Callable
from functools import partial
from math import fsum
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import torchrelay as tr
from benchmarks.scale.count import Link, Ports, by_link, connections, since
from torchrelay import checkpoint
from torchrelay.checkpoint.writer import stage
from torchrelay.data.order import order
from torchrelay.distributed.all_reduce import Levels, all_reduce, host_levels
from torchrelay.distributed.process_group import DistributedGroup, ProcessGroup, init_process_group
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.run.terminal import Terminal
from torchrelay.train.progress import RunningSums

ELEMENTS = 2**20 + 4  # float32, not a multiple of 8
BATCH, CLASSES, BATCHES, STEPS = 64, 10, 6, 6  # of the run that is measured


def collectives(rank: int) -> dict[str, Any]:
    """Return what each all-reduce algorithm sends over the connections of this process."""
    torch.set_num_threads(1)
    group = init_process_group(torch.device("cpu"))
    found: dict[str, Any] = {"sockets": len(connections())}
    if not isinstance(group, DistributedGroup):
        return found
    values = torch.full((ELEMENTS,), float(rank))
    flat = torch.nn.functional.pad(values, (0, -ELEMENTS % group.size))
    for on_host in [group.size, *(1 << k for k in range(1, 3) if 1 << k < group.size)]:
        before = set(connections())
        groups = host_levels(group, on_host) if on_host < group.size else [(group.new_group(), group.size)]
        own = set(connections()) - before
        name = f"{on_host} x {group.size // on_host}" if on_host < group.size else "flat"
        found[name] = _measured(group, partial(_add, flat, groups), own)
        if on_host == group.size:
            found["all_reduce"] = _measured(group, partial(_all_reduce, flat, groups), own)
    found["agree"] = _times(group, lambda: _agreed(group), 50)
    found["gather"] = _times(group, lambda: group.gather(torch.zeros(1)), 50)
    return found


def _add(flat: Tensor, groups: Levels) -> None:
    all_reduce(flat.clone(), groups)


def _all_reduce(flat: Tensor, groups: Levels) -> None:
    dist.all_reduce(flat.clone(), group=groups[0][0])


def _agreed(group: ProcessGroup) -> None:
    group.agree(0)


def _measured(group: ProcessGroup, collective: Callable[[], object], own: set[Ports]) -> dict[str, Any]:
    """Return the bytes of one collective on its connections, and the median of its seconds."""
    collective()  # warm
    group.barrier("a look")
    before = connections()
    collective()
    group.barrier("a look")
    carried = [[*ports, *counts] for ports, counts in since(before, own).items()]
    return {"carried": carried, "seconds": _times(group, collective, 5)}


def _times(group: ProcessGroup, work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        group.barrier("the others")
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def _of_store(found: dict[Ports, tuple[int, int]]) -> int:
    """Return the bytes to and from the store, which listens on a known port."""
    port = int(os.environ["MASTER_PORT"])
    return sum(sent + received for (_, there), (sent, received) in found.items() if there == port)


class Carried(tr.Callback):
    """Counts what this process has sent, after each step."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def on_step(self, trainer: Any, batch: Any, loss: Tensor) -> None:  # noqa: ARG002 - a callback's
        trainer.strategy.group.barrier("a look")
        self.at.append(_totals()[0])


def _totals() -> tuple[int, int]:
    found = connections().values()
    return sum(sent for sent, _ in found), sum(received for _, received in found)


def training(rank: int) -> dict[str, Any]:  # noqa: ARG001 - every rank does the same
    """Return what a whole training step and an evaluation send from this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.ReLU())
    model.append(nn.Linear(1024, CLASSES))
    samples = BATCH * BATCHES
    data = (torch.randn(samples, 256), torch.arange(samples) % CLASSES)
    carried = Carried()
    trainer = tr.Trainer(
        model,
        data,
        data,
        epochs=1,
        batch_size=BATCH,
        normalize=False,
        parallel=ParallelSettings(kind="ddp", replicas=8),
        callbacks=[carried],
        terminal=Terminal(quiet=True),
    )
    trainer.fit()
    trainer.strategy.group.barrier("a look")
    _, before = _totals()
    trainer.evaluate()
    trainer.strategy.group.barrier("a look")
    each = [after - earlier for earlier, after in zip(carried.at, carried.at[1:], strict=False)]
    return {
        "step": median(each),
        "evaluation": _totals()[1] - before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "buffers": sum(b.nbytes for b in model.buffers()),
    }


def meeting(rank: int) -> dict[str, Any]:  # noqa: ARG001 - every rank does the same
    """Return what the rendezvous costs this process."""
    began = time.perf_counter()
    group = init_process_group(torch.device("cpu"))
    found = {"seconds": time.perf_counter() - began}
    found |= {"sockets": len(connections()), "store": _of_store(connections())}
    group.barrier("a look")  # rank 0 holds the store, and must not leave before the others
    return found


def links_of(found: list[Any], name: str) -> dict[Link, int]:
    """Return the bytes that each process sent to each other one in an algorithm."""
    return by_link([{(here, there): (s, r) for here, there, s, r in one[name]["carried"]} for one in found])


# -------------------------------------------------------------------------------- the work of one process


class Many(ProcessGroup):
    """Stands for very many processes that all report the same values."""

    def gather(self, values: Tensor) -> Tensor:
        """Return the values, repeated for every process."""
        return values.expand(self.size, *values.shape)


def _seconds(work: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def order_seconds(samples: int) -> float:
    """Return how long it takes to compute the sample indices of a batch out of a billion samples."""
    places = np.arange(10**8, 10**8 + samples)
    return _seconds(lambda: order(0, 1, places, 10**9))


def weights_seconds(replicas: int) -> float:
    """Return how long it takes to add the replicas' weights once they are gathered."""
    gathered = torch.full((replicas, 1), 32.0, dtype=torch.float64)
    return _seconds(lambda: fsum(gathered.flatten().tolist()))


def measures_seconds(replicas: int, steps: int) -> float:
    """Return how long it takes to add all replicas' measures of several steps."""

    def work() -> None:
        sums = RunningSums(Many(0, replicas, torch.device("cpu")))
        for _ in range(steps):
            sums.add_measures({"accuracy": torch.ones(())}, 32)
        sums.read()

    return _seconds(work, 3)


def copying_and_writing(megabytes: int, folder: Path) -> tuple[float, float]:
    """Return bytes per second of the copy, during which training waits, and of writing in the background."""
    tensors = {f"{i}": torch.randn(2**18) for i in range(megabytes)}
    contents = checkpoint.Contents(1, tensors, {"step": 1})
    size = 2**20 * megabytes
    memory: dict[str, Tensor] = {}
    stage(contents, memory)
    copying = _seconds(lambda: stage(contents, memory))
    return size / copying, size / _seconds(lambda: checkpoint.write(folder, contents), 3)
