"""What `crash.py` interrupts: a training run, the making of a cache of decoded images, and an export."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import torchrelay as tr
from benchmarks.exactness import kill
from torchrelay import cli
from torchrelay.errors import RelayError
from torchrelay.report.export.export import Exporter
from torchrelay.report.export.folder import check_sums, read_facts
from torchrelay.report.export.formats import ONNX, PROGRAM
from torchrelay.report.export.verify import GOLDEN

SETS = ("run.epochs=2", 'checkpoint.every="10 steps"', "model.options.widths=[4,8]", "data.batch_size=128")


@dataclass(frozen=True)
class Subject:
    """Something that makes a folder, and can be interrupted.

    Attributes:
        act: makes the folder, or goes on with what an interrupted process left; returns the exit code.
        differences: returns what differs between two such folders.
        harmless: a pattern of calls that lose nothing when they fail, so that nothing is to be said.
        prepare: writes what it needs beside the folder; in a process of its own.
    """

    act: Callable[[Path], int]
    differences: Callable[[Path, Path], list[str]]
    harmless: str
    prepare: Callable[[Path], int] = lambda _: 0


def train(run: Path) -> int:
    """Train a new run of the digits, or resume it where it has begun."""
    if (run / "recipe.toml").exists():
        return cli.main(["resume", str(run), "--quiet"])
    sets = [argument for setting in SETS for argument in ("--set", setting)]
    return cli.main(["train", "digits", "--run", str(run), "--quiet", *sets])


def decode(caches: Path) -> int:
    """Decode images into a cache, or take them from it, and compare them with the images themselves."""
    root = caches.parent / "images"
    try:
        parts = [tr.data.image_folder(root, size=8, cache_dir=caches, log=_nothing) for _ in range(2)]
    except RelayError as error:
        print(f"error: {cli.one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    whole = tr.data.image_folder(root, size=8, cache=False, log=_nothing)
    for part in parts:
        for one, other in zip(part, whole, strict=True):
            assert isinstance(one, tr.data.ArraySource)  # noqa: S101 - the images are decoded
            assert isinstance(other, tr.data.ArraySource)  # noqa: S101 - likewise
            if not torch.equal(one.inputs, other.inputs):
                raise AssertionError("the cache has other images")
    return 0


def _nothing(_: str) -> None:
    """Ignore a message."""


def draw_images(folder: Path) -> None:
    """Write what `decode` reads."""
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")


def train_and_export(target: Path) -> int:
    """Write a run, and an export of it, whose forms `export` copies."""
    run, forms = target.parent / "run", target.parent / "forms"
    return train(run) or cli.main(["export", str(run), "--out", str(forms), "--quiet", "--no-int8"])


def export(target: Path) -> int:
    """Export a run, and replace that by another export; an export that is there must be whole.

    Tracing a model takes ten seconds, in which no name is made: its files are those of an export that was made before.
    """
    forms = target.parent / "forms"

    def copy_forms(exporter: Exporter, folder: Path) -> None:
        exporter.facts |= read_facts(forms)
        for name in (PROGRAM, ONNX, GOLDEN):
            (folder / name).write_bytes((forms / name).read_bytes())

    setattr(Exporter, "_write_forms", copy_forms)  # noqa: B010 - a method
    for _ in range(2):
        undisturbed = "FAULT_LOG" not in os.environ  # these reads aren't to be struck at
        if undisturbed and (target / "out").exists() and (unknown := check_sums(target / "out")):
            raise AssertionError(f"it has {unknown}")
        command = ["export", str(target.parent / "run"), "--out", str(target / "out"), "--force", "--quiet"]
        if code := cli.main(command):
            return code
    return 0


def files_that_differ(one: Path, other: Path) -> list[str]:
    """Return which files of two folders differ, locks aside."""
    names = {path.relative_to(folder) for folder in (one, other) for path in folder.rglob("*")}
    contents = {
        name: [(folder / name).read_bytes() if (folder / name).is_file() else None for folder in (one, other)]
        for name in names
        if name.suffix != ".lock" and not all((folder / name).is_dir() for folder in (one, other))
    }
    return sorted(str(name) for name, (a, b) in contents.items() if a is None or a != b)


SUBJECTS = {
    # A note in the lock, a folder that exists, a manifest that the next save reads again, a receipt's last line, which
    # the close tries again.
    "run": Subject(
        train,
        kill.differences,
        r"(ftruncate64|write) /lock|write /receipt.jsonl|mkdir /(checkpoints|tensorboard)|"
        r"open64 /checkpoints/step-\d+/manifest.json",
    ),
    # A cache that can't be read is made again; what a killed process left can stay a while.
    "cache": Subject(decode, files_that_differ, r"open64 /…-…/|(mkdir|opendir|rmdir|unlink\w*) "),
    # Nothing is to be removed before; what stays of the old export goes with the next one.
    "export": Subject(export, files_that_differ, r"(mkdir|opendir|rmdir|unlink\w*) ", train_and_export),
}
