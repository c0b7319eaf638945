"""Sweeps by real processes: promoted bit for bit, killed anywhere, joined, continued, refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from torchrelay import cli as command_line
from torchrelay.report.sweep.journal import Journal
from torchrelay.report.sweep.plan import read_plan

VARY = ("--vary=optimizer.lr=1e-3..1:log", "--vary=data.batch_size=256|512")
SHORT = ("--set=model.name=mlp", "--set=run.epochs=9", "--set=device.threads=1")
LINE = ("sweep", "digits", *VARY, *SHORT)


def known(folder):
    journal = Journal(folder, read_plan(folder))
    with journal.hold():
        return journal.trials()


def facts(folder):
    """What must not depend on how often a sweep was killed."""
    return [(each.values, each.state, each.reached, each.reason) for each in known(folder)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    assert command_line.main([*LINE, "--trials", "9", "--run", str(folder)]) == 0
    return folder


def test_a_trial_that_was_promoted_has_the_bytes_of_a_run_of_its_own(swept, tmp_path, same_runs):
    promoted = [each for each in known(swept) if each.state == "done"]
    assert promoted
    assert all(each.rung == 3 for each in promoted)
    best = read_plan(swept).halving.best(known(swept))
    alone = tmp_path / "alone"
    assert command_line.main(["train", str(swept / "best.toml"), "--run", str(alone), "--quiet"]) == 0
    same_runs(alone, swept / best.name)
    assert (alone / "recipe.toml").read_text() == (swept / best.name / "recipe.toml").read_text()


def test_a_paused_trial_is_an_ordinary_run_that_is_resumed_to_its_end(swept, tmp_path, same_runs):
    paused = next(each for each in known(swept) if each.state == "open")
    copy, alone = tmp_path / "copy", tmp_path / "alone"
    subprocess.run(["cp", "-r", str(swept / paused.name), str(copy)], check=True)
    recipe = str(copy / "recipe.toml")
    assert command_line.main(["train", recipe, "--run", str(alone), "--quiet"]) == 0
    assert command_line.main(["resume", str(copy), "--quiet"]) == 0
    same_runs(alone, copy)


def test_a_sweep_stops_most_trials_early_and_writes_a_page_and_the_best_recipe(swept, capsys):
    trials = known(swept)
    assert len(trials) == 9
    assert sum(each.rung == 1 for each in trials) > 2
    best = read_plan(swept).halving.best(trials)
    table = tomllib.loads((swept / "best.toml").read_text())
    assert table["optimizer"]["lr"] == best.values["optimizer.lr"]
    page = (swept / "sweep.html").read_text()
    assert f'data-trial="{best.number}"' in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert command_line.main(["runs", str(swept)]) == 0
    assert "trial-008" in capsys.readouterr().out


def test_the_same_command_goes_on_and_more_trials_are_what_a_longer_sweep_had(swept, tmp_path, capsys):
    short = tmp_path / "short"
    assert command_line.main([*LINE, "--trials", "4", "--rungs", "1", "--run", str(short)]) == 0
    assert command_line.main([*LINE, "--trials", "6", "--run", str(short)]) == 0
    long = tmp_path / "long"
    assert command_line.main([*LINE, "--trials", "6", "--rungs", "1", "--run", str(long)]) == 0
    assert facts(short) == facts(long)
    assert "6 trials" in capsys.readouterr().out
    before = (long / "journal").read_bytes()
    assert command_line.main(["sweep", str(long), "--rungs", "1"]) == 0
    assert (long / "journal").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*LINE, "--set=optimizer.momentum=0.5"], "optimizer.momentum was 0.9 and is 0.5"),
        ([*LINE[:2], "--vary=optimizer.lr=1e-3..1:log", *SHORT], "vary was"),
        ([*LINE, "--reduction", "2"], "reduction was 3 and is 2"),
        ([*LINE, "--sampler", "random"], "sampler was tpe and is random"),
    ],
)
def test_another_sweep_in_its_folder_is_refused_with_the_difference(swept, arguments, says, capsys):
    assert command_line.main([*arguments, "--run", str(swept)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep", "digits"], "nothing to vary"),
        (["sweep", "digits", "--vary", "optimizer.lr=1..0"], "isn't below"),
        ([*LINE, "--metric", "acuracy"], "did you mean 'accuracy'"),
        ([*LINE, "--set", "run.evaluate_every=10 min"], "give epochs or steps"),
        ([*LINE, "--sampler", "grid"], "a grid needs the values themselves"),
        (["sweep", "nothing.toml", *VARY], "there is no recipe"),
        ([*LINE, "--time", "5"], "'5' is no duration"),
        ([*LINE, "--code", "missing.py"], "there is no such file"),
    ],
)
def test_wrong_usage_is_a_line_and_makes_nothing(tmp_path, monkeypatch, arguments, says, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = command_line.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert command_line.main([*LINE, "--run", str(tmp_path)]) == 2
    assert "isn't empty and holds no sweep, but notes.txt" in capsys.readouterr().err


def test_a_trial_that_diverges_is_recorded_with_its_reason_and_the_sweep_goes_on(tmp_path, capsys):
    folder = tmp_path / "sweep"
    line = ["sweep", "digits", "--vary=optimizer.lr=1e6|0.05", "--sampler=grid", *SHORT, "--rungs=1"]
    assert command_line.main([*line, "--run", str(folder), "--set=run.epochs=1"]) == 0
    failed, done = known(folder)
    assert (failed.state, done.state) == ("failed", "done")
    assert "loss" in failed.reason
    assert "failed" in capsys.readouterr().out
    assert "failed: " in (folder / "sweep.html").read_text()


def test_a_sweep_whose_trials_all_fail_says_so(tmp_path, capsys):
    line = ["sweep", "digits", "--vary=optimizer.lr=1e5..1e7:log", *SHORT, "--trials=9"]
    assert command_line.main([*line, "--run", str(tmp_path / "sweep")]) == 1
    error = capsys.readouterr().err
    assert "the first 5 trials have all failed; trial-000: " in error
    assert error.count("\n") == 1


def test_without_optuna_the_error_names_the_command_that_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert command_line.main([*LINE, "--run", str(tmp_path / "sweep")]) == 2
    assert "pip install 'torchrelay[sweep]'" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


# ------------------------------------------------------------------------------------------------ real processes


def killed_at_random(start, folder, kills, seed):
    """Sweep, and kill it some moments after a job began; then let it end."""
    draw = random.Random(seed)
    for _ in range(kills):
        process = start(*LINE, "--trials", "9", "--run", folder)
        journal = folder / "journal"
        size = journal.stat().st_size if journal.exists() else 0
        process.until(lambda: journal.exists() and journal.stat().st_size > size + 400)  # noqa: B023
        time.sleep(draw.random() * 0.4)
        process.end(signal.SIGKILL)
    return start(*LINE, "--trials", "9", "--run", folder).done()


@pytest.mark.slow
def test_a_sweep_killed_anywhere_ends_as_one_that_was_not(swept, tmp_path, start, same_runs):
    folder = tmp_path / "sweep"
    done = killed_at_random(start, folder, kills=6, seed=1)
    assert done.returncode == 0, done.stderr
    assert facts(folder) == facts(swept)
    for each in known(swept):
        same_runs(swept / each.name, folder / each.name)


def test_a_half_written_line_of_the_journal_is_cut_off(swept, tmp_path):
    folder = tmp_path / "sweep"
    subprocess.run(["cp", "-r", str(swept), str(folder)], check=True)
    before = facts(folder)
    with (folder / "journal").open("a") as file:
        file.write('{"op_code":7,"worker_id":"x","trial_')
    assert facts(folder) == before
    assert (folder / "journal").read_bytes() == (swept / "journal").read_bytes()


@pytest.mark.ci
def test_a_signal_saves_the_trial_in_progress_and_says_how_to_go_on(swept, tmp_path, start, same_runs):
    folder = tmp_path / "sweep"
    process = start(*LINE, "--trials", "9", "--run", folder)
    process.until(lambda: (folder / "trial-001" / "checkpoints").exists())
    process.send(signal.SIGTERM)
    done = process.done()
    assert done.returncode == 75
    assert f"go on with: torchrelay sweep {folder}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert start("sweep", folder).done().returncode == 0
    assert facts(folder) == facts(swept)
    for each in known(swept):
        same_runs(swept / each.name, folder / each.name)


@pytest.mark.slow
def test_two_workers_and_a_third_process_share_a_sweep_and_each_trial_has_its_own_bytes(
    swept, tmp_path, start, same_runs
):
    folder = tmp_path / "sweep"
    line = (*LINE, "--trials", "9", "--sampler", "random", "--run", folder)
    process = start(*line, "--workers", "2")
    process.until(lambda: (folder / "trial-000").exists())
    joined = start(*line)
    killed = process.until(lambda: [pid for pid in children(process.pid) if "--worker" in arguments_of(pid)])
    time.sleep(1)
    os.kill(killed[0], signal.SIGKILL)
    assert joined.done().returncode == 0
    process.done()
    trials = known(folder)
    assert len(trials) == 9
    assert all(each.state != "failed" and each.target == each.rung for each in trials)
    best = read_plan(folder).halving.best(trials)
    assert command_line.main(["train", str(folder / "best.toml"), "--run", str(tmp_path / "alone"), "--quiet"]) == 0
    same_runs(tmp_path / "alone", folder / best.name)


@pytest.mark.ci
def test_the_time_ends_a_sweep_which_goes_on_later(tmp_path, start):
    folder = tmp_path / "sweep"
    done = start(*LINE[:-3], "--set=model.name=mlp", "--set=run.epochs=900", "--time", "3s", "--run", folder).done()
    assert done.returncode == 0, done.stderr
    assert "the time is over; go on with: torchrelay sweep" in done.stdout
    checkpoints = [path for path in (folder / "trial-000" / "checkpoints").iterdir() if path.name.startswith("step-")]
    assert max(int(path.name[5:]) for path in checkpoints) > 0


def test_workers_share_cuda_devices_in_turn():
    from torchrelay.report.sweep.fleet import environments

    assert environments(3, None, 2) == [{"CUDA_VISIBLE_DEVICES": each} for each in "010"]
    assert environments(2, "4,7", 2) == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    assert environments(2, None, 1) == [{}, {}]


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def arguments_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_a_trial_whose_worker_always_dies_fails_after_some_attempts(swept, tmp_path):
    folder = tmp_path / "sweep"
    subprocess.run(["cp", "-r", str(swept), str(folder)], check=True)
    journal = Journal(folder, read_plan(folder))
    with journal.hold():
        trial = next(each for each in journal.trials() if each.state == "open")
        for _ in range(5):
            journal.assign(journal.trials()[trial.number], 2, 3)
        assert journal.trials()[trial.number].attempts == 5
        journal.assign(journal.trials()[trial.number], 2, 6)  # it has come further
        assert journal.trials()[trial.number].attempts == 1
    assert json.loads((folder / "journal").read_text().splitlines()[-1])["user_attr"] == {"attempts": 1}
