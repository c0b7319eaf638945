"""`--dry-run`, `--overfit` and `find-lr` on the command line."""

import pytest
from PIL import Image

from torchrelay import cli

QUICK = ("--set=model.name=mlp", "--set=device.threads=1")


@pytest.mark.parametrize("option", [("--dry-run",), ("--overfit", "16")])
def test_nothing_is_written_by_what_is_tried_before_a_run(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "digits", *option, *QUICK]) == 0
    assert list(tmp_path.iterdir()) == []
    assert ("the whole run: about" in (said := capsys.readouterr().out)) or "learned 16 samples" in said


def test_a_network_that_learns_nothing_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "digits", "--overfit", "16", "--set=optimizer.lr=1e-9", "--quiet", *QUICK]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the network did not learn 16 samples in 500 steps: loss 2.")
    assert error.count("\n") == 1


def test_overfit_is_for_one_device(capsys):
    assert cli.main(["train", "digits", "--overfit", "16", "--devices", "2"]) == 2
    assert "leave out --devices" in capsys.readouterr().err


def test_a_rate_is_found_and_drawn(tmp_path, capsys):
    out = tmp_path / "rates.png"
    assert cli.main(["find-lr", "digits", "--steps", "40", "--out", str(out), *QUICK]) == 0
    said = capsys.readouterr().out
    assert "suggestion: optimizer.lr=" in said
    assert "(the recipe has 0.05)" in said
    with Image.open(out) as picture:
        assert picture.width == 1500


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--from", "0.1", "--to", "0.01"], "--from 0.1 isn't below --to 0.01"),
        (["--set=optimizer.lr=0"], "optimizer.lr is 0 or unset"),
    ],
)
def test_wrong_rates_are_wrong_usage(arguments, error, capsys):
    assert cli.main(["find-lr", "digits", *arguments]) == 2
    assert error in capsys.readouterr().err


def test_a_rate_that_is_none_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["find-lr", "digits", "--from", "-1"])
    assert "'-1' isn't a rate above 0" in capsys.readouterr().err


def test_several_processes_try_the_same(cli, tmp_path):
    shown = [cli(*line, *QUICK, "--devices=2") for line in (("train", "digits", "--dry-run"), ("find-lr", "digits"))]
    assert [done.returncode for done in shown] == [0, 0], shown
    assert shown[0].stdout.count("the whole run: about") == 1
    assert shown[1].stdout.count("suggestion: ") == 1


@pytest.mark.slow
def test_a_run_has_the_bytes_that_it_has_without_anything_tried_before(cli, tmp_path):
    """By `check`, `--dry-run`, `--overfit` and `find-lr`, in the process that then trains."""
    program = """
import sys
from torchrelay import cli

QUICK = ["--set=model.name=mlp", "--set=device.threads=1", "--set=run.epochs=1"]
tried = {
    "plain": [],
    "tried": [
        ["check", "digits", *QUICK],
        ["train", "digits", "--dry-run", *QUICK],
        ["train", "digits", "--overfit", "8", *QUICK],
        ["find-lr", "digits", "--steps", "20", "--out", "rates.png", *QUICK],
    ],
}
for name, commands in tried.items():
    for command in commands:
        code = cli.main(command)
        assert code == 0, (command, code)
    assert cli.main(["train", "digits", "--quiet", "--run", name, *QUICK]) == 0
"""
    done = cli(program=program, timeout=300)
    assert done.returncode == 0, done.stderr
    receipts = [(tmp_path / name / "receipt.jsonl").read_bytes() for name in ("plain", "tried")]
    assert receipts[0] == receipts[1]
    weights = [[*(tmp_path / name / "checkpoints").rglob("*.safetensors")] for name in ("plain", "tried")]
    assert [path.name for path in weights[0]] == [path.name for path in weights[1]]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
