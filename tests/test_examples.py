"""The examples, each run as a script."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from idx import write_idx
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
    """Start a process that imports an example and calls it, in its own folder."""
    script = f"import {name}; print('returned', {call})"
    command = [sys.executable, "-W", "error::UserWarning:torchrelay", "-c", script]
    environment = ENVIRONMENT | {"PYTHONPATH": str(EXAMPLES)}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def outcome(name: str, call: str, folder: Path) -> float:
    """Call an example in a new process, and return its result."""
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
def test_an_example_is_short_and_has_a_docstring(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 80
    assert lines[0].startswith('"""')


def called(start, name: str, call: str, folder: Path) -> float:
    """Call an example in a forked process, and return its result."""
    script = folder / "call.py"
    script.write_text(CALL.format(folder=str(EXAMPLES), name=name, call=f"{name}.{call}"))
    done = start(script=script).done()
    assert (done.returncode, done.stderr) == (0, "")
    return float(done.stdout.split("returned ")[1])


def test_mnist_learns_from_idx_files(tmp_path, start):
    write_idx(tmp_path, samples=200)
    assert called(start, "mnist", "main('.', epochs=3)", tmp_path) > 0.3


def test_vae_learns_and_shows_new_digits(tmp_path, start):
    """The bound is in nats for 64 pixels; that of the mean image is above 30."""
    assert called(start, "vae", "main(epochs=5)", tmp_path) < 28
    lines = [json.loads(line) for line in (tmp_path / "runs" / "vae" / "metrics.jsonl").read_text().splitlines()]
    assert {"reconstruction", "divergence"} <= lines[-1].keys()


@pytest.mark.slow
def test_siamese_separates_equal_from_different_pairs(tmp_path, start):
    assert called(start, "siamese", "main(epochs=1)", tmp_path) > 0.75


@pytest.mark.slow
def test_gan_generates_images_with_the_mean_of_the_data(tmp_path, start):
    assert called(start, "gan", "main(epochs=4)", tmp_path) < 0.25


def test_word_language_model_learns_the_words_of_a_text(tmp_path, start):
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    assert called(start, "word_language_model", "main('book.txt', epochs=12, words=11)", tmp_path) < 3


def test_gpt_learns_the_letters_of_a_text_and_writes(tmp_path, start):
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    assert called(start, "gpt", "main('book.txt', epochs=6, length=32)", tmp_path) < 1.5


def test_time_series_continues_waves(tmp_path, start):
    """The squared error of the next 40 values; that of zeros is 0.5."""
    assert called(start, "time_series", "main(epochs=4, length=40)", tmp_path) < 0.15


def test_segmentation_finds_disks_and_squares(tmp_path, start):
    assert called(start, "segmentation", "main(epochs=2)", tmp_path) > 0.5
    found = json.loads((tmp_path / "runs" / "segmentation" / "evaluation.json").read_text())
    assert found["iou_by_class"].keys() == {"background", "disk", "square"}


def test_detection_learns_where_rectangles_are(tmp_path, start):
    before, after = (called(start, "detection", f"main('{n}', {n}, 24)['loss']", tmp_path) for n in (1, 3))
    assert after < before


def test_distillation_teaches_a_small_network(tmp_path, start):
    assert called(start, "distillation", "main(epochs=2)", tmp_path) > 0.6


def test_contrastive_features_have_neighbors_of_their_class(tmp_path, start):
    assert called(start, "contrastive", "main(epochs=1)", tmp_path) > 0.8


def test_masked_patches_are_filled_in(tmp_path, start):
    """The mean squared error of hidden pixels in [0, 1]; that of the mean image is above 0.11."""
    assert called(start, "masked", "main(epochs=3)", tmp_path) < 0.1


def test_tables_learn_from_numbers_and_categories(tmp_path, start):
    assert called(start, "tables", "main(epochs=5)", tmp_path) > 0.9


def test_audio_classifies_waveforms(tmp_path, start):
    assert called(start, "audio", "main(epochs=2)", tmp_path) > 0.4


STOPPED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import {name} as example
import torchrelay as tr
from torchrelay.errors import Interrupted

class Stop(tr.Callback):
    def on_step(self, trainer, batch, loss):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

def stopped(trainer):
    trainer.callbacks.append(Stop())
    return fit(trainer)

fit, tr.Trainer.fit = tr.Trainer.fit, stopped
try:
    example.main(run="resumed", epochs=1)
except Interrupted:
    tr.Trainer.fit = lambda trainer: fit(trainer, resume=True)
    example.main(run="resumed", epochs=1)
    tr.Trainer.fit = fit
    example.main(run="undisturbed", epochs=1)
"""
# Those that train one network in more than three steps an epoch.
RESUMED = ("audio", "contrastive", "detection", "gan", "masked", "mnist", "segmentation", "siamese", "tables", "vae")


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_example_resumes_to_the_same_bytes(tmp_path, start, same_runs, name):
    script = tmp_path / "call.py"
    script.write_text(STOPPED.format(folder=str(EXAMPLES), name=name))
    done = start(script=script).done()
    assert done.returncode == 0, done.stderr
    for run in ("resumed", "undisturbed"):
        for earlier in checkpoint.complete(tmp_path / run / "checkpoints")[:-1]:
            shutil.rmtree(earlier)
    same_runs(tmp_path / "resumed", tmp_path / "undisturbed")


def test_own_model_learns(tmp_path, start):
    assert called(start, "own_model", "main(epochs=5)", tmp_path) > 0.95


def test_own_task_learns_to_reconstruct_as_a_script(tmp_path, start):
    """Run as a script. The squared error is that of 64 pixels in [0, 1]; the mean image's is above 4."""
    done = start(script=EXAMPLES / "own_task.py").done()
    assert done.returncode == 0, done.stderr
    assert re.search(r"^epoch 10: ", done.stdout, re.M)
    assert json.loads((tmp_path / "runs" / "own-task" / "evaluation.json").read_text())["squared_error"] < 2.5


@pytest.mark.slow
def test_fine_tune_loads_the_weights_with_a_new_head(tmp_path):
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
def test_own_loop_killed_and_restarted_resumes_to_the_same_bytes(tmp_path):
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
def test_several_devices_gives_the_same_weights_on_one_and_two_processes(tmp_path):
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
