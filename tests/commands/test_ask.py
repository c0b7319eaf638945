"""`torchrelay ask`: a running run does what it is asked."""

import re

import pytest

import torchrelay.cli

LONG = ("run.epochs=4000", "model.name=mlp", "device.threads=1")


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_running_run_evaluates_saves_and_stops_as_it_is_asked(start, cli, tmp_path, devices):
    run = tmp_path / "run"
    process = start("train", "digits", "--run", run, f"--devices={devices}", sets=LONG)
    process.until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
    for request in ("evaluate", "save"):
        done = cli("ask", run, request)
        assert (done.returncode, done.stdout) == (0, f"asked; {run}/asked-{request} goes when it is done\n")
        process.until(lambda request=request: not (run / f"asked-{request}").exists())
    assert '"asked": true' in (run / "metrics.jsonl").read_text()
    assert cli("ask", run, "stop").returncode == 0
    done = process.done()
    assert done.returncode == 75
    assert re.fullmatch(
        rf"stopped by torchrelay ask after step [\d,]+, saved; resume with: torchrelay resume {run}\n", done.stderr
    )


@pytest.mark.slow
def test_processes_that_would_be_restarted_stop_as_well(start, cli, tmp_path):
    run = tmp_path / "run"
    process = start("train", "digits", "--run", run, "--devices=2", "--restarts=3", sets=LONG)
    process.until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size)
    assert cli("ask", run, "stop").returncode == 0
    done = process.done()
    assert done.returncode == 75
    assert "saved; resume with: torchrelay resume" in done.stderr


def test_a_run_that_is_not_running_and_a_folder_that_is_no_run_are_refused_in_one_line(tmp_path, capsys):
    run = tmp_path / "run"
    assert torchrelay.cli.main(["ask", str(run), "save"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {run} isn't a run: it has no lock")
    run.mkdir()
    (run / "lock").touch()
    assert torchrelay.cli.main(["ask", str(run), "save"]) == 2
    assert capsys.readouterr().err == f"error: {run} isn't running, so nobody is there to save\n"
    assert not (run / "asked-save").exists()
