"""The examples, each run as the script it is."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchrelay import checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CALL = """
import sys
import warnings

sys.path.insert(0, {folder!r})
import {name}

warnings.filterwarnings("error", category=UserWarning, module="torchrelay")
print("returned", {call})
"""


def started(name: str, call: str, folder: Path, **pipes) -> subprocess.Popen[str]:
    """Start a process that imports an example and calls it, in a folder of its own."""
    script = f"import {name}; print('returned', {call})"
    command = [sys.executable, "-W", "error::UserWarning:torchrelay", "-c", script]
    environment = ENVIRONMENT | {"PYTHONPATH": str(EXAMPLES)}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def outcome(name: str, call: str, folder: Path) -> float:
    """Call an example in a process of its own and return what it returned."""
    process = started(name, call, folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert err == ""
    return float(out.split("returned ")[1])


def test_each_example_has_a_test():
    own = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"def test_{path.stem}_" in own, path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_shows(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 80
    assert lines[0].startswith('"""')


def test_own_model_learns(tmp_path, start):
    script = tmp_path / "call.py"
    script.write_text(CALL.format(folder=str(EXAMPLES), name="own_model", call="own_model.main(epochs=5)"))
    done = start(script=script, plots=True).done()
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout.split("returned ")[1]) > 0.95
    assert (tmp_path / "runs" / "own-model" / "curves.png").exists()


def test_own_task_learns_to_reconstruct_run_by_its_own_name(tmp_path, start):
    """As its reader starts it. The squared error is that of 64 pixels in [0, 1]; the mean picture's is above 4."""
    done = start(script=EXAMPLES / "own_task.py").done()
    assert done.returncode == 0, done.stderr
    assert re.search(r"^epoch 10: ", done.stdout, re.M)
    assert json.loads((tmp_path / "runs" / "own-task" / "evaluation.json").read_text())["squared_error"] < 2.5


@pytest.mark.slow
def test_fine_tune_takes_the_weights_over_and_a_new_head(tmp_path):
    assert outcome("fine_tune", "fine_tune.main(epochs=4)", tmp_path) > 0.95
    for part in ("before", "after"):
        assert (tmp_path / "runs" / "fine-tune" / part / "checkpoints").is_dir()


@pytest.mark.slow
def test_own_data_gives_the_same_bytes_with_and_without_workers(tmp_path, same_runs):
    for workers in (0, 2):
        call = f"own_data.main(run='{workers}', epochs=4, workers={workers})"
        assert outcome("own_data", call, tmp_path) > 0.9
    same_runs(tmp_path / "0", tmp_path / "2")


@pytest.mark.slow
def test_own_loop_killed_and_started_again_goes_on_to_the_same_bytes(tmp_path):
    epochs = 40
    steps = outcome("own_loop", f"own_loop.main(run='undisturbed', epochs={epochs})", tmp_path)
    assert steps == 23 * epochs
    process = started("own_loop", f"own_loop.main(run='killed', epochs={epochs})", tmp_path, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "checkpoints"
    while not checkpoint.complete(checkpoints):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert len(checkpoint.complete(checkpoints)) < epochs
    assert outcome("own_loop", f"own_loop.main(run='killed', epochs={epochs})", tmp_path) == steps
    last = f"checkpoints/step-{int(steps):08d}"
    for name in ("model.safetensors", "state.safetensors", "state.json"):
        one, other = (tmp_path / run / last / name for run in ("undisturbed", "killed"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_several_devices_leaves_the_same_weights_from_one_process_and_from_two(tmp_path):
    path = str(EXAMPLES / "several_devices.py")
    several = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for name, command in (("one", [path]), ("two", [*several, path])):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / name,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 2: loss") == 1, "one speaks for all"
    one, two = (
        checkpoint.complete(tmp_path / name / "runs" / "several-devices" / "checkpoints") for name in ("one", "two")
    )
    assert [path.name for path in one] == [path.name for path in two] == ["step-00000015", "step-00000030"]
    for a, b in zip(one, two, strict=True):
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
