"""A run killed at random moments leaves the same bytes: a short `python -m benchmarks.exactness.kill`."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.exactness import kill

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_leaves_the_same_files_as_an_uninterrupted_one(tmp_path):
    command = [sys.executable, "-m", "benchmarks.exactness.kill", "--kills", "3", "--epochs", "3", "--longest", "7"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "table.md")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "| files that differ from the uninterrupted run | none |" in table
    assert "| steps in the run | 69 |" in table


def test_the_comparison_detects_a_changed_byte_and_a_duplicate_point(digits, quiet, tmp_path):
    import torch

    import torchrelay as tr

    for name in ("one", "other"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        tr.Trainer(model, *digits, epochs=1, terminal=quiet, run=tmp_path / name).fit()
    assert kill.differences(tmp_path / "one", tmp_path / "other") == []
    (events,) = (tmp_path / "one" / "tensorboard" / "test").glob("*.scalars")
    whole = events.read_bytes()
    events.write_bytes(whole + whole)
    assert kill.differences(tmp_path / "one", tmp_path / "other") == ["TensorBoard's points"]
    events.write_bytes(whole)
    state = next((tmp_path / "other" / "checkpoints").glob("step-*/state.safetensors"))
    state.write_bytes(state.read_bytes() + b" ")
    assert kill.differences(tmp_path / "one", tmp_path / "other") == [
        f"checkpoints/{state.parent.name}/state.safetensors"
    ]
