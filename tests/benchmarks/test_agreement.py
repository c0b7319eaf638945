"""A recipe equals a hand-written loop, bit by bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_digits_recipe_agrees_with_the_hand_written_loop_to_the_last_bit(start, tmp_path):
    out = tmp_path / "table.md"
    done = start("--epochs", "2", "--out", out, module="benchmarks.exactness.agreement", folder=ROOT).done()
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in out.read_text().splitlines() if line.startswith("| `digits`"))
    assert row.endswith("| equal | equal (20 tensors) |")
    assert "| 46 |" in row


def test_the_hand_written_loop_does_not_import_torchrelay():
    text = (ROOT / "benchmarks" / "exactness" / "twin.py").read_text()
    assert "import torchrelay" not in text
    assert "from torchrelay" not in text


@pytest.mark.slow
def test_the_comparison_detects_a_changed_learning_rate(tmp_path):
    """With a learning rate that differs by one part in a million, the program reports different weights."""
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
