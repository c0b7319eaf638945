"""Recipes are trained over seeds, listed and compared on the command line."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from torchrelay import cli

SHORT = ("--set=run.epochs=1", "--set=model.name=mlp", "--set=device.threads=1", "--quiet")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for name, lr in (("fast", 0.1), ("slow", 0.0001)):
        line = ["train", "digits", "--seeds", "2", "--run", str(folder / name), f"--set=optimizer.lr={lr}", *SHORT]
        assert cli.main(line) == 0
    return folder


def test_a_recipe_is_trained_over_seeds_to_the_bytes_of_runs_of_their_own(trained, tmp_path, same_runs):
    alone = tmp_path / "alone"
    assert cli.main(["train", "digits", "--run", str(alone), "--set=optimizer.lr=0.1", "--set=run.seed=1", *SHORT]) == 0
    same_runs(alone, trained / "fast" / "seed-1")


def test_a_second_call_trains_only_what_is_missing(tmp_path, capsys):
    line = ["train", "digits", "--seeds", "2", "--run", str(tmp_path / "runs"), *SHORT]
    assert cli.main([*line, "--set=run.max_steps=3"]) == 0
    metrics = tmp_path / "runs" / "seed-0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    assert cli.main([*line[:3], "3", *line[4:-1], "--set=run.max_steps=3"]) == 0
    assert metrics.stat().st_mtime_ns == before
    assert (tmp_path / "runs" / "seed-2" / "evaluation.json").exists()
    assert "test accuracy over 3 seeds: " in capsys.readouterr().out


def test_recipes_are_compared_with_what_differs_a_verdict_and_a_picture(trained, tmp_path, capsys):
    out = tmp_path / "compare.png"
    assert cli.main(["compare", str(trained / "fast"), str(trained / "slow"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "optimizer.lr" in said
    assert "with 2 seeds, in pairs" in said
    with Image.open(out) as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["compare", "RUN/fast/seed-0"], "is one run: give another one"),
        (["compare", "RUN/fast", "RUN/none"], "there is no folder"),
        (["compare", "RUN/fast", "RUN/slow", "--metric", "acuracy"], "no run measured it; did you mean 'accuracy'?"),
        (["compare", "RUN"], "differ in optimizer.lr"),
        (["runs", "RUN", "--sort", "optimizer.rate"], "no run has a key 'optimizer.rate'"),
        (["runs", "RUN", "--filter", "optimizer.lr"], "write a key, one of"),
        (["runs", "RUN/fast/seed-0/checkpoints"], "holds no run"),
    ],
)
def test_wrong_usage_is_one_line(trained, capsys, arguments, error):
    assert cli.main([each.replace("RUN", str(trained)) for each in arguments]) == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1


def listed(capsys, *arguments):
    assert cli.main(["runs", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_are_listed_sorted_and_filtered(trained, capsys):
    runs = listed(capsys, str(trained), "--sort", "last")
    assert len(runs) == 4
    assert {run["status"] for run in runs} == {"done"}
    assert [run["last"] for run in runs] == sorted((run["last"] for run in runs), reverse=True)
    few = listed(capsys, str(trained), "--filter", "optimizer.lr<0.01", "--filter", "run.seed=1")
    assert [run["recipe"]["optimizer.lr"] for run in few] == [0.0001]
    assert cli.main(["runs", str(trained)]) == 0
    table = capsys.readouterr().out
    assert "test accuracy" in table
    assert max(map(len, table.splitlines())) <= 80


def test_listing_runs_needs_no_torch(trained):
    code = "import sys; from torchrelay.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "runs", str(trained)], check=False)
    assert done.returncode == 0
