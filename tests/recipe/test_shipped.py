"""Each unchanged shipped recipe trains on two devices, and logs on how many it can continue."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idx import write_idx
from torchrelay.recipe import shipped

# Small data in place of CIFAR-10, less of it in a step, and a small network in place of a ResNet.
CODE = """
import torch

from torchrelay.data.sources import arrays


def tiny():
    images = torch.randint(0, 256, (48, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return tuple(arrays(part, torch.arange(24) % 10, tuple("abcdefghij"), "tiny") for part in images.split(24))
"""
CIFAR = ("data.name=tiny", "data.batch_size=8")
SMALL = ("model.name=small-cnn", "device.precision=float32")
DATA = {
    "digits": (),
    "tables": (),
    "fashion-mnist": ("data.root=.", "data.batch_size=8"),
    "characters": ("data.root=book.txt", "data.batch_size=8"),
    "characters-fast": ("data.root=book.txt", "data.batch_size=8"),
    "image-folder": ("data.root=photographs", "data.batch_size=8", "data.cache=false", *SMALL),
    "cifar10-small": (*CIFAR, *SMALL),
    "cifar10-fast": CIFAR,
    "cifar10-94": (*CIFAR, "device.graph=false"),
    "cifar10-reference": (*CIFAR, *SMALL, 'data.prepare=[{name="resize", size=32}]'),
}


def test_each_recipe_has_test_data():
    assert DATA.keys() == shipped.headers().keys()


# The others differ in their networks and their data alone.
QUICK = ("digits", "image-folder")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(DATA.keys() - QUICK))]
)
def test_an_unchanged_shipped_recipe_trains_on_two_devices(cli, tmp_path, name):
    (tmp_path / "tiny.py").write_text(CODE)
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    write_idx(tmp_path, samples=24)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = tmp_path / "photographs" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    sets = ("device.name=cpu", "run.max_steps=3", "run.test_views=1", "checkpoint.keep=1", *DATA[name])
    done = cli("train", name, "--run=run", "--code=tiny.py", "--devices=2", sets=sets)
    assert (done.returncode, done.stderr) == (0, "")
    assert "in 2 replicas: it can continue on 1 or 2 devices" in done.stdout
    assert "stopped: run.max_steps is 3" in done.stdout
    assert "replicas = 2\n" in (tmp_path / "run" / "recipe.toml").read_text()


# A recipe for each of the shipped networks: small-cnn, mlp, transformer, fast-cnn and resnet18-small.
COMPILED = {
    "digits": (),
    "tables": (),
    "characters": DATA["characters"],
    "cifar10-fast": (*CIFAR, "device.precision=float32", "device.channels_last=true"),
    "cifar10-small": CIFAR,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_shipped_network_is_compiled_and_resumes_to_the_same_weights(cli, tmp_path, name):
    (tmp_path / "tiny.py").write_text(CODE)
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    sets = ("device.name=cpu", "device.compile=true", "device.threads=1", "run.test_views=1", "checkpoint.keep=1")
    sets = (*sets, "checkpoint.keep_best=0", "run.evaluate_every=1000 steps", *COMPILED[name])

    def run(command: str, where: str, steps: int, sets: tuple[str, ...] = ()) -> None:
        line = (command, name, f"--run={where}") if command == "train" else (command, where)
        done = cli(*line, "--code=tiny.py", "--quiet", sets=(*sets, f"run.max_steps={steps}"), timeout=250)
        assert done.returncode == 0, done.stderr  # which may have a warning of the compiler's

    run("train", "whole", 4, sets)
    run("train", "parted", 2, sets)
    run("resume", "parted", 4)
    assert "compiled" in (tmp_path / "whole" / "log.txt").read_text()
    whole, parted = (tmp_path / run / "checkpoints" / "step-00000004" for run in ("whole", "parted"))
    for file in ("model.safetensors", "state.safetensors"):  # the optimizer's state, too
        assert (whole / file).read_bytes() == (parted / file).read_bytes()


FASHION = Path("/usr/share/datasets/fashion-mnist")
BASELINE = (
    0.897  # the best classifier that the data's authors have trained: SVC, C = 10, rbf (arXiv 1708.07747, table 3)
)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the files of Debian's dataset-fashion-mnist")
def test_fashion_mnist_beats_the_best_baseline_of_its_authors(cli, tmp_path):
    done = cli("train", "fashion-mnist", "--run=run", "--quiet", sets=(f"data.root={FASHION}",), timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["accuracy"] > BASELINE
