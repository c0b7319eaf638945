"""A run's facts come from its files, whatever state they are in."""

import math
import subprocess
import sys

import pytest

from torchrelay.errors import RelayError, UsageError
from torchrelay.report.compare.facts import find_runs, read_all, read_facts, varied
from written_runs import write_run


def test_a_run_is_summed_up(tmp_path):
    found = read_facts(write_run(tmp_path / "a", (0.5, 0.9, 0.75), seed=3, optimizer_lr=0.1))
    assert (found.seed, found.epoch, found.split, found.status, found.seconds) == (3, 3, "test", "done", 7.5)
    assert found.headline.name == "accuracy"
    assert (found.at_end("accuracy"), found.at_best(found.headline)) == (0.75, 0.9)
    assert found.recipe == {"optimizer.lr": 0.1}


def test_a_run_that_goes_on_for_more_epochs_is_not_done(tmp_path):
    run = write_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "epoch": 3, "split": "step", "loss": 1.0}\n')
    assert read_facts(run).status == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who holds a lock")
def test_a_run_is_running_as_long_as_its_process_holds_the_lock(tmp_path):
    run = write_run(tmp_path / "a")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from torchrelay.run.lock import lock\n"
            "file = open(sys.argv[1], 'w'); lock(file, wait=False); print('held', flush=True); input()",
            str(run / "lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    assert read_facts(run).status == "running"
    holder.communicate("\n")
    assert read_facts(run).status == "done"


def test_a_run_that_is_being_written_is_read_without_its_last_half_line(tmp_path):
    run = write_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "ep')
    assert read_facts(run).epoch == 2


def test_a_run_without_a_line_has_no_metric(tmp_path):
    found = read_facts(write_run(tmp_path / "a", ()))
    assert math.isnan(found.at_end("accuracy"))
    assert (found.epoch, found.status) == (0, "stopped")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="isn't a run"):
        read_facts(tmp_path)
    with pytest.raises(UsageError, match="there is no folder"):
        list(find_runs(tmp_path / "missing"))


def test_damaged_runs_are_left_out_with_a_line(tmp_path):
    write_run(tmp_path / "deep" / "good")
    (write_run(tmp_path / "bad") / "recipe.toml").write_text("[run\n")
    found, damaged = read_all(tmp_path)
    assert [run.name for run in found] == ["deep/good"]
    assert len(damaged) == 1
    assert "recipe.toml" in damaged[0]
    with pytest.raises(RelayError):
        read_facts(tmp_path / "bad")


def test_keys_in_which_runs_differ_are_found(tmp_path):
    one = read_facts(write_run(tmp_path / "a", optimizer_lr=0.1, model_name="mlp"))
    other = read_facts(write_run(tmp_path / "b", seed=1, optimizer_lr=0.2, model_name="mlp", model_ema=0.9))
    assert varied([one, other]) == ["run.seed", "optimizer.lr", "model.ema"]
