"""A run tells a command of the user's how it ended; what the command does changes no run."""

import os
import signal
import time

import pytest
import torch

import torchrelay as tr
from torchrelay.errors import Interrupted, RelayError, UsageError
from torchrelay.run import notify
from torchrelay.run.terminal import Terminal


class AtStep(tr.Callback):
    def __init__(self, do) -> None:
        self.do = do

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == 3:
            self.do()


def build(run, command, do=lambda: None, terminal=None, **settings):
    torch.manual_seed(2)
    data = torch.rand(24, 8, generator=torch.Generator().manual_seed(3)), torch.arange(24) % 3
    return tr.Trainer(
        torch.nn.Linear(8, 3),
        data,
        data,
        batch_size=12,
        run=run,
        settings=tr.RunSettings(epochs=2, notify=command, **settings),
        terminal=terminal or Terminal(quiet=True),
        callbacks=[AtStep(do)],
    )


@pytest.fixture
def told(tmp_path):
    """The command that writes what it is told, and a function that reads it."""
    file = tmp_path / "told"

    def read():
        return dict(line.removeprefix("TORCHRELAY_").split("=", 1) for line in file.read_text().splitlines())

    return f"env | grep ^TORCHRELAY_ > {file}", read


def test_a_command_learns_that_a_run_is_done_and_how_well_it_did(tmp_path, told, monkeypatch):
    monkeypatch.setenv("TORCHRELAY_LAUNCHER", "1")  # the command isn't one of the run's processes
    command, read = told
    found = build(tmp_path / "run", command).fit()
    facts = read()
    assert float(facts.pop("SECONDS")) >= 0  # with one decimal
    assert float(facts.pop("VALUE")) == found["accuracy"]
    assert float(facts.pop("BEST")) >= found["accuracy"]
    assert facts.pop("BEST_EPOCH") in "12"
    run = str(tmp_path / "run")
    assert facts == {"RUN": run, "STATUS": "done", "STEP": "4", "EPOCH": "2", "METRIC": "accuracy"}


def test_a_command_learns_that_a_run_was_stopped_and_the_folder_is_free(tmp_path, told):
    command, read = told
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        build(run, command, lambda: os.kill(os.getpid(), signal.SIGTERM)).fit()
    facts = read()
    assert (facts["STATUS"], facts["STEP"]) == ("stopped", "3")
    assert facts["MESSAGE"].startswith("stopped by SIGTERM after step 3, saved; resume with")
    assert not [*run.glob("checkpoints/.step-*")]


def test_a_command_learns_why_a_run_failed(tmp_path, told):
    command, read = told
    with pytest.raises(RelayError, match="division"):
        build(tmp_path / "run", command, lambda: 1 / 0).fit()
    facts = read()
    assert facts["STATUS"] == "failed"
    assert facts["MESSAGE"] == "the callback AtStep failed in on_step after step 3: ZeroDivisionError: division by zero"


def test_nobody_is_told_of_a_folder_that_was_refused(tmp_path, told):
    build(tmp_path / "run", None).fit()
    with pytest.raises(UsageError, match="holds a run already"):
        build(tmp_path / "run", told[0]).fit()
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("command", "warning"),
    [
        ("echo no route >&2; exit 3", "warning: run.notify ended with code 3: no route"),
        ("sleep 600 & sleep 600", "warning: run.notify was killed after 0.2 s"),
        ("/no/such/program", "warning: run.notify ended with code 127"),
    ],
)
def test_a_command_that_fails_or_hangs_is_a_warning_and_the_run_is_as_without_it(
    tmp_path, monkeypatch, capsys, same_runs, command, warning
):
    monkeypatch.setattr(notify, "TIMEOUT", 0.2 if "sleep" in command else 60.0)
    build(tmp_path / "without", None).fit()
    build(tmp_path / "run", command, terminal=Terminal()).fit()
    assert warning in capsys.readouterr().out
    same_runs(tmp_path / "run", tmp_path / "without")
    assert f"when it ends, this run calls: {command}" in (tmp_path / "run" / "log.txt").read_text()


def test_what_a_command_starts_in_the_background_holds_up_nothing(tmp_path):
    said: list[str] = []
    before = time.monotonic()
    notify.notify(f"sleep 5 & echo $! > {tmp_path}/pid", {}, said.append)
    assert time.monotonic() - before < 4
    assert said == []
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
