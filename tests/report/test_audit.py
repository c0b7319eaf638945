"""An audit from Python replays a run by a trainer that its script builds."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay.checkpoint.format import read, write
from torchrelay.errors import RelayError, UsageError
from torchrelay.report.audit.audit import audit


def build(quiet, run: Path | None = None, lr: float = 0.05, measure: bool = True, **options) -> tr.Trainer:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    data = torch.randn(80, 4, generator=draw), torch.randint(3, (80,), generator=draw)
    settings = tr.RunSettings(epochs=2, log_every=4, patience=9, receipt_every=3, train_metrics=measure)
    saving = tr.CheckpointSettings(every="5 steps", keep=9)
    model, sgd = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)), tr.optim.SGD(lr=lr, momentum=0.9)
    options |= {"run": run, "settings": settings, "checkpoint": saving, "terminal": quiet}
    return tr.Trainer(model, data, data, optimizer=sgd, batch_size=8, **options)


@pytest.fixture
def run(quiet, tmp_path) -> Path:
    build(quiet, tmp_path / "run").fit()
    return tmp_path / "run"


def test_an_honest_run_is_equal_and_stays_untouched(quiet, run):
    before, said = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, list[str]()
    audit(run, lambda: build(quiet), seed=1, say=said.append)
    assert said[-1] == "equal: 20 of 20 steps were replayed on 1 device (--seed 1)"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_another_rate_is_found_by_the_first_weights_that_differ(quiet, run):
    for path in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    with pytest.raises(RelayError, match="isn't what its receipt says"):
        audit(run, lambda: build(quiet, lr=0.06), seed=1, say=lambda _: None)


def test_weights_that_were_changed_are_found(quiet, run):
    contents = read(run / "checkpoints" / "step-00000015")
    contents.model["0.weight"].view(-1)[0] += 1
    write(run / "checkpoints", contents)
    with pytest.raises(RelayError, match="the checkpoint of step 15 has other weights than the receipt says"):
        audit(run, lambda: build(quiet), seed=1, say=lambda _: None)


def test_only_what_follows_an_accepted_change_is_replayed(quiet, tmp_path):
    stopped, said = build(quiet, tmp_path / "run", callbacks=[StopAfter(10)]), list[str]()
    stopped.fit()
    build(quiet, tmp_path / "run", measure=False).resume(accept_changes=True)
    audit(tmp_path / "run", lambda: build(quiet, measure=False), seed=1, say=said.append)
    assert said[-1] == "equal: 10 of 20 steps were replayed on 1 device (--seed 1)"
    assert any("10 steps were out of reach" in line for line in said)


class StopAfter(tr.Callback):
    def __init__(self, step: int) -> None:
        self.last = step

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.last:
            trainer.stop("enough")


def test_a_trainer_with_a_run_folder_is_refused(quiet, run, tmp_path):
    with pytest.raises(UsageError, match="leave it out for an audit"):
        audit(run, lambda: build(quiet, tmp_path / "other"), say=lambda _: None)
