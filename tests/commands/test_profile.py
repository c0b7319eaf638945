"""Profiling: the slow phase is found, and the phases add up to the step."""

import gzip
import json
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay.cli import main
from torchrelay.commands import profile
from torchrelay.errors import UsageError

LONG = 0.02  # seconds, far above what a step of this network takes


def trainer(quiet, **how) -> tr.Trainer:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return tr.Trainer(how.pop("model", model), *tr.data.digits(), batch_size=64, device="cpu", terminal=quiet, **how)


class SlowForward(nn.Sequential):
    def forward(self, images):
        time.sleep(LONG)
        return super().forward(images)


class SlowBackward(nn.Sequential):
    def forward(self, images):
        outputs = super().forward(images)
        outputs.register_hook(lambda _: time.sleep(LONG))
        return outputs


class SlowSGD(torch.optim.SGD):
    def step(self, closure=None):
        time.sleep(LONG)
        return super().step(closure)


def slow_images(images, _draw):
    time.sleep(LONG)
    return images


@pytest.mark.parametrize(
    ("phase", "how"),
    [
        ("input", lambda: {"augment": [slow_images]}),
        ("forward", lambda: {"model": SlowForward(nn.Flatten(), nn.Linear(64, 10))}),
        ("backward", lambda: {"model": SlowBackward(nn.Flatten(), nn.Linear(64, 10))}),
        ("optimizer", lambda: {"optimizer": lambda model: SlowSGD(model.parameters(), lr=0.1)}),
    ],
)
@pytest.mark.parametrize("measured", [True, False])
def test_profile_finds_the_slow_phase(quiet, phase, how, measured):
    made = trainer(quiet, settings=tr.RunSettings(train_metrics=measured), **how())
    found = profile.examine(made, steps=5)
    assert found.seconds[phase] >= LONG
    assert sum(found.seconds.values()) - found.seconds[phase] < LONG / 2


class Unmeasured(tr.Classification):
    measure = tr.Task.measure


def test_profile_times_the_backward_pass_of_a_task_without_metrics(quiet):
    made = trainer(quiet, model=SlowBackward(nn.Flatten(), nn.Linear(64, 10)), task=Unmeasured())
    assert profile.examine(made, steps=5).seconds["backward"] >= LONG


def test_profile_counts_the_samples_of_a_full_batch(quiet):
    made = trainer(quiet)
    assert profile.examine(made, steps=len(made.batches) - 5).samples == 64  # the last one has 30


@pytest.mark.parametrize("page", ["docs/howto/speed.md", "docs/zh/howto/speed.md"])
def test_the_page_shows_the_phases_by_name(page):
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    assert re.findall(r"^ (\w+) +\d+\.\d\d +\d", text, re.MULTILINE) == [*profile.PHASES, "step"]


def test_the_phases_add_up_to_the_step(quiet):
    made = trainer(quiet)
    began = time.perf_counter()
    found = profile.examine(made, steps=30)
    passed = (time.perf_counter() - began) / 35  # with those before
    assert 0 < found.step < 1.5 * passed
    assert sum(found.seconds.values()) == pytest.approx(found.step)


def test_the_table_adds_up_where_the_steps_are_unlike(capsys, tmp_path):
    # Each step is slow in one phase, so that the median of each phase is a fast one.
    steps = [dict.fromkeys(profile.PHASES, 0.001) | {phase: 0.02} for phase in profile.PHASES]
    steps += [dict.fromkeys(profile.PHASES, 9.0), dict.fromkeys(profile.PHASES, 0.0)]  # not typical
    found = profile.Profile(profile.typical(steps), 64, "cpu")
    profile.show(found, tmp_path)
    shown = capsys.readouterr().out
    *phases, step = (float(ms) for ms in re.findall(r"^ \w+ +(\d+\.\d\d) +\d", shown, re.MULTILINE))
    assert len(phases) == len(profile.PHASES)
    assert sum(phases) == pytest.approx(step, abs=0.005 * len(phases))
    assert shown.startswith("25.00 ms a step, 2,560 samples a second")
    assert step == 25.0


def test_a_table_of_one_slow_phase_fits_80_columns(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    seconds = dict.fromkeys(profile.PHASES, 1e-5) | {"rest": 1.2345}
    profile.show(profile.Profile(seconds, 64, "cpu, float32, 2 threads"), tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 1 + len(profile.PHASES) + 1 + 3


def test_profile_prints_a_table_and_writes_a_plot_and_a_trace(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "digits", "--steps", "3"]) == 0
    shown = capsys.readouterr().out
    assert all(phase in shown for phase in profile.PHASES)
    folder = tmp_path / "profiles" / "digits"
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "step" and event.get("ph") == "X" for event in events) == 3
    assert not (tmp_path / "runs").exists()


def test_the_pytorch_profiler_prints_nothing_and_an_encoding_may_lack_the_bar(cli, tmp_path):
    command = ("profile", "digits", "--steps=1", "--out", tmp_path / "found")
    done = cli(*command, environment={"PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "USDT" not in done.stdout
    assert "samples a second" in done.stdout


def test_a_trainer_with_a_run_folder_is_refused(quiet, tmp_path):
    with pytest.raises(UsageError, match="without a run folder"):
        profile.examine(trainer(quiet, run=tmp_path / "run"))
