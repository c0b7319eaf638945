"""Checkpoints: complete or absent, never pickled, and damage is reported."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as some
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

import torchrelay as tr
from torchrelay import checkpoint
from torchrelay.checkpoint import Checkpointer, CheckpointSettings, Contents
from torchrelay.checkpoint.format import _sha256, pack, unpack
from torchrelay.checkpoint.retention import prune
from torchrelay.errors import RelayError, UsageError


def contents(step: int, score: float | None = None) -> Contents:
    generator = torch.Generator().manual_seed(step)
    model = {"weight": torch.randn(5, 3, generator=generator), "steps": torch.tensor(step)}
    state = {
        "step": step,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.randn(5, 3, generator=generator), "step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1 + step, "betas": (0.9, 0.999), "params": [0], "foreach": None}],
        },
        "limits": [float("inf"), float("-inf"), 1e-300],
    }
    return Contents(step, model, state, {"weight": torch.ones(5, 3)}, score, {"accuracy": score or 0.0})


def silent(_text: str) -> None:
    pass


def test_a_checkpoint_round_trips(tmp_path):
    written = contents(7, score=0.5)
    read = checkpoint.read(checkpoint.write(tmp_path, written))
    assert read.step == 7
    assert read.score == 0.5
    assert read.metrics == {"accuracy": 0.5}
    for name, tensor in written.model.items():
        assert torch.equal(read.model[name], tensor)
        assert read.model[name].dtype == tensor.dtype
    assert torch.equal(read.ema["weight"], written.ema["weight"])
    group = read.state["optimizer"]["param_groups"][0]
    assert group == written.state["optimizer"]["param_groups"][0]
    assert isinstance(group["betas"], tuple)
    assert list(read.state["optimizer"]["state"]) == [0]
    buffer = read.state["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(buffer, written.state["optimizer"]["state"][0]["momentum_buffer"])
    assert read.state["limits"] == written.state["limits"]


def test_the_same_contents_give_the_same_bytes(tmp_path):
    first, second = (checkpoint.write(tmp_path / name, contents(7)) for name in "ab")
    assert {p.name for p in first.iterdir()} == {p.name for p in second.iterdir()}
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_the_weights_open_with_plain_safetensors(tmp_path):
    path = checkpoint.write(tmp_path, contents(1))
    assert path.name == "step-00000001"
    model = torch.nn.Linear(3, 5, bias=False)
    weights = load_file(path / "model.safetensors")
    del weights["steps"]
    model.load_state_dict(weights)
    assert torch.equal(model.weight, contents(1).model["weight"])


def test_objects_that_need_pickle_are_refused():
    with pytest.raises(TypeError, match=r"a checkpoint can't hold \w*Path at 'a\.b'"):
        pack({"a": {"b": Path("x")}})


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "ema.safetensors"])
def test_a_flipped_bit_is_detected_and_the_previous_checkpoint_is_used(tmp_path, file):
    checkpoint.write(tmp_path, contents(1))
    damaged = checkpoint.write(tmp_path, contents(2)) / file
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    said = []
    assert checkpoint.newest(tmp_path, said.append).step == 1
    assert len(said) == 1
    assert str(damaged) in said[0]
    assert "checksum" in said[0]


def test_a_truncated_file_is_detected(tmp_path):
    path = checkpoint.write(tmp_path, contents(1)) / "state.json"
    os.truncate(path, 10)
    with pytest.raises(RelayError, match=r"no checkpoint in .* can be used: .*state\.json has 10 bytes"):
        checkpoint.newest(tmp_path, silent)


def test_every_damaged_checkpoint_is_listed(tmp_path):
    for step in (1, 2):
        (checkpoint.write(tmp_path, contents(step)) / "model.safetensors").unlink()
    with pytest.raises(RelayError, match=r"step-00000002/model\.safetensors is missing.*step-00000001"):
        checkpoint.newest(tmp_path, silent)


def test_a_folder_without_a_manifest_is_not_a_checkpoint_and_is_replaced(tmp_path):
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".step-00000005.partial").mkdir()
    assert checkpoint.newest(tmp_path, silent) is None
    checkpoint.write(tmp_path, contents(5))
    assert checkpoint.newest(tmp_path, silent).step == 5
    assert not (tmp_path / ".step-00000005.partial").exists()


def test_the_highest_step_is_the_newest_whatever_the_clock_says(tmp_path):
    checkpoint.write(tmp_path, contents(100_000_000))
    for file in checkpoint.write(tmp_path, contents(99)).iterdir():
        os.utime(file, (4e9, 4e9))
    assert checkpoint.newest(tmp_path, silent).step == 100_000_000


def test_a_manifest_whose_text_is_not_unicode_is_refused(tmp_path):
    path = checkpoint.write(tmp_path, contents(1))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = "\ud800"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RelayError, match="isn't a checkpoint's manifest"):
        checkpoint.read(path)


def test_a_name_in_a_manifest_that_is_too_long_is_refused(tmp_path, forge):
    path = checkpoint.write(tmp_path, contents(1))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["a" * 1000] = manifest["files"]["model.safetensors"]
    forge(path, manifest)
    with pytest.raises(RelayError, match="File name too long"):
        checkpoint.read(path)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "sub/file"])
def test_a_path_in_a_manifest_is_refused(tmp_path, forge, name):
    path = checkpoint.write(tmp_path, contents(1))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["model.safetensors"]
    forge(path, manifest)
    with pytest.raises(RelayError, match="isn't a plain file"):
        checkpoint.read(path)


def test_a_symbolic_link_in_a_checkpoint_is_refused(tmp_path):
    path = checkpoint.write(tmp_path, contents(1))
    moved = tmp_path / "elsewhere"
    (path / "model.safetensors").rename(moved)
    (path / "model.safetensors").symlink_to(moved)
    with pytest.raises(RelayError, match="isn't a plain file"):
        checkpoint.read(path)


def test_a_later_format_is_refused_by_name(tmp_path):
    path = checkpoint.write(tmp_path, contents(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(RelayError, match=r"later release \(format 99\)"):
        checkpoint.read(path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, score in enumerate([0.1, 0.9, 0.3, 0.8, 0.2, 0.4], start=1):
        checkpoint.write(tmp_path, contents(step, score))
    prune(tmp_path, keep=2, keep_best=2)
    assert [p.name[-1] for p in checkpoint.complete(tmp_path)] == ["2", "4", "5", "6"]
    assert checkpoint.best(tmp_path).name == "step-00000002"


def test_the_newest_checkpoint_is_kept_even_with_keep_0(tmp_path):
    for step in (1, 2):
        checkpoint.write(tmp_path, contents(step))
    prune(tmp_path, keep=0, keep_best=0)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000002"]


def test_a_checkpoint_that_a_signal_caused_goes_with_the_next_and_displaces_none(tmp_path):
    def kept() -> list[int]:
        prune(tmp_path, keep=2, keep_best=1)
        return [checkpoint.read(path).step for path in checkpoint.complete(tmp_path)]

    for step, score in ((1, 0.9), (2, 0.1), (3, 0.2)):
        checkpoint.write(tmp_path, contents(step, score))
    checkpoint.write(tmp_path, replace(contents(4, 1.0), interim=True))
    assert kept() == [1, 2, 3, 4]
    checkpoint.write(tmp_path, replace(contents(5, 1.0), interim=True))
    assert kept() == [1, 2, 3, 5], "one for each signal would fill the disk"
    checkpoint.write(tmp_path, contents(6, 0.3))
    assert kept() == [1, 3, 6]


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_once_and_tried_again(tmp_path):
    said: list[str] = []
    settings = CheckpointSettings(keep=1, keep_best=0)
    with Checkpointer(tmp_path, settings, steps_per_epoch=1, total_steps=9, warn=said.append) as checkpointer:
        checkpointer.save(contents(1))
        checkpointer.wait()
        obstacle = tmp_path / ".step-00000001.removed"  # a folder can't be renamed to a file
        obstacle.write_text("")
        for step in (2, 3):
            checkpointer.save(contents(step))
            checkpointer.wait()
        (message,) = said
        assert message.startswith(f"the old checkpoint {tmp_path}/step-00000001 can't be deleted (Not a directory)")
        obstacle.unlink()
        checkpointer.save(contents(4))
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000004"]


@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_process_that_died_did_not_delete_goes_when_the_run_is_opened(tmp_path, damaged):
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, contents(step))
    restored = 2 if damaged else 3
    settings = CheckpointSettings(keep=1, keep_best=0)
    Checkpointer(tmp_path, settings, steps_per_epoch=1, total_steps=9).tidy(restored)
    left = [int(path.name[-1]) for path in checkpoint.complete(tmp_path)]
    assert left == ([1, 2, 3] if damaged else [3]), "the newest one is damaged, so the others must stay"


def test_a_checkpoint_is_found_by_name_or_step(tmp_path):
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        checkpoint.find(tmp_path, "best")
    for step, score in ((10, 0.9), (20, 0.1)):
        checkpoint.write(tmp_path, contents(step, score))
    assert checkpoint.find(tmp_path, "best").name == "step-00000010"
    assert checkpoint.find(tmp_path, "last").name == "step-00000020"
    assert checkpoint.find(tmp_path, "20").name == "step-00000020"
    with pytest.raises(UsageError, match="choose best, last, 10, 20"):
        checkpoint.find(tmp_path, "30")


def test_loading_runs_no_code(tmp_path, forge):
    """A checkpoint whose files are pickles that would write a marker is refused, and the marker isn't there."""
    import pickle

    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    path = checkpoint.write(tmp_path, contents(1))
    bomb = pickle.dumps(Payload())
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("model.safetensors", "state.json"):
        (path / name).write_bytes(bomb)
        manifest["files"][name] = {"bytes": len(bomb), "sha256": _sha256(path / name)}
    forge(path, manifest)
    with pytest.raises(RelayError, match="can't be read"):
        checkpoint.read(path)
    assert not marker.exists()


def test_the_package_imports_no_pickle():
    """Nothing of ours calls pickle, or torch.load without weights_only."""
    root = Path(tr.__file__).parent
    for file in root.rglob("*.py"):
        text = file.read_text()
        assert "pickle.load" not in text, file
        assert len(re.findall(r"(?<!safetensors\.)torch\.load\(", text)) == text.count("weights_only=True"), file


def test_a_kill_between_any_two_steps_of_writing_leaves_the_old_or_the_new(cli, tmp_path):
    """An audit hook kills a real process at each operation that changes the disk."""
    program = """
import os, sys
from pathlib import Path
import torch
from torchrelay import checkpoint
from torchrelay.checkpoint import Contents
folder = Path(sys.argv[1])
def hook(event, arguments):
    global countdown
    watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
    if event in watched and sys.argv[1] in str(arguments[0]):
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), 9)
for countdown in (*range(1, 21), 99):  # each moment gets a fork
    if (child := os.fork()) == 0:
        sys.addaudithook(hook)
        checkpoint.write(folder, Contents(2, {"w": torch.full((10,), 2.0)}, {"step": 2}))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    newest = checkpoint.newest(folder, lambda text: None)
    assert newest.model["w"].tolist() == [newest.step] * 10
    print(newest.step, code)
    if code == 0:
        break
"""
    checkpoint.write(tmp_path, Contents(1, {"w": torch.full((10,), 1.0)}, {"step": 1}))
    done = cli(tmp_path, program=program)
    assert done.returncode == 0, done.stderr
    assert {"1 -9", "2 0"} <= {*done.stdout.splitlines()}


# ------------------------------------------------------------------------------------------------ what a fuzzer found


def forge_state(saved: Path, forge, content: bytes) -> None:
    """Replace a checkpoint's state under a right manifest, as a forger would."""
    (saved / "state.json").write_bytes(content)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": _sha256(saved / "state.json")}
    forge(saved, manifest)


@pytest.mark.parametrize(
    "content",
    [
        *(b'{"$tensor": "none"}', b'{"a": {"$tensor": 3}}', b'{"$float": "x"}', b'{"$float": []}', b'{"$tuple": 3}'),
        *(b'{"$items": [1]}', b'{"$items": [[[], 1]]}', b"[]", b"3", b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    ],
)
def test_a_forged_state_is_refused_with_a_line(tmp_path, forge, content):
    saved = checkpoint.write(tmp_path, contents(7))
    forge_state(saved, forge, content)
    with pytest.raises(RelayError, match=r"state\.json (is damaged or isn't ours|can't be read)"):
        checkpoint.read(saved)


def test_a_state_of_millions_of_lists_is_refused_before_it_fills_the_memory(tmp_path, forge):
    saved = checkpoint.write(tmp_path, contents(7))
    forge_state(saved, forge, b'{"a": [' + b"[]," * 2_000_000 + b"[]]}")
    with pytest.raises(RelayError, match="more than any checkpoint's"):
        checkpoint.read(saved)


def test_a_state_too_large_to_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrelay.checkpoint.format._MOST_NESTED", 100)
    written = replace(contents(7), state={"callbacks": [{"seen": [[]] * 200}]})
    with pytest.raises(RelayError, match="too many for a checkpoint: return less"):
        checkpoint.write(tmp_path, written)
    assert checkpoint.complete(tmp_path) == []


_LEAVES = some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(max_size=9)
_LEAVES |= some.integers(0, 9).map(torch.tensor)
_TREES = some.recursive(
    _LEAVES,
    lambda inner: (
        some.lists(inner, max_size=4)
        | some.lists(inner, max_size=4).map(tuple)
        | some.dictionaries(some.text(max_size=4).filter(lambda key: key[:1] != "$"), inner, max_size=4)
        | some.dictionaries(some.integers(), inner, max_size=4)
    ),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(_TREES)
def test_any_state_survives_json(tree):
    skeleton, tensors = pack(tree)
    assert repr(unpack(json.loads(json.dumps(skeleton, allow_nan=False)), tensors)) == repr(tree)
