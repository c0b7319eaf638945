"""Compare the counts with the formulas."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.scale import measure as measured
from benchmarks.scale.count import Wire, simulate_rings, simulate_tree
from benchmarks.scale.model import Phase, evaluation_bytes, hierarchical, leaving, messages, ring, sent, tree
from torchrelay.distributed.replicas import add_neighbors

SIMULATED = range(1, 65)
FRAME = 48  # bytes of gloo's header before each message, and of each of up to two notices that go with it


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def mega(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def milli(time: float) -> str:
    return f"{1e3 * time:,.2f}"


class Counts:
    """Compares counts with formulas."""

    def __init__(self) -> None:
        self.compared = 0
        self.wrong: list[str] = []

    def same(self, what: str, counted: object, said: object) -> None:
        self.compared += 1
        if counted != said:
            self.wrong.append(f"{what}: counted {counted}, by formula {said}")


def simulation(counts: Counts) -> str:
    """Compare formulas with simulations of all sizes; return a table of some of them."""
    rows = []
    for size in SIMULATED:
        values = torch.randn(size, 1003, generator=torch.Generator().manual_seed(size))
        expected = add_neighbors(values.clone().unbind())
        shapes = [(size,), *((1 << k, size >> k) for k in range(1, 6) if size % (1 << k) == 0 and 1 << k < size)]
        bits = True
        for levels in shapes:
            for backend in ("nccl", "gloo"):
                wire, totals = simulate_tree(values, levels, backend)
                bits &= all(torch.equal(total[: values.shape[1]], expected) for total in totals)
                said = tree(values.shape[1], levels, levels[0], backend)
                compare(counts, f"tree {levels}, {backend}", wire, said, levels[0])
        wire, _ = simulate_rings(values, (size,))
        compare(counts, f"ring of {size}", wire, ring(values.shape[1], size, size), size)
        if len(shapes) > 1:
            wire, _ = simulate_rings(values, shapes[-1])
            compare(
                counts, f"hierarchical {shapes[-1]}", wire, hierarchical(values.shape[1], *shapes[-1]), shapes[-1][0]
            )
        counts.same(f"the bits of {size}", bits, True)
        if size & (size - 1) == 0:
            ways = [f"{a} x {b}" for a, b in shapes[1:]]
            rows.append([size, ", ".join(ways) or "-", messages(tree(1003, (size,), size)), "equal"])
    return table(["processes", "two levels: on a host x hosts", "messages per process, flat", "bits"], rows)


def compare(counts: Counts, what: str, wire: Wire, phases: list[Phase], on_host: int) -> None:
    """Compare the messages and bytes of every simulated process, and the bytes that left a host."""
    for rank in range(wire.size):
        counts.same(f"{what}, messages of {rank}", sum(wire.messages[rank].values()), messages(phases))
        counts.same(f"{what}, bytes of {rank}", sum(wire.bytes[rank].values()), sent(phases))
    counts.same(f"{what}, leaving", wire.leaving(on_host), leaving(phases))


def links_table(counts: Counts, found: dict[int, list[Any]]) -> str:
    """Compare the kernel's count of every link with the simulation; return a table by algorithm."""
    rows = []
    for size, processes in found.items():
        for name in [name for name, value in processes[0].items() if isinstance(value, dict) and name != "all_reduce"]:
            levels = (size,) if name == "flat" else tuple(int(part) for part in name.split(" x "))
            wire, _ = simulate_tree(torch.zeros(size, measured.ELEMENTS), levels, "gloo")
            said = tree(measured.ELEMENTS, levels, levels[0], "gloo")
            links, frames = measured.links_of(processes, name), 0
            for (source, target), carried in links.items():
                extra = carried - wire.bytes[source][target]
                frames += extra // FRAME
                counts.same(f"{size} processes, {name}, {source} to {target}: bytes beside frames", extra % FRAME, 0)
            told = size * messages(said)  # gloo sends one or two notices with each
            if size > 1:
                counts.same(f"{size} processes, {name}: messages", 2 * told <= frames <= 3 * told, True)
            took, stock = (processes[0][which]["seconds"] for which in (name, "all_reduce"))
            rows.append(
                [
                    size,
                    name,
                    len(links),
                    f"{sent(said):,}",
                    f"{(sum(links.values()) - FRAME * frames) // size:,}",
                    f"{told:,}",
                    f"{frames / 3:,.0f}",
                    f"{milli(took)} ({milli(stock)})",
                ]
            )
    heads = ["processes", "algorithm", "links in use", "bytes per process, formula", "kernel"]
    return table([*heads, "gloo's messages, formula", "kernel's frames / 3", "ms (all_reduce)"], rows)


def steps_table(counts: Counts, found: dict[int, list[Any]]) -> str:
    """Compare the bytes of whole training steps and evaluations with the formulas for their largest part."""
    rows = []
    for size, processes in found.items():
        first, *_ = processes
        gradients = sent(tree(first["parameters"], (size,), size)) if size > 1 else 0
        most = max(one["step"] for one in processes)
        said = evaluation_bytes(measured.BATCHES, size, measured.BATCH, measured.CLASSES) if size > 1 else 0
        if size > 1:
            counts.same(f"{size} processes, a step: within 1%", gradients <= most <= 1.01 * gradients, True)
            counts.same(f"{size} processes, an evaluation: at least", first["evaluation"] >= said, True)
        rows.append(
            [size, f"{gradients:,}", f"{most:,}", f"{most - gradients:,}", f"{said:,}", f"{first['evaluation']:,}"]
        )
    heads = ["processes", "gradients, formula", "a step, kernel (the largest of all processes)", "the rest"]
    return table([*heads, "evaluation into rank 0, formula", "kernel"], rows)


def meeting_table(found: dict[int, list[Any]], lazily: dict[int, list[Any]]) -> str:
    """Return the cost of the rendezvous: PyTorch's eager connections, and gloo's lazy ones."""
    rows = []
    for size, processes in found.items():
        each = []
        for last in (processes[-1], lazily[size][-1]):
            each += [last["sockets"], f"{last['store']:,}"]
        longest = max(one["seconds"] for one in processes)
        rows.append([size, *each[:1], 4 * (size - 1) + 1, *each[1:2], f"{longest:.2f}", *each[2:]])
    heads = ["processes", "connections per process", "4 (W - 1) + 1", "bytes to and from the store", "seconds"]
    shape = np.polyfit(list(found), [processes[-1]["store"] for processes in found.values()], 2)
    further = [f"{mega(float(np.polyval(shape, size)))} MB at {size:,}" for size in (256, 1024, 4096, 16_384)]
    parabola = f"Extrapolated by a parabola through these points, per process: {', '.join(further)} processes."
    return f"{table([*heads, 'lazy: connections', 'lazy: bytes'], rows)}\n\n{parabola}"
