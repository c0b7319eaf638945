"""What people ask of a run that goes on is done, and changes nothing that is trained or kept."""

import json

import pytest
import torch

import torchrelay as tr
from torchrelay import checkpoint
from torchrelay.checkpoint import CheckpointSettings
from torchrelay.errors import STOPPED, Interrupted, RelayError
from torchrelay.run import requests
from torchrelay.run.requests import REQUESTS, file_of


@pytest.fixture(autouse=True)
def _look_each_step(monkeypatch):
    monkeypatch.setattr(requests, "_SECONDS", 0.0)


class Asking(tr.Callback):
    """Asks after given steps, as a person does, and sees which checkpoints there are later."""

    def __init__(self, **asked: tuple[int, ...]) -> None:
        self.asked = asked
        self.seen: set[int] = set()

    def on_step(self, trainer, batch, loss) -> None:
        for request, steps in self.asked.items():
            if trainer.step in steps:
                file_of(trainer.run.path, request).touch()
        trainer.session.wait()
        self.seen |= {manifest_step(path) for path in checkpoint.complete(trainer.run.checkpoints)}


def manifest_step(path):
    return int(path.name.rpartition("-")[2])


def build(quiet, run, asking, **settings):
    torch.manual_seed(2)
    inputs = torch.rand(96, 8, generator=torch.Generator().manual_seed(3))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3))
    return tr.Trainer(
        model,
        (inputs, torch.arange(96) % 3),
        (inputs[:30], torch.arange(30) % 3),
        optimizer=tr.optim.SGD(lr=0.05),
        schedule=tr.optim.Plateau(patience=1),
        batch_size=12,
        ema=0.9,
        run=run,
        settings=tr.RunSettings(**({"epochs": 4, "patience": 3, "evaluate_every": 2, "log_every": 3} | settings)),
        terminal=quiet,
        callbacks=[asking],
        checkpoint=CheckpointSettings(every="5 steps"),
    )


def lines_of(run, asked):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("asked", False) is asked]


def without_asked(run):
    """Remove the lines that people asked for."""
    texts = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(text for text in texts if '"asked"' not in text))


@pytest.fixture
def undisturbed(quiet, tmp_path):
    build(quiet, tmp_path / "undisturbed", Asking()).fit()
    return tmp_path / "undisturbed"


def test_a_run_that_is_asked_for_much_has_the_bytes_of_one_that_is_asked_for_nothing(
    quiet, tmp_path, undisturbed, same_runs
):
    # 8 is an epoch's end without an evaluation, 16 one with it, and at 5 there is a regular checkpoint.
    asking = Asking(save=(3, 5, 8, 13, 16), evaluate=(3, 7, 8, 16))
    run = tmp_path / "run"
    trainer = build(quiet, run, asking)
    trainer.fit()
    assert asking.seen >= {3, 8, 13}
    assert [line["step"] for line in lines_of(run, asked=True)] == [3, 7, 8, 16]
    assert not [*run.glob("asked-*")]
    without_asked(run)
    same_runs(run, undisturbed)


def test_an_evaluation_that_is_asked_for_finds_what_a_regular_one_finds(quiet, tmp_path):
    run = tmp_path / "run"
    build(quiet, run, Asking(evaluate=(16,))).fit()
    (asked,) = lines_of(run, asked=True)
    regular = next(line for line in lines_of(run, asked=False) if (line["step"], line["split"]) == (16, "test"))
    assert asked | {"time": 0} == regular | {"time": 0, "asked": True}


def test_a_run_that_is_asked_to_stop_saves_and_is_resumed_to_the_same_bytes(quiet, tmp_path, undisturbed, same_runs):
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match=r"stopped by torchrelay ask after step 7, saved; resume with") as stopped:
        build(quiet, run, Asking(stop=(7,), evaluate=(4, 6), save=(6,))).fit()
    assert stopped.value.exit_code == STOPPED
    assert not [*run.glob("asked-*")]
    build(quiet, run, Asking()).resume()
    assert [line["step"] for line in lines_of(run, asked=True)] == [4, 6]
    without_asked(run)
    same_runs(run, undisturbed)


def test_a_request_that_nobody_was_there_to_do_is_forgotten_by_the_next_start(quiet, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for request in REQUESTS:
        file_of(run, request).touch()
    asking = Asking()
    build(quiet, run, asking, epochs=1).fit()
    assert not [*run.glob("asked-*")]
    assert lines_of(run, asked=True) == []
    assert asking.seen == {0, 5}


def test_a_folder_is_looked_at_once_a_second(monkeypatch, tmp_path):
    monkeypatch.setattr(requests, "_SECONDS", 1.0)
    found = requests.Requests(tmp_path)
    file_of(tmp_path, "save").touch()
    assert found.look() == ["save"]
    file_of(tmp_path, "stop").touch()
    assert not found.look()


def test_a_request_that_can_not_be_removed_is_named_in_one_line(tmp_path):
    file_of(tmp_path, "stop").mkdir()  # which no unlink removes
    with pytest.raises(RelayError, match=r"can't remove .*asked-stop: .*then resume the run$"):
        requests.Requests(tmp_path).clear()
