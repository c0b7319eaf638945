"""`tune` recommends settings that were faster in turns and that train the same network."""

import time

import pytest
import torch

from torchrelay.cli import main
from torchrelay.commands import tune
from torchrelay.recipe import recipe
from torchrelay.recipe.code import load_code

CODE = """
import time
import torch
from torch import nn

class Slow(nn.Sequential):
    def forward(self, images):
        if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
            {last}
        else:
            {first}
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no autocast here\\nsecond line")
        return super().forward(images)

def slow(classes):
    return Slow(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, classes))

def images():
    from torchrelay.data import arrays
    drawn = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    return [arrays(drawn, torch.arange(64) % 4, list("abcd")) for _ in "12"]
"""


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    """The steps to compare differ by 20 ms."""
    monkeypatch.setattr(tune, "_LONG_ENOUGH", 0.05)


ONLY = ("precision", "channels_last", "batch_size")  # not compile, which takes long


def trials(
    tmp_path, last: str, first: str, seconds: float = 60, batch: int = 32, only: tuple[str, ...] = ONLY
) -> dict[str, tune.Trial]:
    path = tmp_path / "code.py"
    path.write_text(CODE.format(last=last, first=first))
    overrides = ["data.name=images", "model.name=slow", "data.augment=[]", "device.name=cpu"]
    overrides.append(f"data.batch_size={batch}")
    loaded = recipe.load("digits", overrides)
    found = tune.tune(loaded, seconds, code=load_code(path), only=only, say=lambda _: None)
    return {trial.setting: trial for trial in found}


def test_tune_keeps_faster_settings_and_reports_failing_ones(tmp_path):
    found = trials(tmp_path, last="pass", first="time.sleep(0.02)")
    last = found["device.channels_last = true"]
    assert last.kept
    assert last.times > 1.5
    failed = found['device.precision = "bf16"']
    assert failed.seconds is None
    assert "no autocast here" in failed.note
    assert "second line" not in failed.note
    double = found["data.batch_size = 64"]
    assert not double.kept
    assert "trains otherwise" in double.note


def test_the_whole_run_is_timed_where_images_grow(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(CODE.format(last="pass", first="time.sleep(images[0, 0].numel() / 1000)").replace("4 * 36", "4"))
    path.write_text(path.read_text().replace("nn.Flatten()", "nn.AdaptiveAvgPool2d(1), nn.Flatten()"))
    grows = 'data.augment=[{ name = "progressive_resize", sizes = [4, 6, 8] }]'
    sets = ["data.name=images", "model.name=slow", "device.name=cpu", "data.batch_size=32", "run.epochs=4", grows]
    (own,) = tune.tune(recipe.load("digits", sets), code=load_code(path), only=("none",), say=lambda _: None)
    assert own.steps == 8
    of_all_sizes = (16 + 36 + 64 + 64) / 1000 / 4  # 45 ms; the smallest alone takes 16, the largest 64
    assert of_all_sizes < own.seconds < of_all_sizes + 0.015


def test_a_table_says_how_long_all_steps_take(capsys):
    tune.show([tune.Trial("the recipe's own", 0.5, 8, 250, kept=True), tune.Trial("a", 0.25, 8, 250)])
    table = capsys.readouterr().out.splitlines()
    assert "2 min 05 s" in table[1]
    assert "1 min 02 s" in table[2]


def test_tune_drops_slower_settings(tmp_path):
    found = trials(tmp_path, last="time.sleep(0.02)", first="pass")
    assert not found["device.channels_last = true"].kept
    assert found["device.channels_last = true"].times < 0.7


def test_tune_times_data_smaller_than_a_batch(tmp_path):
    found = trials(tmp_path, last="pass", first="pass", batch=100)
    assert found["the recipe's own"].samples == found["data.batch_size = 200"].samples == 64
    assert found["data.batch_size = 50"].samples == 50


def test_each_trial_sets_its_own_number_of_threads(tmp_path):
    torch.set_num_threads(2)
    note = f"with open({str(tmp_path / 'seen')!r}, 'a') as file: file.write(str(torch.get_num_threads()))"
    slow_alone = "time.sleep(0.4 * (torch.get_num_threads() == 1))"  # two threads take 0.1 s on a busy machine
    found = trials(tmp_path, last=note, first=slow_alone, only=("threads", "channels_last"))
    assert not found["device.threads = 1"].kept
    assert set((tmp_path / "seen").read_text()) == {"2"}  # after the trial with one
    assert torch.get_num_threads() == 2


def test_tune_keeps_to_its_time_limit(tmp_path):
    began = time.monotonic()
    found = trials(tmp_path, last="pass", first="pass", seconds=0)
    assert time.monotonic() - began < 20
    assert all("no time left" in trial.note for name, trial in found.items() if name != "the recipe's own")


def test_tune_prints_a_table_and_lines_for_a_recipe(tmp_path, capsys, monkeypatch):
    settings_of = tune._settings
    monkeypatch.setattr(tune, "_settings", lambda found: [s for s in settings_of(found) if s[1] != "compile"])
    path = tmp_path / "code.py"
    path.write_text(CODE.format(last="pass", first="time.sleep(0.02)"))
    settings = ["data.name=images", "model.name=slow", "data.batch_size=32", "device.name=cpu", "data.augment=[]"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["tune", "digits", *options, "--code", str(path), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "the recipe's own" in shown
    lines = shown.partition("[device]")[2].split("\n")
    assert "channels_last = true" in [line.strip() for line in lines]


def test_recommended_lines_are_grouped_by_section(capsys):
    kept = ("device.threads = 2", "optimizer.fused = true", "device.channels_last = true")
    tune.show([tune.Trial("the recipe's own", 1.0, 8, kept=True), *(tune.Trial(s, 1.0, 8, kept=True) for s in kept)])
    lines = "[device]\nthreads = 2\nchannels_last = true\n[optimizer]\nfused = true\n"
    assert capsys.readouterr().out.endswith(lines)


def test_tune_claims_nothing_about_settings_that_it_did_not_time(capsys):
    own, slower = tune.Trial("own", 1.0, 8, kept=True), tune.Trial("a", 2.0, 8)
    faster, untried = tune.Trial("device.tf32 = true", 0.5, 8, kept=True), tune.Trial("b", note="not measured: no time")
    for trials, end in (
        ([own, untried], "No other setting was timed. 1 was not measured: give more --seconds.\n"),
        ([own, slower], "Of the settings that were timed, none was clearly faster.\n"),
        (
            [own, slower, untried, untried],
            "Of the settings that were timed, none was clearly faster. 2 were not measured: give more --seconds.\n",
        ),
        ([own, faster, untried], "tf32 = true\n\n1 was not measured: give more --seconds.\n"),
    ):
        tune.show(trials)
        assert capsys.readouterr().out.endswith(end)


def test_tune_tries_alternatives_to_what_the_recipe_sets():
    def offered(*sets: str) -> list[tuple[str, object]]:
        found = tune._settings(recipe.load("digits", ["device.name=cpu", *sets]))
        return [(name, value) for _, name, value in found if name in ("precision", "channels_last")]

    assert offered() == [("precision", "bf16"), ("channels_last", True)]
    assert offered("device.precision=bf16", "device.channels_last=true") == [
        ("precision", "float32"),
        ("channels_last", False),
    ]


def test_tune_starts_from_what_auto_decides(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(CODE.format(last="pass", first="time.sleep(0.02)"))
    sets = ["data.name=images", "model.name=slow", "data.augment=[]", "device.name=cpu", "device.channels_last=auto"]
    found = tune.tune(recipe.load("digits", sets), code=load_code(path), only=("channels_last",), say=lambda _: None)
    assert [trial.setting for trial in found] == ["the recipe's own", "device.channels_last = false"]
    assert not found[1].kept


def test_tune_tries_a_fused_optimizer_if_there_is_one():
    offered = {
        name: ("optimizer", "fused", True) in list(tune._settings(recipe.load("digits", [f"optimizer.name={name}"])))
        for name in ("sgd", "adamw", "muon")
    }
    assert offered == {"sgd": True, "adamw": True, "muon": False}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tune_tries_gpu_settings_on_a_gpu():
    names = {name for _, name, _ in tune._settings(recipe.load("digits"))}
    assert {"precision", "tf32", "channels_last"} <= names
    assert "threads" not in names
