"""A training step on a GPU: how busy it keeps the device, its overhead, and the cost of exactness.

    python -m benchmarks.speed.gpu [--quick] [--out FILE]
    python -m benchmarks.speed.gpu --root FOLDER [--airbench FILE] [--speedrun FILE] [--reference] [--out FILE]

The second command also measures the times to an accuracy: see `benchmarks/speed/records.py`.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import torchrelay as tr
from benchmarks import page
from benchmarks.measure import side_by_side
from benchmarks.page import NOT_MEASURED, Goal, Spread, Table
from benchmarks.speed import peers, records
from torchrelay.data import batches as batches_module
from torchrelay.data.augment import Flip, PaddedCrop
from torchrelay.data.batch import Batch
from torchrelay.device.device import DeviceSettings
from torchrelay.models.small import resnet18_small
from torchrelay.run.terminal import Terminal

TITLE = "A training step on a GPU"
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of GPU work in a trace


@dataclass(frozen=True)
class Size:
    """How many steps and rounds are measured."""

    batch: int = 512
    images: int = 98 * 512  # about CIFAR-10's size, in full batches
    warm: int = 20  # warm-up steps
    steps: int = 100  # timed steps
    traced: int = 20  # traced steps
    tiny: int = 1000  # steps of the tiny model
    rounds: int = 5


FULL, QUICK = Size(), Size(steps=20, traced=5, tiny=200, rounds=1)


def settle(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def photographs(device: str, size: Size, *, exact: bool = True, graph: bool = False, **how: Any) -> tr.Trainer:
    """Return a trainer of ResNet-18 on random images of 32x32."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size.images, 3, 32, 32), dtype=torch.uint8, generator=random)
    placing = {"name": device, "precision": "bf16", "channels_last": True, "graph": graph and device == "cuda"}
    usual: dict[str, Any] = {"settings": tr.RunSettings(exact=exact, epochs=1000), "terminal": Terminal(quiet=True)}
    return tr.Trainer(
        resnet18_small(10),
        (images, torch.arange(size.images) % 10),
        augment=[Flip(), PaddedCrop(padding=4)],
        batch_size=size.batch,
        device=DeviceSettings.model_validate(placing),
        optimizer=tr.optim.SGD(lr=0.1, momentum=0.9),
        **usual | how,
    )


# ------------------------------------------------------------------------------------------------ how busy it is


def together(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of spans; time in which several streams work counts once."""
    covered, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered


def spans_of(trace: Path, kinds: Sequence[str]) -> list[tuple[float, float]]:
    """Return the start and end of each event of these kinds in a trace, in microseconds."""
    events = json.loads(trace.read_text())["traceEvents"]
    return [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e.get("cat") in kinds]


class Busy(tr.Callback):
    """Measures the wall-clock time of some steps, then profiles how long the device is busy in further steps.

    Args:
        device: the device; on the CPU, operations stand in for kernels.
        size: the numbers of steps.
    """

    def __init__(self, device: str, size: Size) -> None:
        self._device, self._size = device, size
        on_gpu = device == "cuda"
        self._kinds = KERNELS if on_gpu else ("cpu_op",)
        self._activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        # The profiler must be attached before a CUDA graph is captured, and stay attached, to see the graph's kernels.
        os.environ.update(TEARDOWN_CUPTI="0", DISABLE_CUPTI_LAZY_REINIT="1")
        with profile(activities=[self._activity]):
            settle(device)
        self.wall = self.device = 0.0  # seconds per step

    def on_step(self, trainer: Any, batch: Batch, loss: Tensor) -> None:  # noqa: ARG002
        size, done = self._size, trainer.step - self._size.warm
        if done == 0:
            settle(self._device)
            self._began = time.perf_counter()
        elif done == size.steps:
            settle(self._device)
            self.wall = (time.perf_counter() - self._began) / size.steps
            self._profile = profile(activities=[self._activity])
            self._profile.start()
        elif done == size.steps + size.traced:
            settle(self._device)
            self._profile.stop()
            with tempfile.TemporaryDirectory() as folder:
                self._profile.export_chrome_trace(f"{folder}/trace.json")
                self.device = together(spans_of(Path(folder) / "trace.json", self._kinds)) / 1e6 / size.traced

    @property
    def share(self) -> float:
        """The share of the wall-clock time in which the device was busy."""
        return self.device / self.wall


@contextmanager
def in_host_memory() -> Iterator[None]:
    """Keep arrays in the host's memory, as if they were too large for the device."""
    before, batches_module._ON_DEVICE = batches_module._ON_DEVICE, 0
    yield
    batches_module._ON_DEVICE = before


def busy(device: str, size: Size, *, graph: bool = False, host: bool = False, beside: bool = True) -> Busy:
    """Return how busy a run keeps the device."""
    watch = Busy(device, size)
    settings = tr.RunSettings(max_steps=size.warm + size.steps + size.traced, epochs=1000)
    with in_host_memory() if host else tempfile.TemporaryDirectory():
        made = photographs(device, size, graph=graph, callbacks=[watch], settings=settings)
    if not beside:
        made.batches._stream = None
    made.fit()
    return watch


CASES: dict[str, dict[str, bool]] = {
    "arrays on the device": {},
    "arrays on the device, all on one stream": {"beside": False},
    "arrays in host memory": {"host": True},
    "arrays in host memory, all on one stream": {"host": True, "beside": False},
    "arrays on the device, each step one CUDA graph": {"graph": True},
}
BUSY = """\
`resnet18-small` on random images of 32x32, flipped and cropped, batches of {batch}, bf16, channels last, exact; the
loop of `fit()` with its metrics. The wall-clock time covers {steps} steps without the profiler, between two device
synchronizations. The GPU time covers {traced} further steps: the union of all kernels and copies in the profiler's
trace, so overlapping work of two streams counts once. "All on one stream": the next batch is prepared on the stream of
the step."""


def busy_table(device: str, size: Size) -> Table:
    """Return the table of how busy the GPU is; without a device, its figures are not measured."""
    rows: list[Sequence[str | Spread]] = [(name, NOT_MEASURED, "", "") for name in CASES]
    share = None
    if device:
        found = {name: busy(device, size, **how) for name, how in CASES.items()}
        share = next(iter(found.values())).share
        rows = [(n, f"{1e3 * b.wall:.2f}", f"{1e3 * b.device:.2f}", f"{b.share:.1%}") for n, b in found.items()]
    goal = Goal("GPU time of a step, relative to its wall-clock time", share, 0.97, 0.99, "{:.1%}", more=True)
    heads = ("", "ms per step", "GPU ms per step", "share")
    note = BUSY.format(batch=size.batch, steps=size.steps, traced=size.traced)
    return Table("How busy the GPU is", heads, rows, note, [goal])


# ------------------------------------------------------------------------------------------------ overhead


def tiny_loops(device: str) -> dict[str, peers.Loop]:
    """Return the training loops of the tiny model, the hand-written one first."""
    loops: dict[str, peers.Loop] = {
        "by hand": peers.by_hand,
        "torchrelay, all off": partial(peers.prepared, device=device),
    }
    if importlib.util.find_spec("ignite"):
        loops["pytorch-ignite"] = peers.ignite
    loops["torchrelay, all off, one graph"] = partial(peers.prepared, device=graph_on(device))
    loops[GRAPH] = partial(in_one_graph, device)
    return loops


def graph_on(device: str) -> DeviceSettings:
    return DeviceSettings(name=device, graph=device == "cuda")


def in_one_graph(device: str, pairs: peers.Pairs, **how: Any) -> peers.Clock:
    """Train with metrics and a per-step schedule, each step one CUDA graph."""
    on: dict[str, Any] = {"task": tr.Classification(), "schedule": tr.optim.Cosine()}
    return peers.prepared(pairs, device=graph_on(device), **on, **how)


GRAPH = "torchrelay, metrics and a schedule, one graph"
TINY = """\
The tiny model of `overhead` on the GPU, with batches of 32 in its memory; torchrelay's loops are exact. us per step:
{steps:,} steps between two device synchronizations, after {warm} warm-up steps; medians of {rounds} rounds, in which
the loops take turns. "One graph": a CUDA graph replays forward, backward, optimizer and metrics; the learning rate is
written between replays. The time of its kernels is the union of kernels and copies in the profiler's trace."""


def tiny_times(device: str, size: Size) -> tuple[dict[str, Spread], float]:
    """Return each loop's microseconds per step, and those of the kernels of a step that is one graph."""
    pairs = [(inputs.to(device), targets.to(device)) for inputs, targets in peers.made(size.tiny)]
    loops = tiny_loops(device)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(size.rounds + 1):
        for name, loop in loops.items():
            torch.use_deterministic_algorithms(False)  # an exact run sets it; a hand-written loop doesn't
            gc.collect()
            mean = loop(pairs).mean()
            if number:  # the first round is a warm-up
                times[name].append(1e6 * mean)
    watch = Busy(device, replace(size, warm=min(size.warm, peers.WARM)))
    in_one_graph(device, pairs, callbacks=[watch])
    return {name: Spread(tuple(values)) for name, values in times.items()}, 1e6 * watch.device


def tiny_table(device: str, size: Size) -> Table:
    """Return the overhead of the tiny model's step; without a device, it is not measured."""
    ignite, kernels = "pytorch-ignite", "kernels of that graph"
    added: float | None = None
    of_hand, of_kernels = added, added
    rows: list[Sequence[str | Spread]] = [(name, NOT_MEASURED, "", "") for name in (*tiny_loops("cpu"), kernels)]
    if device:
        found, own = tiny_times(device, size)
        hand = found["by hand"]

        def over(name: str) -> Spread:
            return Spread(tuple(a - b for a, b in zip(found[name].values, hand.values, strict=True)))

        rows = [(name, us, over(name), f"{us.median / hand.median:.2f}") for name, us in found.items()]
        rows += [(kernels, f"{own:.1f}", "", f"{own / hand.median:.2f}")]
        of_hand, of_kernels = found[GRAPH].median / hand.median, found[GRAPH].median / own if own else None
        if ignite in found:
            added = over("torchrelay, all off").median - over(ignite).median
            rows = [(f"{r[0]} ({importlib.metadata.version(ignite)})", *r[1:]) if r[0] == ignite else r for r in rows]
    if not importlib.util.find_spec("ignite"):
        rows.append((ignite, "not installed", "", ""))
    goals = [
        Goal("eager: overhead of a step, minus that of Ignite", added, 0, None, "{:+.1f} us"),
        Goal("one graph: step, relative to the hand-written loop", of_hand, 0.2, None, "{:.2f} times"),
        Goal("one graph: step, relative to its kernels", of_kernels, None, 1, "{:.2f} times"),
    ]
    note = TINY.format(steps=size.tiny, warm=peers.WARM, rounds=size.rounds)
    return Table(
        "The overhead of a step on a GPU",
        ("", "us per step", "overhead", "relative to the hand-written loop"),
        rows,
        note,
        goals,
    )


# ------------------------------------------------------------------------------------------------ exactness


def steps(device: str, size: Size, exact: bool) -> Callable[[], None]:
    """Return a function that takes some steps, exact or not; all else is equal."""
    made = photographs(device, size, exact=exact)
    made.model.train()

    def run() -> None:
        torch.use_deterministic_algorithms(exact)
        for step, batch in enumerate(islice(made.batches.epoch(0), size.steps)):
            made.train_step.step(batch, step)
        settle(device)

    return run


def exactness_table(device: str, size: Size) -> Table:
    """Return the cost of exactness on the GPU; without a device, it is not measured."""
    rows: list[Sequence[str | Spread]] = [("cuda, bf16", NOT_MEASURED, "", "")]
    cost = None
    count = min(size.steps, size.images // size.batch)  # of an epoch
    if device:
        size = replace(size, steps=count)
        times = side_by_side({str(exact): steps(device, size, exact) for exact in (True, False)}, size.rounds)
        exact, without = (Spread(tuple(1e3 * t / count for t in times[str(on)]), 2) for on in (True, False))
        cost = exact.median / without.median - 1
        rows = [(f"{device}, bf16", exact, without, f"{cost:+.1%}")]
    note = (
        f"`resnet18-small` on images of 32x32, flipped and cropped, batches of {size.batch}, bf16, channels last, "
        f"`run.exact` on and off; ms per step, medians of {size.rounds} rounds of {count} steps, in turns."
    )
    goal = Goal("exact step, relative to one that isn't exact", cost, 0.1, 0.03, "{:+.1%}")
    return Table("The cost of exactness on a GPU", ("", "exact", "not exact", "cost"), rows, note, [goal])


# ------------------------------------------------------------------------------------------------ the program

# Exact training comes first, as cuBLAS requires; profiling comes last, since the profiler stays attached.
TABLES = (exactness_table, tiny_table, busy_table)


def tables(quick: bool = False) -> list[Table]:
    """Return all tables; without a GPU, their figures are not measured."""
    device = "cuda" if torch.cuda.is_available() else ""
    return [table(device, QUICK if quick else FULL) for table in TABLES]


def tried(table: Callable[[], Table]) -> Table:
    """Return a table, or one that names the error, so that a failure doesn't lose the other tables."""
    try:
        return table()
    except Exception as error:  # noqa: BLE001 - the table reports any error
        name = getattr(table, "func", table).__name__
        return Table(f"Failed: {name}", ("", ""), [(type(error).__name__, " ".join(str(error).split()))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: only to check that it runs")
    parser.add_argument("--out", type=Path, help="where to write the tables")
    records.add_arguments(parser)
    options = parser.parse_args()
    device, size = "cuda" if torch.cuda.is_available() else "", QUICK if options.quick else FULL
    before = f"# On a GPU\n\n{page.circumstances()}\nMade by `python -m benchmarks.speed.gpu`."
    before += f"\n\n{page.QUICK}" if options.quick else ""
    found: list[Table] = []
    parts: list[Callable[[], Table]] = [partial(make, device, size) for make in TABLES]
    for table in (*parts, *records.parts(options)):
        found.append(tried(table))
        text = f"{before}\n\n{page.sections(found, 2)}\n"
        print(page.sections(found[-1:], 2), flush=True)
        if options.out is not None:  # after each table, since the machine may go away
            options.out.write_text(text)


if __name__ == "__main__":
    main()
