"""Measure how long `cifar10-fast` takes to reach the reference's 88.44%, compared with the reference on this machine.

    python -m benchmarks.speed.accuracy --root FOLDER [--seeds 5] [--out docs/evidence/accuracy.md]

FOLDER has train/CLASS/*.jpeg and test/CLASS/*.jpeg. Each seed is a separate `torchrelay train` with its own cache,
timed from the start of the process to its end: imports, decoding, training, evaluation and checkpoint. The reference is
the tutorial's training step, ResNet-18 on images of 112x112 in float32, written by hand. Its 30 epochs are 1.5 million
images and take hours, so its time is computed from its rate. The rate is measured before and after each seed, and the
seed is compared with the mean of both, since a machine's speed may change from one minute to the next.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, stdev

import torch
import torchvision
from torch import nn

from benchmarks.measure import machine
from torchrelay.run.metrics import read_metrics

IMAGES, ACCURACY = 1_500_000, 88.44  # of the reference: images in 30 epochs, and the accuracy they reach
BATCH, STEPS = 256, 3
RUN = "cifar10-fast"  # the name of the run folder, which its plots show


def reference_rate() -> float:
    """Return the images per second of the reference's training step."""
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.05)
    images, labels = torch.randn(BATCH, 3, 112, 112), torch.arange(BATCH) % 10
    times = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return BATCH / median(times[1:])  # the first step allocates the memory


def fast(root: Path, seed: int, folder: Path, **more: object) -> tuple[float, float]:
    """Train with one seed; return the seconds from start to end and the test accuracy in percent.

    Args:
        root: folder of the photographs.
        seed: seed of the run.
        folder: where the run folder, named `RUN`, and the cache go.
        more: other settings of the section "run".
    """
    settings = ["data.name=image-folder", f"data.root={root}", f"data.cache_dir={folder / 'cache'}", f"run.seed={seed}"]
    settings += [f"run.{name}={value}" for name, value in more.items()]
    options = [part for setting in settings for part in ("--set", setting)]
    run = folder / RUN
    command = [sys.executable, "-m", "torchrelay", "train", "cifar10-fast", *options, "--run", str(run), "--quiet"]
    began = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ)
    seconds = time.perf_counter() - began
    return seconds, 100 * [line["accuracy"] for line in read_metrics(run) if line["split"] == "test"][-1]


def main() -> None:
    """Measure, print the table, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the photographs, as an image folder")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the table")
    options = parser.parse_args()
    rates, runs, text = [reference_rate()], [], ""
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(fast(options.root.resolve(), seed, Path(folder)))
        print(f"seed {seed}: {runs[-1][1]:.2f}% after {runs[-1][0]:.0f} s", flush=True)
        rates.append(reference_rate())
        text = table(rates, runs)
        if options.out is not None:  # after each seed, since all of them take long
            options.out.write_text(text)
    print(text)


def table(rates: list[float], runs: list[tuple[float, float]]) -> str:
    """Return the page: the table of all seeds and the summary."""
    seconds, reached = [run[0] for run in runs], [run[1] for run in runs]
    whole = [IMAGES / mean(rates[seed : seed + 2]) for seed in range(len(runs))]
    times = [whole / seconds for whole, (seconds, _) in zip(whole, runs, strict=True)]
    rows = "\n".join(
        f"| {seed} | {s:.0f} | {a:.2f}% | {whole[seed]:,.0f} | {times[seed]:.0f} |" for seed, (s, a) in enumerate(runs)
    )
    spread = f" ± {stdev(reached):.2f}" if len(reached) > 1 else ""
    met = "reaches" if mean(reached) >= ACCURACY else "doesn't reach"
    return (
        f"# The reference's accuracy\n\n{machine()}; made by `python -m benchmarks.speed.accuracy --root FOLDER`.\n\n"
        f"The reference's training step: {median(rates):.1f} images per second "
        f"({min(rates):.1f} to {max(rates):.1f}); its 1.5 million images: {median(whole) / 3600:.1f} hours.\n\n"
        "`torchrelay train cifar10-fast`, from the start of the process to its end:\n\n"
        "| seed | seconds | test accuracy | the reference's seconds | speedup |\n"
        f"| ---: | ---: | ---: | ---: | ---: |\n{rows}\n"
        f"| **median; mean of the accuracies** | **{median(seconds):.0f}** | **{mean(reached):.2f}%{spread}** "
        f"| **{median(whole):,.0f}** | **{median(times):.0f}** |\n\n"
        f"The mean accuracy {met} {ACCURACY}%, **{median(times):.0f} times** as fast as the reference at its rate "
        "before and after each seed. On a GPU: not measured.\n"
    )


if __name__ == "__main__":
    main()
