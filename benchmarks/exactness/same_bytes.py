"""Train the same runs with two versions of the source, and compare the bytes they end in.

    python -m benchmarks.exactness.same_bytes --before OTHER/src [--after src] [--root FOLDER] [--only TEXT]

Both versions run `python -m torchrelay train` for a few steps, with one thread per process: shipped recipes, an image
folder with every augmentation, and each strategy on 1, 2 and 4 processes. The new version also resumes what the old
version has trained halfway. FOLDER is an image folder with CIFAR-10's photographs; without it, and for the
augmentations, images are generated from a seed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.page import markdown

CLOCK = ("time", "seconds", "samples_per_second")  # fields of a metrics line that depend on the clock
HALF, STEPS = 3, 6
COUNTS = (1, 2, 4)
REPLICAS = f"parallel.replicas={max(COUNTS)}"
PREPARE = '[{name = "resize", size = 28}, {name = "center_crop", size = 26}]'
# "color_jitter" is a spelling that every version takes.
AUGMENT = """[
    "flip", "alternating_flip", {name = "crop", padding = 2}, {name = "random_resized_crop", size = 24},
    {name = "color_jitter", brightness = 0.4, contrast = 0.4, saturation = 0.4, hue = 0.1}, "trivial_augment",
    "rand_augment", {name = "resize", size = 22}, {name = "center_crop", size = 20}, {name = "cutout", size = 4},
    {name = "progressive_resize", sizes = [16, 20]}, "mixup", "cutmix"
]"""


@dataclass(frozen=True)
class Case:
    """A run that both versions train.

    Args:
        name: label of the table's row.
        recipe: name of a shipped recipe.
        sets: overrides of the recipe.
        processes: the world size.
    """

    name: str
    recipe: str
    sets: tuple[str, ...] = ()
    processes: int = 1


@dataclass(frozen=True)
class Result:
    """What a run left: digests of its files, or the error that ended it."""

    weights: str = ""
    state: str = ""  # all tensors of the newest checkpoint
    metrics: str = ""
    error: str = ""


# ------------------------------------------------------------------------------------------------ the runs


def draw_images(folder: Path, side: int, suffix: str) -> None:
    """Write an image folder of three classes, generated from a seed."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 72), ("test", 15)):
        for number in range(count):
            place = folder / part / "abc"[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((side, side), Image.Resampling.BILINEAR).save(place / f"{number:03}{suffix}", quality=90)


def write_text(path: Path) -> None:
    """Write a text of random words, drawn from a seed."""
    words = ("a", "run", "that", "is", "killed", "and", "resumed", "ends", "in", "the", "same", "bytes")
    path.write_text(" ".join(np.random.default_rng(0).choice(words, 2_500)))


def cases(folder: Path, root: Path | None) -> Iterator[Case]:
    """Yield the runs, those of one process first; their data is written into `folder`."""
    small, photos, text = folder / "small", folder / "photos", folder / "text.txt"
    draw_images(small, 32, ".png")
    draw_images(photos, 40, ".jpg")
    write_text(text)
    data = {
        "digits": ("digits", ()),
        "cifar10-small": (
            "cifar10-small",
            ("data.name=image-folder", f"data.root={root or small}", "data.batch_size=16"),
        ),
        "image folder, every augmentation": (
            "image-folder",
            (
                f"data.root={photos}",
                "data.size=32",
                "data.batch_size=16",
                "device.precision=float32",
                "device.channels_last=true",
                f"data.prepare={PREPARE}",
                f"data.augment={AUGMENT}",
            ),
        ),
        "text": ("characters", (f"data.root={text}",)),
    }
    for name, (recipe, sets) in data.items():
        yield Case(f"{name}, one replica", recipe, sets)
    yield Case("digits, not exact", "digits", ("run.exact=false",))
    yield Case("digits, bf16, channels last", "digits", ("device.precision=bf16", "device.channels_last=true"))
    yield Case(
        "digits, Muon, averaged weights", "digits", ("optimizer.name=muon", "optimizer.lr=0.02", "model.ema=0.9")
    )
    for count in COUNTS:
        for name, (recipe, sets) in data.items():
            yield Case(f"{name}, exact ddp", recipe, (*sets, "parallel.kind=ddp", REPLICAS), count)
        yield Case("digits, ddp", "digits", ("run.exact=false", "parallel.kind=ddp", REPLICAS), count)
        for recipe, sets in (data["digits"], data["text"]):
            yield Case(f"{recipe}, exact fsdp", recipe, (*sets, "parallel.kind=fsdp", REPLICAS), count)


def start(source: Path, arguments: list[str], sets: tuple[str, ...], home: Path) -> subprocess.CompletedProcess[str]:
    """Run a version's command line to its end."""
    command = [sys.executable, "-m", "torchrelay", *arguments, "--quiet", *(f"--set={setting}" for setting in sets)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(source.resolve()),
        "OMP_NUM_THREADS": "1",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=False)


def digest(paths: list[Path]) -> str:
    """Return one SHA-256 over the files and their names."""
    if len(paths) == 1:
        return hashlib.sha256(paths[0].read_bytes()).hexdigest()
    parts = (f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_result(run: Path, done: subprocess.CompletedProcess[str]) -> Result:
    """Return what a run left in its folder."""
    if done.returncode:
        return Result(error=(done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    newest = max(checkpoints(run), key=step_of)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = json.dumps([{key: value for key, value in line.items() if key not in CLOCK} for line in lines])
    return Result(
        digest([newest / "model.safetensors"]),
        digest(sorted(newest.glob("*.safetensors"))),
        hashlib.sha256(kept.encode()).hexdigest(),
    )


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints."""
    return [path for path in (run / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink()]


def step_of(path: Path) -> int:
    """Return the step of a checkpoint."""
    return int("".join(filter(str.isdecimal, path.name)))


def train(source: Path, case: Case, run: Path) -> Result:
    """Train a case with one version."""
    always = (f"run.max_steps={STEPS}", f"checkpoint.every={HALF} steps", "checkpoint.keep=9", "run.log_every=2")
    devices = ["--devices", str(case.processes)] if case.processes > 1 else []
    sets = (*case.sets, *always, "device.name=cpu")
    return read_result(run, start(source, ["train", case.recipe, "--run", str(run), *devices], sets, run.parent))


def resume_half(source: Path, case: Case, trained: Path, run: Path) -> Result:
    """Resume, with one version, from the checkpoint halfway through another version's run."""
    shutil.copytree(trained, run, symlinks=True)
    for path in checkpoints(run):
        if step_of(path) > HALF:
            shutil.rmtree(path)
    devices = ["--devices", str(case.processes)] if case.processes > 1 else []
    return read_result(run, start(source, ["resume", str(run), *devices], (), run.parent))


# ------------------------------------------------------------------------------------------------ the table

HEAD = ("run", "processes", "SHA-256 of the weights before", "after", "all tensors", "metrics")


def row(name: str, processes: int, before: Result, after: Result) -> tuple[str, ...]:
    """Return a row of the table."""
    if before.error or after.error:
        return name, str(processes), before.error or before.weights[:16], after.error or "trained", "", "**different**"
    verdict = tuple(
        "equal" if same else "**different**"
        for same in (before.weights == after.weights, before.state == after.state, before.metrics == after.metrics)
    )
    return name, str(processes), f"`{before.weights[:16]}`", *verdict


def compare(before: Path, after: Path, folder: Path, root: Path | None, only: str) -> Iterator[tuple[str, ...]]:
    """Yield a row for each case: both versions train it at the same time."""
    with ThreadPoolExecutor(2) as pool:
        for number, case in enumerate(case for case in cases(folder, root) if only in case.name):
            homes = [folder / f"{number}-{which}" for which in ("before", "after")]
            for home in homes:
                home.mkdir()
            runs = [home / "run" for home in homes]
            old, new = pool.map(train, (before, after), (case, case), runs)
            yield row(case.name, case.processes, old, new)
            if not old.error and ("one replica" in case.name or case.processes == 2):
                resumed = resume_half(after, case, runs[0], homes[1] / "resumed")
                yield row(f"{case.name}: first half before, second half after", case.processes, old, resumed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="source folder of the old version")
    parser.add_argument(
        "--after", type=Path, default=Path("src"), help="source folder of the new version (default: src)"
    )
    parser.add_argument("--root", type=Path, help="CIFAR-10's photographs as an image folder")
    parser.add_argument("--only", default="", metavar="TEXT", help="run only the cases whose names contain TEXT")
    parser.add_argument("--out", type=Path, help="where to write the table")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for found in compare(options.before, options.after, Path(folder), options.root, options.only):
            print(" | ".join(found), flush=True)
            rows.append(found)
    if options.out is not None:
        text = "Made by `python -m benchmarks.exactness.same_bytes`. Metrics are compared without the clock fields."
        options.out.write_text(f"# The same bytes before and after\n\n{text}\n\n{markdown(HEAD, rows)}\n")
    if different := [found[0] for found in rows if "**different**" in found]:
        sys.exit(f"different: {'; '.join(different)}")


if __name__ == "__main__":
    main()
