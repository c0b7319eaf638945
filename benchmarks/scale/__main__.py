"""What grows with the number of devices: formulas for 1 to 16,384, checked by a simulation and by the kernel's counts.

    python -m benchmarks.scale [--out docs/evidence/scale-tables.md] [--picture docs/pictures/scale.png]

1. The formulas of benchmarks/scale/model.py, as tables. Their times are extrapolated from the link speeds they name.
2. A simulation that runs the all-reduce code for 1 to 64 processes, and counts each message.
3. 1, 2, 4 and 8 real processes over gloo; the Linux kernel counts the bytes of their connections.
4. The work of a single process.

It fails if a count differs from its formula.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine
from benchmarks.scale import measure as measured
from benchmarks.scale.check import (
    SIMULATED,
    Counts,
    links_table,
    meeting_table,
    mega,
    milli,
    simulation,
    steps_table,
    table,
)
from benchmarks.scale.count import fork
from benchmarks.scale.model import (
    FAST,
    SLOW,
    Links,
    evaluation_bytes,
    evaluation_rounds,
    forms,
    leaving,
    messages,
    saved_bytes,
    seconds,
    sent,
    three,
)

SIZES = [4**k for k in range(8)]  # devices: 1 to 16,384
ON_HOST = 8
BUCKET = 25 * 2**20 // 4  # float32 elements in a gradient bucket
REAL, MEETING = (1, 2, 4, 8), (2, 4, 8, 16)
PER_DEVICE = 32  # samples


# ------------------------------------------------------------------------------------------------ formulas


def bytes_table() -> str:
    """Return the bytes that a process and a host send for a bucket."""
    rows = []
    for size in SIZES:
        found = dict(forms(BUCKET, size, ON_HOST))
        (own,) = {mega(sent(found[name])) for name in found}  # the same for all
        rows.append([f"{size:,}", own, *(mega(leaving(found[name])) for name in found)])
    heads = ["devices", "a device sends, in any form"]
    return table([*heads, *(f"leaves a host: {name}" for name in ("flat", "two levels", "ring", "hierarchical"))], rows)


def messages_table() -> str:
    """Return how many messages a process sends for a bucket, and the smallest size."""
    rows = []
    for size in SIZES:
        found = dict(forms(BUCKET, size, ON_HOST)) | {"three": three(BUCKET, size, ON_HOST)}
        counts = [f"{messages(found[name]):,}" for name in ("flat", "two levels", "three", "ring", "hierarchical")]
        rows.append([f"{size:,}", *counts, f"{4 * BUCKET / size / 1e3:,.1f}" if size > 1 else ""])
    return table(
        ["devices", "flat", "two levels", "three levels", "ring", "hierarchical", "the smallest of them, kB"], rows
    )


def times_table(links: Links) -> str:
    """Return the extrapolated time of a bucket."""
    rows = []
    for size in SIZES:
        found = dict(forms(BUCKET, size, ON_HOST)) | {"three": three(BUCKET, size, ON_HOST)}
        times = [milli(seconds(found[name], links)) for name in ("flat", "two levels", "three", "ring", "hierarchical")]
        rows.append([f"{size:,}", *times])
    return table(["devices", "flat", "two levels", "three levels", "ring", "hierarchical"], rows)


def assumed(links: Links) -> str:
    """Return the assumptions about the links, in words."""
    return (
        f"Assumed: {ON_HOST} devices per host; a device sends {links.inside / 1e9:g} GB/s inside its host; "
        f"a host sends {links.between / 1e9:g} GB/s to others over all its network cards;\na message takes "
        f"{1e6 * links.latency_inside:g} us inside and {1e6 * links.latency_between:g} us between hosts to arrive; "
        f"the next one may start {1e6 * links.gap:g} us after it. The links carry nothing else."
    )


# ------------------------------------------------------------------------------------------------ what else grows


def own_work() -> str:
    """Return the times of the work in one process that grows with the number of processes."""
    rows = []
    for size in SIZES:
        batch = PER_DEVICE * size
        rows.append(
            [
                f"{size:,}",
                f"{batch:,}",
                milli(measured.order_seconds(batch)),
                milli(measured.order_seconds(PER_DEVICE)),
                milli(measured.weights_seconds(size)),
                milli(measured.measures_seconds(size, 8) / 8),
                f"{8 * 2 * size / 1e3:,.1f}",
            ]
        )
    heads = ["devices", "global batch", "ms: order of the whole batch", f"ms: of {PER_DEVICE} samples"]
    return table([*heads, "ms: replicas' weights", "ms: measures of a step", "kB: measures of a step"], rows)


def evaluations() -> str:
    """Return the rounds of two evaluations, and the bytes that rank 0 receives."""
    rows = []
    for size in SIZES:
        row: list[object] = [f"{size:,}"]
        for samples, classes in ((10_000, 10), (50_000, 1000)):
            batches = -(-samples // 256)
            received = evaluation_bytes(batches, size, 256, classes) if size > 1 else 0
            row += [evaluation_rounds(batches, size), mega(received)]
        rows.append(row)
    return table(
        [
            "devices",
            "10,000 x 10 classes: rounds",
            "MB into rank 0",
            "50,000 x 1,000 classes: rounds",
            "MB into rank 0",
        ],
        rows,
    )


def checkpoints() -> str:
    """Return sizes and times of checkpoints, on any number of devices."""
    with tempfile.TemporaryDirectory() as folder:
        copying, writing = measured.copying_and_writing(128, Path(folder))
    rows = []
    for name, parameters, states in (
        ("ResNet-18, SGD with momentum", 11_689_512, 1),
        ("ResNet-50, SGD with momentum", 25_557_032, 1),
        ("a billion parameters, AdamW", 10**9, 2),
        ("seven billion parameters, AdamW", 7 * 10**9, 2),
    ):
        size = saved_bytes(parameters, states)
        rows.append([name, mega(size), f"{size / copying:,.2f}", f"{size / writing:,.1f}", mega(size * 1024)])
    heads = ["what is trained", "MB", "s: copy, during which training waits", "s: writing in the background"]
    speeds = f"Copying at {copying / 1e9:.1f} GB/s, writing (with checksums, flushed) at {writing / 1e9:.2f} GB/s."
    return f"{speeds}\n\n{table([*heads, 'MB that 1,024 devices read at a resume'], rows)}"


def report(counts: Counts) -> str:
    """Return the page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real: dict[int, list[Any]] = {size: fork(size, measured.collectives, folder) for size in REAL}
        steps: dict[int, list[Any]] = {size: fork(size, measured.training, folder) for size in REAL}
        meetings: dict[int, list[Any]] = {size: fork(size, measured.meeting, folder) for size in MEETING}
        os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
        lazily: dict[int, list[Any]] = {size: fork(size, measured.meeting, folder) for size in MEETING}
        del os.environ["TORCH_GLOO_LAZY_INIT"]
    simulated, links, whole = simulation(counts), links_table(counts, real), steps_table(counts, steps)
    waits = table(
        ["processes", "ms: submitting the bit of agreement", "ms: gathering a number from all ranks"],
        [[size, milli(one["agree"]), milli(one["gather"])] for size, (one, *_) in real.items() if size > 1],
    )
    parts = {
        "By formula: MB of a bucket of 25 MiB": bytes_table(),
        "By formula: messages of a bucket": messages_table(),
        f"Extrapolated: ms of a bucket, links of {FAST.name}": f"{assumed(FAST)}\n\n{times_table(FAST)}",
        f"Extrapolated: ms of a bucket, links of {SLOW.name}": f"{assumed(SLOW)}\n\n{times_table(SLOW)}",
        "Counted in the simulation": f"{SIMULATED[0]} to {SIMULATED[-1]} processes, all algorithms, every "
        f"process; some of them:\n\n{simulated}",
        "Counted by the kernel: an exchange": f"A vector of {measured.ELEMENTS:,} numbers. All processes share this "
        f"machine: the times compare the algorithms, not the links.\n\n{links}",
        "Counted by the kernel: a training step, an evaluation": whole,
        "Measured: collectives that every process waits for": waits,
        "Measured: rendezvous": meeting_table(meetings, lazily),
        "Measured: the work of one process": own_work(),
        "By formula: evaluation in batches of 256": evaluations(),
        "Extrapolated: checkpoints, ddp": checkpoints(),
    }
    verdict = f"{counts.compared:,} counts were compared with formulas; {len(counts.wrong)} of them differ."
    made = f"{machine()}, gloo; made by `python -m benchmarks.scale`."
    head = f"# Scale: tables\n\n{made}\n{verdict}\n"
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in parts.items())


def main() -> None:
    """Print the tables, and fail if a count differs from its formula."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the tables")
    parser.add_argument("--picture", type=Path, help="where to save the picture of bytes and times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.picture is not None:
        from benchmarks.scale.picture import draw

        draw(options.picture)
    counts = Counts()
    text = report(counts)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    if counts.wrong:
        sys.exit("\n".join(counts.wrong[:20]))


if __name__ == "__main__":
    main()
