"""What a message says to do can be done: each command, option, key and extra that it names exists and helps."""

import ast
import functools
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import torchrelay
import torchrelay as tr
from torchrelay import cli
from torchrelay.models.small import small_cnn
from torchrelay.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
DEFAULT = Recipe()
KEYS = {f"{section}.{key}" for section in Recipe.model_fields for key in type(getattr(DEFAULT, section)).model_fields}
KEYS |= {f"optimizer.{key}" for key in tr.optim.Muon.model_fields}


@functools.cache
def texts() -> list[str]:
    """Return all strings of the package but its docstrings; a value within one becomes VALUE."""
    found = []
    for path in sorted(Path(torchrelay.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "VALUE" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose | inner:
                found.append(node.value)
    return found


def named(pattern: str) -> set[str]:
    return {match for text in texts() for match in re.findall(pattern, text)}


def test_the_extras_that_messages_name_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = named(r"torchrelay\[(\w+)\]")
    assert len(extras) >= 3
    extras |= {"mlflow", "trackio", "wandb"}  # a tracker's message names its own: VALUE
    assert extras - {"VALUE"} <= set(project["optional-dependencies"])


def test_the_commands_that_messages_name_exist():
    commands = named(r"(?<![\w.])torchrelay ([a-z]+) (?:RUN|FOLDER|VALUE|RECIPE|image-folder|digits)")
    assert len(commands) >= 3
    assert commands <= set(cli.COMMANDS)


def test_the_keys_that_messages_set_exist():
    keys = named(r"--set '?((?:data|model|optimizer|schedule|loss|run|device|parallel|checkpoint)\.\w+)")
    keys |= named(r"\b((?:data|model|optimizer|run|device|parallel|checkpoint)\.[a-z_]+)=")
    assert len(keys) >= 15
    assert keys <= KEYS


SEVEN = "train digits --set model.pretrained=seven.safetensors"
AUGMENT = 'augment=["flip", {name = "crop", padding = 4}]'
# What was typed, and what the answer says to type.
FOLLOWED = [
    ("train pics", "train image-folder --set data.root=pics"),
    ("train cifar10-fast --set data.root=pics", "train cifar10-fast --set data.root=pics --set data.name=image-folder"),
    ("train characters", "train characters --set data.root=book.txt"),
    (SEVEN, f"{SEVEN} --set model.new_head=true"),
    ("train digits --set data.augment=flip", f"train digits --set 'data.{AUGMENT}'"),
    ("train digits --set 'model.options.widths=(8, 8, 8)'", "train digits --set 'model.options.widths=[32, 64, 64]'"),
    ("train digits --set device.name=gpu", "train digits --set device.name=cpu"),
    ("train digits --set parallel.replicas=3", "train digits --set parallel.replicas=3 --set run.exact=false"),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with the files that the commands name."""
    folder = tmp_path_factory.mktemp("desk")
    for number in range(12):
        path = folder / "pics" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)).save(path)
    (folder / "book.txt").write_text("To be, or not to be, that is the question. " * 60)
    save_file(small_cnn(7, 1).state_dict(), folder / "seven.safetensors")
    return folder


@pytest.mark.parametrize(("typed", "remedy"), FOLLOWED, ids=[remedy for _, remedy in FOLLOWED])
def test_a_remedy_that_is_followed_helps(typed, remedy, desk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    torch.set_num_threads(1)
    short = ["--set", "run.max_steps=1", "--set", "run.evaluate_batches=1", "--quiet"]
    short += ["--set", "device.precision=float32"]  # where a processor emulates bf16, a step takes ten seconds
    assert cli.main([*shlex.split(typed), "--run", str(tmp_path / "typed"), *short]) in (1, 2)
    assert capsys.readouterr().err.startswith("error: ")
    assert cli.main([*shlex.split(remedy), "--run", str(tmp_path / "remedy"), *short]) == 0, capsys.readouterr().err
