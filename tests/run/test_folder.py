"""The run folder: its name, its lock, its files, and errors when it can't be written."""

import gzip
import io
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from portalocker import LockException
from portalocker import portalocker as lockers
from torch import nn

import torchrelay as tr
from torchrelay.errors import RelayError, UsageError
from torchrelay.run.folder import RunFolder, check_free, free_folder
from torchrelay.run.metrics import read_metrics
from torchrelay.run.terminal import Terminal


def opened(folder: Path, quiet, resume: bool = False) -> RunFolder:
    return RunFolder(folder, quiet, resume=resume)


@pytest.fixture
def run(tmp_path, quiet):
    run = opened(tmp_path / "run", quiet)
    yield run
    run.close()


# ------------------------------------------------------------------------------------------------ names


def test_a_free_folder_keeps_its_name(tmp_path):
    assert free_folder("digits", tmp_path) == tmp_path / "digits"
    for expected in ("digits", "digits-2", "digits-3"):
        folder = free_folder("digits", tmp_path)
        assert folder.name == expected
        folder.mkdir()
    (tmp_path / "digits-2").rmdir()
    assert free_folder("digits", tmp_path).name == "digits-2"


def test_a_folder_with_a_run_is_not_reused(run, quiet):
    run.write_recipe({"run": {"epochs": 1}})
    run.record({"step": 1, "epoch": 1, "split": "step"})
    run.close()
    with pytest.raises(
        UsageError, match="holds a run already: choose another folder, or resume it by: torchrelay resume"
    ):
        opened(run.path, quiet)
    opened(run.path, quiet, resume=True).close()


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path, quiet):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"a photograph")
    with pytest.raises(UsageError, match="isn't empty and holds no run, but cat: choose a new or an empty folder"):
        opened(tmp_path, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["cat"]


def test_an_empty_folder_and_one_of_a_failed_start_are_used(tmp_path, quiet):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_text("of a file manager")
    opened(tmp_path / "empty", quiet).close()
    opened(tmp_path / "empty", quiet).close()


def test_all_files_of_a_run_are_recognized(digits, quiet, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    tr.Trainer(model, *digits, epochs=1, run=tmp_path / "run", terminal=quiet).fit()
    (tmp_path / "run" / "recipe.toml").unlink()
    opened(tmp_path / "run", quiet).close()


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path, quiet):
    with pytest.raises(UsageError, match="holds no run to resume: give a folder that 'torchrelay train' made"):
        opened(tmp_path / "nothing", quiet, resume=True)
    assert not (tmp_path / "nothing").exists()


# ------------------------------------------------------------------------------------------------ trackers


class Broken:
    """A tracker of the user's that fails in each call."""

    def __init__(self) -> None:
        self.lines = 0

    def write(self, line):
        self.lines += 1
        raise KeyError("no such chart\nin two lines")

    def close(self):
        raise ValueError("nothing is open")


def test_a_tracker_of_ones_own_that_fails_is_left_out_with_one_warning(tmp_path):
    shown, broken = io.StringIO(), Broken()
    run = opened(tmp_path / "run", Terminal(stream=shown))
    run.trackers.append(broken)
    for step in (1, 2):
        run.record({"step": step, "epoch": 1, "split": "step", "loss": 1.0})
    run.close()
    warning = (
        "warning: the tracker Broken failed (KeyError: 'no such chart\\nin two lines'): it is left out of the rest"
    )
    assert shown.getvalue().count("warning") == 1
    assert warning in shown.getvalue()
    assert broken.lines == 1
    assert len(read_metrics(run.path)) == 2


def test_a_tracker_of_ones_own_that_fails_at_the_end_leaves_the_run_done(tmp_path):
    shown = io.StringIO()
    run = opened(tmp_path / "run", Terminal(stream=shown))
    run.trackers.append(Broken())
    run.close()
    assert "the tracker Broken failed (ValueError: nothing is open)" in shown.getvalue()
    opened(run.path, Terminal(quiet=True)).close()


# ------------------------------------------------------------------------------------------------ the lock

HOLDER = """
import os, sys, time
from pathlib import Path
from torchrelay.checkpoint import CheckpointSettings
from torchrelay.run.folder import RunFolder
from torchrelay.run.terminal import Terminal

run = RunFolder(Path(sys.argv[1]), Terminal(quiet=True))
run.write_recipe({})
child = os.fork()  # as a loader's worker is
if child == 0:
    time.sleep(300)
print(child, flush=True)
time.sleep(300)
"""


def test_the_lock_names_its_holder_and_is_free_once_it_is_killed(start, tmp_path, quiet):
    """Even if a forked child of the holder survives."""
    folder = tmp_path / "run"
    holder = start(folder, program=HOLDER)
    child = int(holder.until(lambda: holder.output.endswith("\n") and holder.output))
    with pytest.raises(RelayError) as caught:
        opened(folder, quiet, resume=True)
    assert re.fullmatch(
        rf"{folder} is in use by process {holder.pid} on {re.escape(os.uname().nodename)}: "
        "wait for it, stop it, or choose another run folder",
        str(caught.value),
    )
    holder.send(signal.SIGKILL)
    holder.wait(30)
    os.kill(child, 0)  # it lives
    opened(folder, quiet, resume=True).close()


def test_a_file_system_without_locks_is_a_clear_error(tmp_path, quiet, monkeypatch):
    def refuse(file, flags):
        raise LockException("No locks available")

    monkeypatch.setattr(lockers.LockfLocker, "lock", lambda self, file, flags: refuse(file, flags))
    with pytest.raises(RelayError, match=r"can't lock .*lock: No locks available; put the run folder on a file system"):
        opened(tmp_path / "run", quiet)


# ------------------------------------------------------------------------------------------------ its files


def test_a_line_of_metrics_is_standard_json(run):
    run.record({"step": 1, "split": "train", "loss": math.nan, "accuracy": math.inf, "name": "Zähler"})
    (line,) = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "split": "train", "loss": None, "accuracy": None, "name": "Zähler",
    }  # fmt: skip


def test_a_log_line_has_a_timestamp(run):
    run.say("hello")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d hello\n", (run.path / "log.txt").read_text())


def test_the_recipe_is_written_whole_and_read_again(run):
    record = {"run": {"epochs": 3}, "data": {"root": "a\nb"}, "environment": {"torch": "2"}}
    run.write_recipe(record)
    assert run.read_recipe() == record
    assert not list(run.path.glob("*.partial"))


def test_metrics_are_truncated_to_a_checkpoint(run):
    run.record({"step": 1, "split": "train", "loss": 1.0})
    lines = run.metrics_lines
    run.record({"step": 2, "split": "train", "loss": 0.5})
    run.rewind(lines)
    assert run.metrics_lines == lines == 1
    run.record({"step": 2, "split": "train", "loss": 0.25})
    assert [line["loss"] for line in read_metrics(run.path)] == [1.0, 0.25]


# ------------------------------------------------------------------------------------------------ what goes wrong


def train(digits, quiet, folder: Path, epochs: int = 3) -> tr.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return tr.Trainer(model, *digits, epochs=epochs, batch_size=100, run=folder, terminal=quiet)


def test_a_half_written_line_of_metrics_is_dropped_at_a_resume(digits, quiet, tmp_path, same_runs):
    """As after kill -9 in the middle of a write."""

    class Stumble(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            if trainer.step == 20:
                raise RuntimeError("stumbled")

    train(digits, quiet, tmp_path / "undisturbed").fit()
    trainer = train(digits, quiet, tmp_path / "torn")
    trainer.callbacks.append(Stumble())
    with pytest.raises(RelayError, match="stumbled"):
        trainer.fit()
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "epo')
    assert read_metrics(tmp_path / "torn")[-1]["step"] == 15
    train(digits, quiet, tmp_path / "torn").resume()
    same_runs(tmp_path / "undisturbed", tmp_path / "torn")


# ------------------------------------------------------------------------------------------------ what a fuzzer found


@pytest.mark.parametrize("content", [b"epochs = ", b"\xff", b"data = 3", b"a = " + b"[" * 5000, b"a = " + b"9" * 5000])
def test_a_damaged_recipe_is_named_with_the_remedy(run, content):
    (run.path / "recipe.toml").write_bytes(content)
    with pytest.raises(RelayError, match=r"recipe\.toml is damaged or isn't ours .*restore it from a copy"):
        run.read_recipe()
    with pytest.raises(UsageError, match="holds a run already"):
        check_free_with_a_checkpoint(run.path)


def check_free_with_a_checkpoint(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("{}\n")
    check_free(folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:90] + b"\xff" * 9 + b[99:], lambda _: b"x"])
def test_a_damaged_list_of_files_is_named_with_the_remedy(run, damage):
    run.write_files({f"{number}.png": f"{number:032x}" for number in range(50)})
    path = run.path / "files.json.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RelayError, match=r"files\.json\.gz.*remove it to resume|can't read"):
        run.read_files()


def test_a_list_of_files_that_expands_without_end_is_refused(run):
    (run.path / "files.json.gz").write_bytes(gzip.compress(b'{"a": "' + b" " * 10**7 + b'"}'))
    with pytest.raises(RelayError, match="is damaged or isn't ours"):
        run.read_files()


@pytest.mark.parametrize("line", ["3", "[]", '{"step": "x", "split": "train", "loss": 1}', '{"epoch": 1}', "[" * 5000])
def test_a_damaged_line_of_metrics_is_refused_at_a_resume(run, line):
    run.record({"step": 1, "epoch": 1, "split": "train", "loss": 0.5})
    path = run.path / "metrics.jsonl"
    path.write_text(f"{line}\n" + path.read_text())
    with pytest.raises(RelayError, match=r"metrics\.jsonl is damaged"):
        run.rewind(2)
