"""Kill a run again and again, resume it each time, and compare its files with those of an uninterrupted run.

    python -m benchmarks.exactness.kill [--root FOLDER] [--kills 200] [--epochs 6] [--out docs/evidence/kill.md]

The run reads an image folder (`--root`, such as CIFAR-10's photographs; without it, pictures of handwritten digits)
image by image in two worker processes, with a transform that draws from PyTorch, NumPy and Python. It also has batched
augmentation and mixup, dropout, BatchNorm, averaged weights, two replicas, and a checkpoint every 10 steps, written in
the background. SIGKILL hits it at a random moment: while it imports, resumes, trains, evaluates or saves.
"""

import argparse
import json
import os
import platform
import random
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

EVERY = 10  # steps between two checkpoints
IN_TRAINING = 0.75  # of the kills that wait for the first step
CLOCK = ("time", "seconds", "samples_per_second")  # fields of a metrics line that depend on the clock


# ------------------------------------------------------------------------------------------------ the run


def transform(image: Any) -> Tensor:
    """Return a picture with noise from all three global generators."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    brightness = random.uniform(0.8, 1.2)
    return (pixels * brightness + 0.02 * torch.randn(pixels.shape) + np.random.uniform(-0.05, 0.05)).clamp(0, 1)


def train(root: Path, run: Path, epochs: int) -> None:
    """Train, or resume what a killed process left."""
    import torchrelay as tr
    from torchrelay.checkpoint import CheckpointSettings
    from torchrelay.distributed.replicas import ParallelSettings
    from torchrelay.run.terminal import Terminal

    class Place(tr.Callback):
        """Leaves the number of steps done where whoever kills us finds it."""

        def __init__(self) -> None:
            self.file = os.open(run.with_suffix(".place"), os.O_RDWR | os.O_CREAT)

        def on_start(self, trainer: Any) -> None:
            os.pwrite(self.file, struct.pack("qq", trainer.step, os.getpid()), 0)

        def on_step(self, trainer: Any, batch: Any, loss: Tensor) -> None:  # noqa: ARG002
            os.pwrite(self.file, struct.pack("q", trainer.step), 0)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 16, 3, stride=2), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Dropout(0.1)),
        *(torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.BatchNorm2d(32), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(128, 10)),
    )
    training, test = tr.data.image_folder(root, transform=transform)
    assert isinstance(test, tr.data.DatasetSource)  # noqa: S101 - a folder with a transform is read one by one
    test = tr.data.dataset(
        Subset(test.dataset, range(0, len(test), 10)), test.classes
    )  # a kill is to meet all else, too
    trainer = tr.Trainer(
        network,
        training,
        test,
        run=run,
        epochs=epochs,
        batch_size=64,
        workers=2,
        ema=0.95,
        optimizer=tr.optim.SGD(lr=0.05, momentum=0.9),
        schedule=tr.optim.OneCycle(),
        augment=[tr.augment.Flip(), tr.augment.PaddedCrop(padding=1), tr.augment.Mixup(alpha=0.2)],
        parallel=ParallelSettings(replicas=2),
        settings=tr.RunSettings(log_every=7),
        callbacks=[Place()],
        checkpoint=CheckpointSettings(every=f"{EVERY} steps", keep=3),
        terminal=Terminal(quiet=True),
    )
    if (run / "recipe.toml").exists():
        trainer.resume()
    else:
        trainer.fit()


# ------------------------------------------------------------------------------------------------ the killing


@dataclass
class Deaths:
    """What happened at the kills."""

    kills: int = 0
    before_training: int = 0  # while it imported or resumed
    lost: list[int] = field(default_factory=list)  # steps since the last complete checkpoint
    resumed_at: set[int] = field(default_factory=set)
    left_behind: int = 0  # workers still alive ten seconds after their run


def start(root: Path, run: Path, epochs: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.exactness.kill", "--child", str(run), "--root", str(root)]
    command += ["--epochs", str(epochs)]
    return subprocess.Popen(command, start_new_session=True)


def kill_repeatedly(root: Path, run: Path, epochs: int, kills: int, longest: float, seed: int) -> Deaths:
    """Start the run and kill it at a random moment, `kills` times; then let it finish."""
    from torchrelay import checkpoint

    chance, deaths = random.Random(seed), Deaths()
    while True:
        process = start(root, run, epochs)
        spared = deaths.kills == kills
        if chance.random() < IN_TRAINING and not spared:  # the others may die before the first step
            while process.poll() is None and _place(run)[1] != process.pid:
                time.sleep(0.01)
        try:
            code = process.wait(None if spared else chance.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            if code != 0:
                sys.exit(f"the run failed with exit code {code}")
            return deaths
        deaths.kills += 1
        deaths.left_behind += not _session_ended(process.pid)
        step, pid = _place(run)
        if pid != process.pid:
            deaths.before_training += 1
            continue
        whole = checkpoint.complete(run / "checkpoints")
        saved = int(whole[-1].name.removeprefix("step-")) if whole else 0
        deaths.lost.append(step - saved)
        deaths.resumed_at.add(saved)
        if deaths.kills % 10 == 0:
            print(f"{deaths.kills} kills; now at step {step:,}", flush=True)


def _place(run: Path) -> tuple[int, int]:
    """Return the run's last step and the process that took it."""
    path = run.with_suffix(".place")
    content = path.read_bytes() if path.exists() else b""
    step, pid = struct.unpack("qq", content) if content else (0, 0)
    return step, pid


def _session_ended(session: int, patience: float = 10.0) -> bool:
    """Wait until all processes of a session have ended; return whether they have."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------------------------ the comparison


def differences(one: Path, other: Path) -> list[str]:
    """Return which files of two run folders differ, clock fields aside."""
    found = []
    names = {path.relative_to(folder) for folder in (one, other) for path in (folder / "checkpoints").rglob("*")}
    for name in sorted(
        names | {Path("evaluation.json"), Path("receipt.jsonl"), Path("recipe.toml"), Path("model.txt")}
    ):
        a, b = one / name, other / name
        if a.is_dir() and b.is_dir():
            continue
        if not (a.is_file() and b.is_file()) or a.read_bytes() != b.read_bytes():
            found.append(str(name))
    if metrics(one) != metrics(other):
        found.append("metrics.jsonl")
    if scalars(one) != scalars(other):
        found.append("TensorBoard's points")
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the clock fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def scalars(run: Path) -> list[tuple[str, int, tuple[float, ...]]]:
    """Return TensorBoard's points, each as often as it stands there."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for path in sorted((run / "tensorboard").rglob("*.scalars")):
        for event in EventFileLoader(str(path)).Load():
            values = [v for v in event.summary.value if not v.tag.startswith("samples_per_second")]
            found += [
                (f"{path.parent.name}: {value.tag}", event.step, tuple(value.tensor.float_val)) for value in values
            ]
    return sorted(found)


def digits(folder: Path) -> Path:
    """Write the handwritten digits as an image folder."""
    from PIL import Image

    import torchrelay as tr

    for part, source in zip(("train", "test"), tr.data.digits(), strict=True):
        images, labels = source.inputs, source.targets.tolist()
        for place, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / part / str(label) / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy().repeat(2, 0).repeat(2, 1)).save(path)
    return folder


def table(deaths: Deaths, found: list[str], steps: int, data: str, command: str) -> str:
    """Return the page of results."""
    rows = [
        ("kills by SIGKILL", f"{deaths.kills:,}"),
        ("kills during import or resume", f"{deaths.before_training:,}"),
        ("distinct steps it resumed from", f"{len(deaths.resumed_at):,}"),
        ("steps in the run", f"{steps:,}"),
        ("steps between checkpoints", f"{EVERY}"),
        ("steps lost per kill, median and maximum", f"{median(deaths.lost or [0]):g} and {max(deaths.lost or [0])}"),
        ("workers still alive 10 s after their run ended", f"{deaths.left_behind}"),
        ("files that differ from the uninterrupted run", ", ".join(found) or "none"),
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    return (
        f"# A killed run and an uninterrupted one\n\n{data}; {machine}; made by "
        f"`{command}`.\nAll checkpoints, `evaluation.json`, `recipe.toml` and `model.txt` are compared "
        "byte for byte;\nmetrics and TensorBoard's points without their clock fields."
        f"\n\n| | |\n| --- | ---: |\n{lines}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="an image folder with the subfolders train and test")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--longest",
        type=float,
        default=10.0,
        help="maximum seconds a run lives after its start or its first step",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--out", type=Path, help="where to write the table")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        train(options.root, options.child, options.epochs)
        return
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        folder = Path(temporary)
        root = options.root or digits(folder / "digits")
        data = "CIFAR-10's photographs" if "cifar" in str(root).lower() else root.name
        began = time.perf_counter()
        if start(root, folder / "undisturbed", options.epochs).wait() != 0:
            sys.exit("the undisturbed run failed")
        print(f"undisturbed: {time.perf_counter() - began:.0f} s", flush=True)
        deaths = kill_repeatedly(root, folder / "killed", options.epochs, options.kills, options.longest, options.seed)
        found = differences(folder / "undisturbed", folder / "killed")
        steps = metrics(folder / "killed")[-1]["step"]
        command = (
            f"python -m benchmarks.exactness.kill{' --root FOLDER' if options.root else ''} --epochs {options.epochs}"
        )
        text = table(deaths, found, steps, data, command)
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    if found or deaths.left_behind:
        sys.exit(1)


if __name__ == "__main__":
    main()
