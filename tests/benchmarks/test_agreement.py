"""A recipe computes what a hand-written loop computes, bit by bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_the_digits_recipe_agrees_with_the_hand_written_loop_to_the_last_bit(start, tmp_path):
    out = tmp_path / "table.md"
    done = start("--epochs", "2", "--out", out, module="benchmarks.exactness.agreement", folder=ROOT).done()
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in out.read_text().splitlines() if line.startswith("| `digits`"))
    assert row.endswith("| equal | equal (20 tensors) |")
    assert "| 46 |" in row


def test_the_hand_written_loop_is_its_own():
    text = (ROOT / "benchmarks" / "exactness" / "twin.py").read_text()
    assert "import torchrelay" not in text
    assert "from torchrelay" not in text


@pytest.mark.slow
def test_the_comparison_can_fail(tmp_path):
    """With another learning rate by one part in a million the weights differ, and the program says so."""
    script = """
import benchmarks.exactness.agreement as agreement, sys
true = agreement.parameters
agreement.parameters = lambda loaded, trainer: {**true(loaded, trainer), "lr": 0.05 * (1 + 1e-6)}
sys.argv = ["agreement"]
agreement.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "**differ**" in done.stdout
