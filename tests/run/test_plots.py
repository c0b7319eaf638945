"""Plots drawn during training, by a separate process that cleans up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import torchrelay as tr
from torchrelay.run.metrics import Headline
from torchrelay.run.plots import UNASKED, PlotProcess
from torchrelay.run.settings import RunSettings
from torchrelay.train import logs

pytestmark = pytest.mark.plots

HEADLINE = Headline("accuracy", percent=True, higher_is_better=True)
LINES = [
    {"step": 10 * epoch, "epoch": epoch, "split": split, "loss": 1 / epoch, "accuracy": 1 - 1 / (epoch + 1)}
    for epoch in (1, 2, 3)
    for split in ("train", "test")
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_both_plots_are_drawn_from_the_run_folder(folder: Path) -> None:
    found = {"accuracy_by_class": {"cat": 0.75, "dog": 1.0}, "confusion_matrix": [[3, 1], [0, 2]]}
    (folder / "evaluation.json").write_text(json.dumps(found))
    said: list[str] = []
    drawing = PlotProcess(folder, said.append)
    drawing.start(HEADLINE, confusion=True)
    assert drawing.finish()
    assert said == []
    for name in ("curves.png", "confusion.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) >= 300


def test_a_plotting_error_is_logged_and_does_not_fail_the_run(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("{ damaged\n{}\n")
    said: list[str] = []
    drawing = PlotProcess(folder, said.append)
    drawing.start(HEADLINE)
    assert not drawing.finish()
    [text] = said
    assert "the plots can't be drawn" in text
    assert "metrics.jsonl is damaged" in text
    assert "\n" not in text


def test_without_an_interpreter_plots_are_skipped_with_a_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "no-python"))
    said: list[str] = []
    drawing = PlotProcess(folder, said.append)
    drawing.start(HEADLINE)
    assert not drawing.finish()
    assert len(said) == 1
    assert "no-python" in said[0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a drawing ends by itself, a second later")
def test_the_plot_process_ends_when_the_training_is_killed(folder: Path) -> None:
    os.mkfifo(folder / "evaluation.json")  # whoever reads it waits for ever
    script = f"""
import sys, time
from pathlib import Path
from torchrelay.run.plots import PlotProcess
from torchrelay.run.metrics import Headline
drawing = PlotProcess(Path({str(folder)!r}), print)
drawing.start(Headline("accuracy", True, True), confusion=True)
print(drawing._process.pid, flush=True)
time.sleep(60)
"""
    training = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert training.stdout is not None
    drawer = Path("/proc", training.stdout.readline().strip())
    deadline = time.monotonic() + 30
    while not (folder / "curves.png").exists():  # so it is at the second picture, or about to be
        assert time.monotonic() < deadline
        time.sleep(0.01)
    training.send_signal(signal.SIGKILL)
    training.wait()
    training.stdout.close()
    while drawer.exists() and "Z" not in (drawer / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the drawing lives on"
        time.sleep(0.01)


def test_a_training_with_a_run_folder_imports_no_matplotlib(tmp_path: Path, cli: Callable[..., Any]) -> None:
    program = f"""
import sys
from forked import forget
forget("torchrelay", "matplotlib")
import torch, torchrelay as tr
from torchrelay.run.terminal import Terminal
data = torch.rand(64, 3, 8, 8), torch.arange(64) % 2
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
run = {str(tmp_path / "run")!r}
tr.Trainer(model, data, data, epochs=2, batch_size=32, run=run, terminal=Terminal(quiet=True)).fit()
print("matplotlib" in sys.modules)
"""
    done = cli(program=program, plots=True)
    assert done.stdout == "False\n", done.stderr
    assert (tmp_path / "run" / "curves.png").exists()


def test_the_plot_process_has_a_low_priority(folder: Path) -> None:
    said: list[str] = []
    drawing = PlotProcess(folder, said.append)
    drawing.start(HEADLINE)
    process = drawing._process
    assert process is not None
    seen = 0
    while drawing.busy and seen < 19:
        seen = os.getpriority(os.PRIO_PROCESS, process.pid)
    assert seen == 19
    assert drawing.finish()
    assert not drawing.busy


def test_a_prepared_process_draws_what_it_is_asked_for(folder: Path) -> None:
    said: list[str] = []
    drawing = PlotProcess(folder, said.append)
    drawing.prepare()
    prepared = drawing._process
    assert not drawing.drawing
    assert not drawing.finish()
    drawing.start(HEADLINE)
    assert drawing.drawing
    assert drawing._process is prepared
    assert drawing.finish()
    assert said == []
    assert (folder / "curves.png").exists()


def test_a_prepared_process_that_nobody_asks_ends(folder: Path) -> None:
    drawing = PlotProcess(folder, print)
    drawing.prepare()
    prepared = drawing._process
    assert prepared is not None
    drawing.close()
    assert prepared.returncode is not None
    assert not drawing.busy
    drawing.close()


def test_another_process_draws_where_the_prepared_one_has_ended(folder: Path) -> None:
    drawing = PlotProcess(folder, print)
    drawing.prepare()
    prepared = drawing._process
    assert prepared is not None
    prepared.kill()
    prepared.wait()
    drawing.start(HEADLINE)
    assert drawing.finish()
    assert (folder / "curves.png").exists()


def test_a_process_waits_only_so_long_for_a_request(folder: Path) -> None:
    program = """
import sys
from torchrelay.report import plots
plots.PATIENCE = 0.1
sys.argv[1:] = [".", str(plots.os.getppid())]
plots.main()
"""
    waiting = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, cwd=folder)
    assert waiting.wait(30) == UNASKED
    assert waiting.stdin is not None
    waiting.stdin.close()


def test_errors_of_both_pictures_are_told(folder: Path) -> None:
    (folder / "evaluation.json").write_text("{}")
    said: list[str] = []
    drawing = PlotProcess(folder, said.append)
    drawing.start(HEADLINE, confusion=True)
    assert not drawing.finish()
    assert said == ["the plots can't be drawn: KeyError: 'confusion_matrix'"]


RECIPE = '[run]\nepochs = 3\n[model]\nname = "mlp"\n[data]\nname = "digits"\n[environment]\nstarted_from = "python"\n'


def test_a_report_is_written_beside_the_plots_if_asked_for(folder: Path) -> None:
    (folder / "recipe.toml").write_text(RECIPE)
    said: list[str] = []
    drawing = PlotProcess(folder, said.append)
    drawing.start(HEADLINE)
    assert drawing.finish()
    assert not (folder / "report.html").exists()
    drawing.start(HEADLINE, report=True)
    assert drawing.finish()
    assert said == []
    assert "Curves" in (folder / "report.html").read_text()


def test_a_report_that_fails_is_a_warning(folder: Path) -> None:
    said: list[str] = []
    drawing = PlotProcess(folder, said.append)
    drawing.start(HEADLINE, report=True)
    assert drawing.finish()
    assert (folder / "curves.png").exists()
    [text] = said
    assert text.startswith("warning: report.html can't be written: UsageError: ")


@pytest.mark.parametrize(("report", "least"), [(None, 60.0), (None, 0.0), (True, 60.0), (False, 0.0)])
def test_a_run_writes_its_report_if_told_to_or_if_it_trained_long(
    report: bool | None, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_REPORT", least)
    torch.manual_seed(0)
    data = torch.rand(64, 4), torch.arange(64) % 2
    settings = RunSettings(epochs=1, report=report)
    run = tmp_path / "run"
    trainer = tr.Trainer(nn.Linear(4, 2), data, data, batch_size=32, settings=settings, run=run, device="cpu")
    trainer.fit()
    assert (run / "report.html").exists() == (report is True or (report is None and not least))
    assert "warning" not in (run / "log.txt").read_text()
