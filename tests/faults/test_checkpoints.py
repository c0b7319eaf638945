"""Checkpoints that are damaged, half written, all gone, or of another release."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from torchrelay import checkpoint
from torchrelay.checkpoint import Contents
from torchrelay.checkpoint.format import FORMAT
from torchrelay.checkpoint.retention import prune

SETTINGS = ("run.epochs=4", 'checkpoint.every="10 steps"', "checkpoint.keep=3")


@pytest.fixture(scope="module")
def runs(_server, tmp_path_factory) -> tuple[Path, Path]:
    """A run that stopped after step 46, with three checkpoints or more, and one that ran to the end."""
    folder = tmp_path_factory.mktemp("runs")
    train = ("train", "digits", "--run")
    for name, limit in (("stopped", ("run.max_steps=46",)), ("undisturbed", ())):
        done = _server.start(*train, folder / name, folder=folder, sets=(*SETTINGS, *limit)).done()
        assert done.returncode == 0, done.stderr
    return folder / "stopped", folder / "undisturbed"


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of the stopped run, to be damaged."""
    return shutil.copytree(runs[0], tmp_path / "run")


def going_on(cli, run: Path):
    """Resume to the end."""
    return cli("resume", run, sets=("run.max_steps=92",))


def flip(file: Path, offset: int) -> None:
    """Change one bit of a byte."""
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


# ------------------------------------------------------------------------------------------------ 2: half written

DRIVER = """
import os, shutil, signal, sys
from pathlib import Path

import torch
from torchrelay import checkpoint
from torchrelay.checkpoint import Contents
from torchrelay.checkpoint.retention import prune

folder, seen = Path(sys.argv[1]), Path(sys.argv[2])
step, value, keep, last = map(int, sys.argv[3:7])
WATCHED = {"mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "write", "serialize_file", "truncate"}
moment = 0


def watch(frame, event, what):
    # Before every call that may change the disk: between two of them it stays as it is.
    global moment
    if event == "c_call" and what.__name__ in WATCHED:
        moment += 1
        shutil.copytree(folder, seen / str(moment))
        if moment == last:
            os.kill(os.getpid(), signal.SIGKILL)


contents = Contents(step, {"w": torch.full((50,), float(value))}, {"value": value}, score=value / 100)
sys.setprofile(watch)
checkpoint.write(folder, contents)
prune(folder, keep, 0)
sys.setprofile(None)
print(moment)
"""


def files(folder: Path) -> dict[Path, bytes | None]:
    """The contents of a folder: the bytes of each file, None for each folder."""
    paths = folder.rglob("*")
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in paths}


def write_and_die(server, tmp_path: Path, before: list[tuple[int, int]], now: tuple[int, int], keep: int) -> set[float]:
    """Examine each moment of writing a checkpoint (step, value) beside earlier ones; return the values found.

    A killed process leaves the disk as it was at that moment. So one process copies the folder at each moment, and
    others, killed at some of these moments, confirm that they leave the same.
    """
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    good = tmp_path / "good"
    for step, value in before:
        checkpoint.write(good, Contents(step, {"w": torch.full((50,), float(value))}, {"value": value}))

    def drive(name: str, last: int) -> tuple[Path, Path, Any]:
        folder, seen = shutil.copytree(good, tmp_path / name), tmp_path / f"{name}-seen"
        return folder, seen, server.start(folder, seen, *now, keep, last, folder=tmp_path, script=script)

    whole, seen, process = drive("whole", 0)
    assert process.wait() == 0, process.errors
    moments = int(process.output)
    assert moments > 20
    shutil.copytree(whole, seen / str(moments + 1))
    for moment in (moments // 3, moments):  # the copies are what a kill really leaves
        killed, _, process = drive(f"killed-{moment}", moment)
        assert process.wait() == -9, process.errors
        assert files(killed) == files(seen / str(moment))
    found = set()
    for folder in sorted(seen.iterdir(), key=lambda path: int(path.name)):
        contents = checkpoint.newest(folder, warn=pytest.fail)
        assert contents is not None, f"neither loads after a kill at moment {folder.name}"
        assert contents.model["w"].tolist() == [contents.state["value"]] * 50
        found.add(contents.state["value"])
        # The next one can be written there, whatever was left behind.
        checkpoint.write(folder, Contents(99, {"w": torch.full((50,), 99.0)}, {"value": 99}))
        assert checkpoint.newest(folder, warn=pytest.fail).step == 99
    return found


def test_a_kill_between_any_two_steps_of_a_save_leaves_the_old_or_the_new_checkpoint(server, tmp_path):
    assert write_and_die(server, tmp_path, [(1, 1)], (2, 2), keep=2) == {1, 2}


def test_a_kill_while_old_checkpoints_are_deleted_leaves_one_that_loads(server, tmp_path):
    assert write_and_die(server, tmp_path, [(1, 1), (2, 2), (3, 3)], (4, 4), keep=1) == {3, 4}


# ------------------------------------------------------------------------------------------------ 3, 4, 5: damaged


def test_a_truncated_checkpoint_is_skipped_with_a_warning(cli, run, runs, same_runs):
    newest = checkpoint.complete(run / "checkpoints")[-1]
    truncate(newest / "model.safetensors")
    done = going_on(cli, run)
    assert done.returncode == 0, done.stderr
    assert f"skipped a damaged checkpoint: {newest}/model.safetensors has " in done.stdout
    assert "resuming after step 40 of 92" in done.stdout
    same_runs(run, runs[1])


def test_a_flipped_bit_of_a_tensor_is_a_checksum_mismatch(cli, run, runs, same_runs):
    newest = checkpoint.complete(run / "checkpoints")[-1]
    flip(newest / "state.safetensors", -5)
    done = going_on(cli, run)
    assert done.returncode == 0, done.stderr
    assert f"skipped a damaged checkpoint: {newest}/state.safetensors doesn't match its checksum" in done.stdout
    same_runs(run, runs[1])


def test_an_error_lists_every_checkpoint_if_all_are_damaged(cli, one_line, run):
    paths = checkpoint.complete(run / "checkpoints")
    assert len(paths) > 2
    for path in paths:
        flip(path / "model.safetensors", -5)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    done = going_on(cli, run)
    line = one_line(done, f"no checkpoint in {run}/checkpoints can be used")
    for path in paths:
        assert f"{path}/model.safetensors doesn't match its checksum" in line
    assert "epoch" not in done.stdout, "it has not started afresh"
    kept = {path: path.read_bytes() for path in before if path.exists() and path.name not in ("lock",)}
    assert kept == {path: content for path, content in before.items() if path.name != "lock"}


# ------------------------------------------------------------------------------------------------ 6: no manifest


def test_a_folder_without_a_manifest_is_no_checkpoint_and_is_replaced(cli, run, runs, same_runs):
    checkpoints = run / "checkpoints"
    newest = checkpoint.complete(checkpoints)[-1]
    (newest / "manifest.json").unlink()
    shutil.copytree(newest, checkpoints / "step-00000050")  # its step is saved again
    shutil.copytree(newest, checkpoints / ".step-00000060.partial")
    (checkpoints / "step-00000070").mkdir()
    done = going_on(cli, run)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stdout
    assert "resuming after step 40 of 92" in done.stdout
    same_runs(run, runs[1])
    for step in (50, 60, 70):
        assert not (checkpoints / f".step-{step:08d}.partial").exists()


# ------------------------------------------------------------------------------------------------ 23: the clock

YESTERDAY = """
import sys, time
from torchrelay import cli

now = time.time
time.time = lambda: now() - 86_400
sys.exit(cli.main())
"""


def test_the_highest_step_is_resumed_even_if_the_clock_was_set_back(start, run, runs, same_runs, tmp_path):
    for age, path in enumerate(checkpoint.complete(run / "checkpoints")):
        for file in (*path.iterdir(), path):
            os.utime(file, (time.time() - age * 86_400,) * 2)  # the newest looks oldest
    script = tmp_path / "yesterday.py"
    script.write_text(YESTERDAY)
    done = start("resume", run, script=script, sets=("run.max_steps=92",)).done()
    assert done.returncode == 0, done.stderr
    assert "resuming after step 46 of 92" in done.stdout
    same_runs(run, runs[1])


# ------------------------------------------------------------------------------------------------ 36: releases


def relabel(path: Path, number: int) -> None:
    """Make a checkpoint say that it has another format."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format"] = number
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_checkpoint_of_a_later_release_is_refused_by_its_version(cli, one_line, run, command):
    for path in checkpoint.complete(run / "checkpoints"):
        relabel(path, FORMAT + 1)
    done = cli(command, run)
    one_line(done, f"was written by a later release (format {FORMAT + 1})", "upgrade torchrelay")
    assert len(checkpoint.complete(run / "checkpoints")) > 2


def test_a_checkpoint_of_this_release_states_its_format_and_loads(run):
    for path in checkpoint.complete(run / "checkpoints"):
        assert json.loads((path / "manifest.json").read_text())["format"] == FORMAT == 1
        checkpoint.read(path)


def test_a_kill_while_a_step_is_saved_again_leaves_the_old_or_the_new_checkpoint(server, tmp_path):
    """A run that is resumed and stopped before its first step does this; there may be no other checkpoint."""
    assert write_and_die(server, tmp_path, [(3, 3)], (3, 4), keep=1) == {3, 4}


def test_a_checkpoint_with_a_truncated_manifest_is_skipped_with_a_warning(cli, run, runs, same_runs):
    newest = checkpoint.complete(run / "checkpoints")[-1]
    truncate(newest / "manifest.json")
    assert cli("evaluate", run).returncode == 0
    done = going_on(cli, run)
    assert done.returncode == 0, done.stderr
    assert f"skipped a damaged checkpoint: {newest}/manifest.json can't be read" in done.stdout
    same_runs(run, runs[1])


def test_a_flipped_bit_in_a_manifest_is_detected(tmp_path):
    """Other code trusts its step, score and file list."""
    for step in (1, 2):
        checkpoint.write(
            tmp_path, Contents(step, {"w": torch.ones(4)}, {"v": step}, score=step / 4, metrics={"a": 1.0})
        )
    manifest = tmp_path / "step-00000002" / "manifest.json"
    whole = manifest.read_bytes()
    for offset in range(len(whole)):
        flip(manifest, offset)
        warned = []
        found = checkpoint.newest(tmp_path, warned.append)
        prune(tmp_path, keep=2, keep_best=1)
        assert checkpoint.best(tmp_path).is_dir()
        if found.step == 2:
            assert (found.score, found.metrics) == (0.5, {"a": 1.0}), whole[offset - 10 : offset + 10]
        else:
            assert warned
        manifest.write_bytes(whole)


def test_a_checkpoint_of_a_later_release_is_not_treated_as_damaged(cli, one_line, run):
    """Resuming from the checkpoint before it would eventually discard the later release's work."""
    newest = checkpoint.complete(run / "checkpoints")[-1]
    relabel(newest, FORMAT + 1)
    one_line(cli("resume", run), f"{newest} was written by a later release", "upgrade torchrelay")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again_from_its_pretrained_weights(
    cli, same_runs, tmp_path
):
    """The first checkpoint is that of step 0; before it, there is only the recipe."""
    sets = ["run.max_steps=2", "device.threads=1", "device.precision=float32"]
    assert cli("train", "digits", "--run", "first", sets=[*sets, "run.seed=5"]).returncode == 0
    weights = tmp_path / "first" / "checkpoints" / "step-00000002" / "model.safetensors"
    assert cli("train", "digits", "--run", "whole", sets=[*sets, f"model.pretrained={weights}"]).returncode == 0
    (tmp_path / "killed").mkdir()
    shutil.copy(tmp_path / "whole" / "recipe.toml", tmp_path / "killed")
    assert cli("resume", "killed").returncode == 0
    same_runs(tmp_path / "whole", tmp_path / "killed")
