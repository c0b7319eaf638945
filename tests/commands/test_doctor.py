"""`torchrelay doctor`: what this machine has; and with --deep, whether a recipe's layers can be trusted on it."""

import re

import pytest

from torchrelay.cli import main

PLANTED = """\
import torch
from torch import nn

class Unsure(nn.Linear):
    calls = 0

    def forward(self, inputs):
        Unsure.calls += 1
        return super().forward(inputs) * (1 + Unsure.calls)

def net(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Unsure(16, classes))
"""


@pytest.fixture
def uncompiled(monkeypatch):
    """Leave out the compiler, which takes a minute; its test is in tests/train/test_layers.py."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch.compile", refuse)


def test_a_table_shows_what_the_machine_has(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "threads" in out
    rates = [
        float(rate.replace(",", "")) for rate in re.findall(r"(?:float32|bf16) products +([\d,.e+]+) GFLOP/s", out)
    ]
    assert len(rates) == 2
    assert rates[0] > 0
    assert ("slower: keep device.precision float32" in out) == (rates[1] < rates[0])
    assert "torch " in out


@pytest.mark.usefixtures("uncompiled")
def test_the_layers_of_a_shipped_recipe_are_right_and_the_same_twice(capsys):
    assert main(["doctor", "--deep", "digits", "--set", "data.batch_size=8"]) == 0
    out = capsys.readouterr().out
    assert "block1.0" in out
    assert "not possible here (RuntimeError: no compiler)" in out
    assert "all 14 layers are right, and the same twice" in out


@pytest.mark.usefixtures("uncompiled")
def test_a_layer_that_differs_the_second_time_ends_with_its_name(tmp_path, capsys):
    code = tmp_path / "net.py"
    code.write_text(PLANTED, encoding="utf-8")
    changes = ["--set", "model.name=net", "--set", "data.batch_size=8"]
    assert main(["doctor", "--deep", "digits", "--code", str(code), *changes]) == 1
    captured = capsys.readouterr()
    assert "DIFFERS" in captured.out
    assert "1 of 3 layers can't be trusted here (2): try device.precision=float32" in captured.err


def test_a_recipe_that_does_not_exist_is_wrong_usage(capsys):
    assert main(["doctor", "--deep", "digit"]) == 2
    assert "digits" in capsys.readouterr().err
