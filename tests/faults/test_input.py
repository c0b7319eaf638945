"""Bad input: weights that don't fit, files that would run code, mistyped recipes."""

import hashlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchrelay import checkpoint
from torchrelay.checkpoint.format import Manifest
from torchrelay.cli import main

SETTINGS = ("model.name=mlp", "model.options.widths=[16]", "run.max_steps=3", "schedule.name=constant")

LIMITED = """
import resource

now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))  # 256 MiB more than there is now
"""


class Payload:
    """A pickle payload that creates a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (os.system, (f"touch {self.file}",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that stopped after three steps, with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = (*SETTINGS, "checkpoint.keep=1", "checkpoint.keep_best=0", "device.threads=1")
    assert main(["train", "digits", "--quiet", "--run", str(folder), *(f"--set={text}" for text in settings)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def only(run: Path) -> Path:
    """The one checkpoint of a run."""
    (saved,) = checkpoint.complete(run / "checkpoints")
    return saved


def change_manifest(saved: Path, change) -> None:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    forged = Manifest.model_validate(manifest)
    forged.checksum = forged.own_checksum()  # as a forger would
    path.write_text(forged.model_dump_json())


def rewrite(saved: Path, name: str, content: bytes) -> None:
    """Replace a file in a checkpoint, and update its manifest."""
    (saved / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(saved, lambda manifest: manifest["files"].update({name: entry}))


# ------------------------------------------------------------------------------------------------ 28: weights


def with_other_shapes(weights: dict) -> tuple[str, ...]:
    weights["hidden1.weight"] = torch.ones(7, 7)
    return "1 of another shape", "hidden1.weight 7×7 for the model's 16×64", "it seems to be another model's"


def with_other_keys(weights: dict) -> tuple[str, ...]:
    weights["stranger"] = weights.pop("hidden1.bias")
    return "1 missing (hidden1.bias 16)", "1 unexpected (stranger"


def with_another_head(weights: dict) -> tuple[str, ...]:
    weights |= {"head.weight": torch.ones(3, 16), "head.bias": torch.ones(3)}
    return "it was trained for 3 classes, and the model has 10", "set model.new_head=true"


@pytest.mark.parametrize("change", [with_other_shapes, with_other_keys, with_another_head])
def test_weights_of_another_shape_are_refused_with_keys_and_shapes_before_training(
    cli, one_line, run, tmp_path, change
):
    weights = load_file(only(run) / "model.safetensors")
    says = change(weights)
    save_file(weights, tmp_path / "other.safetensors")
    given = (*SETTINGS, "model.pretrained=other.safetensors")
    one_line(cli("train", "digits", "--run", "next", sets=given), "other.safetensors doesn't fit, nothing was", *says)
    assert not (tmp_path / "next").exists()
    if change is with_another_head:  # a new head is explicit
        done = cli("train", "digits", "--run", "next", sets=(*given, "model.new_head=true"))
        assert done.returncode == 0, done.stderr
        assert "the head 'head' is new" in done.stdout


# ------------------------------------------------------------------------------------------------ 29, 30: code


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".pkl"])
def test_a_pickle_given_as_weights_is_refused_and_its_payload_does_not_run(cli, one_line, tmp_path, suffix):
    (tmp_path / f"w{suffix}").write_bytes(pickle.dumps({"weight": Payload(tmp_path / "ran")}))
    done = cli("train", "digits", "--run", "run", sets=(*SETTINGS, f"model.pretrained=./w{suffix}"))
    one_line(done, f"w{suffix}")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_pickle_in_a_checkpoint_is_refused_and_its_payload_does_not_run(cli, one_line, run, tmp_path, name):
    rewrite(only(run), name, pickle.dumps({"weight": Payload(tmp_path / "ran")}))
    one_line(cli("resume", run, sets=["run.max_steps=5"]), "no checkpoint in", f"{name} can't be read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("section", ["model", "data", "loss", "optimizer", "schedule"])
def test_a_recipe_cannot_name_code_that_the_user_did_not_name(cli, one_line, tmp_path, section):
    options = 'options = { command = "touch ran" }\n' if section in ("model", "data") else ""
    (tmp_path / "stranger.toml").write_text(f'[{section}]\nname = "os.system"\n{options}')
    one_line(cli("train", "stranger.toml", "--run", "run"), "'os.system'", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["stranger.toml"]


def test_a_recipe_cannot_name_what_a_code_file_only_imports(cli, one_line, tmp_path):
    (tmp_path / "own.py").write_text("from os import system\nimport os\nfrom torch import nn\n")
    for key in ("model.name=system", "data.name=system", "loss.name=os"):
        done = cli("train", "digits", "--run", "run", "--code", "own.py", sets=[key])
        one_line(done, key.partition("=")[2], code=2)
    assert not (tmp_path / "run").exists()


def test_resuming_a_run_of_somebody_else_runs_no_code_of_theirs(cli, one_line, run):
    recipe = run / "recipe.toml"
    text = recipe.read_text()
    recipe.write_text(text.replace('name = "mlp"', 'name = "os.system"'))
    for command in (["resume", run], ["evaluate", run]):
        one_line(cli(*command), "there is no model 'os.system'", code=2)
    recipe.write_text(text)
    state = json.loads((only(run) / "state.json").read_text())
    state["callbacks"] = [{"$class": "os.system", "$args": ["touch ran"]}]
    rewrite(only(run), "state.json", json.dumps(state).encode())
    cli("resume", run, sets=["run.max_steps=4"])
    assert not (run.parent / "ran").exists()


# ------------------------------------------------------------------------------------------------ 31, 32: files


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside", "."])
def test_a_path_in_a_manifest_is_refused(cli, one_line, run, name):
    (run / "checkpoints" / "outside").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    change_manifest(only(run), lambda manifest: manifest["files"].update({name: entry}))
    one_line(cli("resume", run, sets=["run.max_steps=5"]), "no checkpoint in", f"'{name}', which isn't a plain file")


def test_a_symbolic_link_in_a_checkpoint_is_refused(cli, one_line, run, tmp_path):
    weights = only(run) / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    one_line(cli("resume", run, sets=["run.max_steps=5"]), "names 'model.safetensors', which isn't a plain file")


def headed(size: int, header: bytes = b"{}") -> bytes:
    """A safetensors file whose header claims `size` bytes."""
    return struct.pack("<Q", size) + header


HUGE = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()


@pytest.mark.parametrize("content", [headed(2**62), headed(2**34), headed(len(HUGE), HUGE), b""])
def test_an_absurd_safetensors_header_is_refused_in_bounded_memory(cli, one_line, run, tmp_path, content):
    (tmp_path / "limited.py").write_text(LIMITED)
    rewrite(only(run), "model.safetensors", content)
    done = cli("resume", run, "--code", "limited.py", sets=["run.max_steps=5"], timeout=20)
    one_line(done, "no checkpoint in", "model.safetensors can't be read")
    (tmp_path / "w.safetensors").write_bytes(content)
    sets = (*SETTINGS, "model.pretrained=w.safetensors")
    done = cli("train", "digits", "--run", "next", "--code", "limited.py", sets=sets, timeout=20)
    one_line(done, "w.safetensors isn't a whole safetensors file", "fetch it again")


def test_a_huge_or_deeply_nested_json_is_refused_in_bounded_memory(cli, one_line, run, tmp_path):
    (tmp_path / "limited.py").write_text(LIMITED)
    saved = only(run)
    whole = {name: (saved / name).read_bytes() for name in ("state.json", "manifest.json")}
    command = ("resume", run, "--code", "limited.py")
    rewrite(saved, "state.json", b"[" * 1_000_000)
    one_line(cli(*command, sets=["run.max_steps=5"], timeout=20), "state.json can't be read")
    for name in whole:  # nothing but zeros, which take no room on the disk
        rewrite(saved, "state.json", whole["state.json"])
        (saved / "manifest.json").write_bytes(whole["manifest.json"])
        with (saved / name).open("rb+") as file:
            file.truncate(2**28)
        if name == "state.json":
            found = hashlib.sha256()
            for _ in range(2**8):
                found.update(bytes(2**20) if _ else whole[name] + bytes(2**20 - len(whole[name])))
            entry = {"bytes": 2**28, "sha256": found.hexdigest()}
            change_manifest(saved, lambda manifest, entry=entry: manifest["files"].update({"state.json": entry}))
        done = cli(*command, sets=["run.max_steps=5"], timeout=20)
        one_line(done, f"{name} has 268,435,456 bytes, more than any checkpoint's")


# ------------------------------------------------------------------------------------------------ 38: typing errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("trian digits", "there is no command 'trian'; did you mean 'train'?"),
        ("train digts", "there is no recipe 'digts', neither a shipped one nor a file; did you mean 'digits'?"),
        ("train digits --rum=x", "there is no option '--rum'; did you mean '--run'?"),
        ("train digits --set optimizr.lr=1", "unknown key 'optimizr'; did you mean 'optimizer'?"),
        ("train digits --set optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("train digits --set schedule.name=cosin", "there is no schedule 'cosin'; did you mean 'cosine'?"),
        ("train digits --set model.name=resnet81", "there is no model 'resnet81'; did you mean 'resnet18'?"),
        ("train digits --set data.name=digts", "data.name 'digts' is unknown; did you mean 'digits'?"),
        ('train digits --set data.augment=["flipp"]', "unknown transform 'flipp'; did you mean 'flip'?"),
        ("train digits --set run.epochs=ten", "run.epochs should be a whole number, not 'ten'"),
        ("train digits --set run.epochs=0", "run.epochs should be at least 1, not 0"),
        ("train digits --set optimizer.momentum=1.5", "optimizer.momentum should be less than 1, not 1.5"),
        ("train digits --set model.pretrained=wieghts.pt", "there is no file of weights at wieghts.pt; did you mean"),
        ("train digits --set model.pretrained=lost.pt", "there is no file of weights at lost.pt: check the path"),
        ("train image-folder --set data.root=fotos", "data.root fotos: there is no such folder"),
        ("train digits --code lost.py", "--code lost.py: there is no such file"),
        ("resume rnus/first", "rnus/first isn't a run"),
        ("recipe digits --set run.epoch=3", "unknown key 'run.epoch'; did you mean 'epochs'?"),
    ],
)
def test_a_mistyped_option_is_an_error_that_suggests_the_right_one(cli, one_line, tmp_path, arguments, says):
    (tmp_path / "weights.pt").touch()
    one_line(cli(*arguments.split()), says, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"], "it left something behind"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[run]\nepoch = 3", "unknown key 'run.epoch'; did you mean 'epochs'?"),
        ("[optimiser]\nlr = 0.1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ('[run]\nepochs = "ten"', "run.epochs should be a whole number, not 'ten'"),
        ("[data]\nbatch_size = 0", "data.batch_size should be at least 1, not 0"),
        ("[run\nepochs = 3", "isn't TOML: "),
    ],
)
def test_a_mistyped_recipe_key_is_an_error_that_names_the_file(cli, one_line, tmp_path, content, says):
    (tmp_path / "mine.toml").write_text(content)
    one_line(cli("train", "mine.toml", "--run", "run"), "mine.toml", says, code=2)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_setting_at_a_resume_leaves_the_run_unchanged(cli, one_line, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    one_line(cli("resume", run, sets=["run.epoch=9"]), "unknown key 'run.epoch'; did you mean 'epochs'?", code=2)
    one_line(
        cli("resume", run, "--accept-change"), "no option '--accept-change'; did you mean '--accept-changes'?", code=2
    )
    one_line(cli("evaluate", run, "--checkpoint", "bset"), "has no checkpoint 'bset': choose best, last, 3", code=2)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
