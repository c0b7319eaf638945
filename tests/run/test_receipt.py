"""The receipt: the same bytes however a run was interrupted and on any number of devices; a changed line is found."""

import hashlib
import json
import os
import signal
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay import checkpoint
from torchrelay.checkpoint.format import weights_hash
from torchrelay.errors import Interrupted, RelayError
from torchrelay.run.folder import RunFolder
from torchrelay.run.receipt import NAME, Receipt, Tail, read_receipt

SETTINGS = ("model.name=mlp", "data.batch_size=64", "run.epochs=2", "run.log_every=10", "device.precision=float32")


class Losses(tr.Callback):
    """Keeps all losses; raises an error or sends the signal to stop after a step."""

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at, self.losses = fails_at, {}

    def on_step(self, trainer, batch, loss) -> None:
        self.losses[trainer.step] = loss.item()
        if trainer.step == self.fails_at:
            raise RuntimeError("failed")


def trainer(digits, quiet, folder: Path, *callbacks: tr.Callback, **options) -> tr.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    settings = tr.RunSettings(**{"epochs": 2, "log_every": 4, **options.pop("settings", {})})
    return tr.Trainer(
        model, *digits, batch_size=100, run=folder, terminal=quiet, settings=settings, callbacks=callbacks, **options
    )


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / NAME).read_text().splitlines()]


def test_it_holds_each_steps_loss_and_each_checkpoints_weights_to_the_bit(digits, quiet, tmp_path):
    heard = Losses()
    trainer(digits, quiet, tmp_path / "run", heard).fit()
    found = read_receipt(tmp_path / "run")
    assert found.damage == ""
    assert found.losses == {step: struct.pack(">d", loss).hex() for step, loss in heard.losses.items()}
    assert found.norms == {}
    for path in checkpoint.complete(tmp_path / "run" / "checkpoints"):
        written = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
        assert found.weights.pop(int(path.name[5:])) == written
    assert list(found.weights) == [0]  # of which no checkpoint is kept
    assert found.begins == [0]


def test_it_holds_the_gradients_norm_where_that_is_computed(digits, quiet, tmp_path, same_runs):
    options = {"settings": {"on_spike": "rollback"}, "checkpoint": tr.CheckpointSettings(every="5 steps")}
    trainer(digits, quiet, tmp_path / "whole", Losses(), **options).fit()
    found = read_receipt(tmp_path / "whole")
    assert found.norms.keys() == found.losses.keys()
    assert all(bits != "0" * 16 for bits in found.norms.values())
    with pytest.raises(RelayError, match="failed in on_step"):
        trainer(digits, quiet, tmp_path / "cut", Losses(18), **options).fit()
    trainer(digits, quiet, tmp_path / "cut", Losses(), **options).resume()
    same_runs(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("fails_at", [3, 8, 11, 15, 17, 29])
def test_a_failure_at_any_step_leaves_the_same_receipt_after_the_resume(digits, quiet, tmp_path, same_runs, fails_at):
    """Before the first line, at a line, between line and checkpoint, at a checkpoint, after it."""
    options = {"checkpoint": tr.CheckpointSettings(every="5 steps")}
    trainer(digits, quiet, tmp_path / "whole", Losses(), **options).fit()
    with pytest.raises(RelayError, match="failed in on_step"):
        trainer(digits, quiet, tmp_path / "cut", Losses(fails_at), **options).fit()
    trainer(digits, quiet, tmp_path / "cut", Losses(), **options).resume()
    same_runs(tmp_path / "cut", tmp_path / "whole")


class Hashes(tr.Callback):
    def __init__(self) -> None:
        self.weights: dict[int, str] = {}

    def on_step(self, trainer, batch, loss) -> None:
        self.weights[trainer.step] = weights_hash(trainer.model.state_dict())


def test_it_holds_the_weights_hash_each_so_many_steps_and_each_steps_norm(digits, quiet, tmp_path):
    heard = Hashes()
    settings = {"receipt_every": 4, "evaluate_every": 100}
    saving = tr.CheckpointSettings(every="6 steps")
    trainer(digits, quiet, tmp_path / "run", heard, settings=settings, checkpoint=saving).fit()
    found, last = read_receipt(tmp_path / "run"), max(heard.weights)
    due = {step for step in heard.weights if step % 4 == 0 or step % 6 == 0 or step == last}
    assert due <= found.weights.keys()
    assert all(found.weights[step] == heard.weights[step] for step in found.weights if step)
    assert found.norms.keys() == found.losses.keys() == heard.weights.keys()
    assert found.damage == ""


@pytest.mark.parametrize("fails_at", [3, 8, 10, 12, 13])
def test_a_failure_between_two_hashes_leaves_the_same_receipt_after_the_resume(
    digits, quiet, tmp_path, same_runs, fails_at
):
    options = {"checkpoint": tr.CheckpointSettings(every="5 steps"), "settings": {"receipt_every": 4}}
    trainer(digits, quiet, tmp_path / "whole", Losses(), **options).fit()
    with pytest.raises(RelayError, match="failed in on_step"):
        trainer(digits, quiet, tmp_path / "cut", Losses(fails_at), **options).fit()
    trainer(digits, quiet, tmp_path / "cut", Losses(), **options).resume()
    same_runs(tmp_path / "cut", tmp_path / "whole")


def test_hashes_of_weights_change_nothing_but_the_receipt(digits, quiet, tmp_path):
    for name, every in (("with", 3), ("without", None)):
        trainer(digits, quiet, tmp_path / name, settings={"receipt_every": every}).fit()
    ends = [checkpoint.complete(tmp_path / name / "checkpoints")[-1] for name in ("with", "without")]
    one, other = ((end / "model.safetensors").read_bytes() for end in ends)
    assert one == other
    assert "receipt_every" not in (tmp_path / "without" / "recipe.toml").read_text()


def test_a_norm_that_overflows_is_a_spike_only_where_rollbacks_are_asked_for(digits, quiet, tmp_path):
    """With float16, scaled gradients overflow now and then, and their step is left out."""
    for number, (settings, is_spike) in enumerate([({"receipt_every": 1}, False), ({"on_spike": "rollback"}, True)]):
        detector = trainer(digits, quiet, tmp_path / str(number), settings=settings).train_step.detector
        assert (detector.check(1, torch.tensor(0.5), torch.tensor(torch.inf)) is not None) is is_spike


def test_a_signals_checkpoint_is_not_in_it(digits, quiet, tmp_path, same_runs):
    class Signal(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            if trainer.step == 7:
                signal.raise_signal(signal.SIGTERM)

    trainer(digits, quiet, tmp_path / "whole").fit()
    with pytest.raises(Interrupted):
        trainer(digits, quiet, tmp_path / "cut", Signal()).fit()
    assert 7 not in read_receipt(tmp_path / "cut").weights
    trainer(digits, quiet, tmp_path / "cut").resume()
    same_runs(tmp_path / "cut", tmp_path / "whole")


def test_a_rollback_leaves_the_receipt_of_what_the_run_kept(quiet, tmp_path):
    inputs, targets = torch.rand(80, 4), torch.randint(2, (80,))
    inputs[5] = torch.inf

    def of(folder: Path) -> tr.Trainer:
        torch.manual_seed(0)
        settings = tr.RunSettings(epochs=1, log_every=3, on_spike="rollback")
        model, saving = nn.Linear(4, 2), tr.CheckpointSettings(every="2 steps")
        return tr.Trainer(
            model, (inputs, targets), batch_size=8, run=folder, terminal=quiet, settings=settings, checkpoint=saving
        )

    of(tmp_path / "run").fit()
    found = read_receipt(tmp_path / "run")
    assert len(found.skipped) == 1
    assert sorted({*found.losses, *found.skipped}) == list(range(1, 11))
    assert not found.skipped & found.losses.keys()
    assert found.damage == ""


def test_two_processes_leave_the_receipt_of_one(cli, tmp_path):
    sets = (*SETTINGS, "parallel.replicas=2")
    assert cli("train", "digits", "--run", tmp_path / "one", sets=sets).returncode == 0
    done = cli("train", "digits", "--run", tmp_path / "two", "--devices", "2", sets=sets)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one" / NAME).read_bytes() == (tmp_path / "two" / NAME).read_bytes()
    assert len(read_receipt(tmp_path / "one").losses) == 46


def test_an_older_runs_receipt_begins_where_it_is_resumed(digits, quiet, tmp_path):
    run = tmp_path / "run"
    trainer(digits, quiet, run).fit()
    (run / NAME).unlink()
    longer = trainer(digits, quiet, run, settings={"epochs": 3})
    longer.resume(accept_changes=True)
    found = read_receipt(run)
    assert found.begins == [30]
    assert list(found.losses) == list(range(31, 46))
    assert found.damage == ""


def test_steps_that_an_older_release_trained_in_between_are_a_gap(digits, quiet, tmp_path):
    run, options = tmp_path / "run", {"checkpoint": tr.CheckpointSettings(every="5 steps")}
    trainer(digits, quiet, run, **options).fit()
    cut = [line for line in (run / NAME).read_text().splitlines(keepends=True) if json.loads(line)["step"] <= 12]
    (run / NAME).write_text("".join(cut))
    trainer(digits, quiet, run, settings={"epochs": 3}, **options).resume()
    found = read_receipt(run)
    assert found.begins == [0, 30]
    assert list(found.losses) == [*range(1, 13), *range(31, 46)]
    assert found.damage == ""


def test_what_a_resume_changed_is_in_it_once(cli, tmp_path):
    run = tmp_path / "run"
    assert cli("train", "digits", "--run", run, sets=(*SETTINGS, "run.max_steps=23")).returncode == 0
    sets = ("run.max_steps=30", "optimizer.lr=0.01")
    done = cli("resume", run, "--accept-changes", sets=sets)
    assert done.returncode == 0, done.stderr
    assert cli("resume", run, "--accept-changes", sets=("run.max_steps=46",)).returncode == 0
    assert read_receipt(run).changed == {23: {"optimizer.lr": [0.05, 0.01]}}


# ------------------------------------------------------------------------------------------------ reading


@pytest.fixture
def written(tmp_path) -> Path:
    receipt = Receipt(tmp_path / NAME, fresh=True)
    receipt.begin()
    receipt.add(2, Tail([0.5, 0.25]))
    receipt.add(4, Tail([0.125, 2.0], [1.0, 3.0]))
    receipt.close()
    return tmp_path


def test_a_changed_line_is_found_and_the_rest_is_read(written):
    path = written / NAME
    path.write_text(path.read_text().replace(struct.pack(">d", 0.25).hex(), struct.pack(">d", 0.26).hex()))
    found = read_receipt(written)
    assert found.damage == "line 2, of steps 1 to 2, doesn't match the chain"
    assert len(found.losses) == 4


def test_a_line_that_was_removed_is_found(written):
    path = written / NAME
    first, _, last = path.read_text().splitlines(keepends=True)
    path.write_text(first + last)
    assert "line 2" in read_receipt(written).damage


def test_a_line_that_is_none_is_found(written):
    path = written / NAME
    path.write_text("[3]\n" + path.read_text())
    assert read_receipt(written).damage == "line 1 isn't one of a receipt"


def test_half_a_line_at_the_end_is_no_damage(written):
    path = written / NAME
    path.write_text(path.read_text()[:-20])
    found = read_receipt(written)
    assert found.damage == ""
    assert list(found.losses) == [1, 2]


def test_lines_wait_in_order_for_the_weights_before_them(tmp_path):
    receipt = Receipt(tmp_path / NAME, fresh=True)
    receipt.begin()
    receipt.add(2, Tail([0.5, 0.25]), weights=True)
    receipt.add(3, Tail([0.75]))
    assert len(lines_of(tmp_path)) == 1
    receipt.know(2, "ab")
    receipt.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 2, 3]
    assert read_receipt(tmp_path).weights == {2: "ab"}


def test_a_run_without_one_is_refused(tmp_path):
    with pytest.raises(RelayError, match=r"has no receipt\.jsonl"):
        read_receipt(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it needs Linux's disk that is always full")
def test_a_line_that_the_disk_refused_once_is_neither_lost_nor_written_twice(tmp_path):
    """As where a disk fails as a run ends: the close writes what can be written."""
    receipt = Receipt(tmp_path / NAME, fresh=True)
    receipt.begin()
    receipt.add(1, Tail([0.5]))
    descriptor = receipt._file.fileno()
    whole, full = os.dup(descriptor), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    with pytest.raises(RelayError, match="No space left on device"):
        receipt.add(2, Tail([0.25]))
    os.dup2(whole, descriptor)
    receipt.close()
    for each in (whole, full):
        os.close(each)
    found = read_receipt(tmp_path)
    assert found.damage == ""
    assert list(found.losses) == [1, 2]
    assert len((tmp_path / NAME).read_text().splitlines()) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it needs Linux's disk that is always full")
def test_a_last_line_that_cannot_be_written_is_a_warning(quiet, tmp_path):
    """The hash of the last checkpoint is known when it is on disk, and written as the run closes."""
    run = RunFolder(tmp_path / "run", quiet)
    run.receipt.begin()
    run.receipt.add(1, Tail([0.5]), weights=True)
    run.receipt.know(1, "0" * 64)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, run.receipt._file.fileno())
    os.close(full)
    run.close()
    assert "receipt.jsonl can't be finished" in (tmp_path / "run" / "log.txt").read_text()
