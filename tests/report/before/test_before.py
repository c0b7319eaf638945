"""What is tried before a run finds what would spoil it, and leaves nothing behind."""

import re

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay.checkpoint.checkpointer import CheckpointSettings
from torchrelay.errors import RelayError
from torchrelay.report.before.dry_run import dry_run
from torchrelay.report.before.learning_rate import draw, find_rate, longest_fall
from torchrelay.report.before.overfit import overfit


def trainer(model=None, lr=0.1, **options):
    torch.manual_seed(0)
    inputs, targets = torch.randn(96, 8), torch.randint(4, (96,))
    model = model or nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    given = {"epochs": 3, "batch_size": 16, "optimizer": tr.optim.SGD(lr=lr), "device": "cpu"} | options
    return tr.Trainer(model, (inputs, targets), (inputs, targets), **given)


def test_a_dry_run_says_what_a_run_needs_and_removes_its_checkpoint(tmp_path):
    said = []
    found = dry_run(trainer(), CheckpointSettings(keep=3, keep_best=1), tmp_path / "runs" / "new", said.append)
    assert list(tmp_path.iterdir()) == []
    assert found.step > 0
    assert found.seconds > 18 * found.step
    assert found.checkpoint > 4 * (8 * 64 + 64 * 4)  # bytes of the weights
    assert found.disk == 5 * found.checkpoint
    assert found.memory > 2**20
    assert re.search(r"all 18 of them", said[0])
    assert any("restored" in text for text in said)
    assert "3 evaluations included" in said[-1]


def test_a_dry_run_counts_evaluations_and_steps_as_the_run_will_take_them(tmp_path):
    said = []
    settings = tr.RunSettings(epochs=3, max_steps=7, evaluate_every="2 steps")
    dry_run(trainer(epochs=None, settings=settings), CheckpointSettings(), tmp_path, said.append)
    assert "all 7 of them" in said[0]
    assert "4 evaluations included" in said[-1]


def test_a_dry_run_finds_a_task_whose_evaluation_fails(tmp_path):
    class Wrong(tr.tasks.Classification):
        def measure(self, outputs, targets):
            if not self.trained:
                raise ValueError("no such column")
            return super().measure(outputs, targets)

        trained = True

        def evaluate_batch(self, model, batch):
            type(self).trained = False
            return super().evaluate_batch(model, batch)

    with pytest.raises(ValueError, match="no such column"):
        dry_run(trainer(task=Wrong()), CheckpointSettings(), tmp_path, lambda _: None)


def test_a_dry_run_refuses_checkpoints_that_the_disk_has_no_room_for(tmp_path):
    with pytest.raises(RelayError, match=r"make room, or lower checkpoint\.keep"):
        dry_run(trainer(), CheckpointSettings(keep=10**12), tmp_path, lambda _: None)


def test_a_dry_run_stops_at_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(RelayError, match="the loss of step"):
        dry_run(trainer(lr=1e30), CheckpointSettings(), tmp_path, lambda _: None)


def test_samples_that_can_be_learned_are(tmp_path):
    outcome = overfit(trainer(batch_size=32, schedule=tr.optim.Constant()), lambda _: None)
    assert outcome.learned
    assert outcome.share == 1.0
    assert outcome.text(32).startswith(f"learned 32 samples in {outcome.steps} steps: loss ")


def test_a_network_that_cannot_tell_its_inputs_apart_does_not_learn():
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, inputs):
            return self.bias.expand(len(inputs), 4)

    said = []
    outcome = overfit(trainer(Blind(), batch_size=32), said.append)
    assert not outcome.learned
    assert outcome.steps == 500
    assert len(said) == 10


def test_a_regression_is_learned_when_its_loss_is_small():
    inputs = torch.randn(32, 8)
    made = tr.Trainer(
        nn.Linear(8, 1),
        (inputs, inputs.sum(1, keepdim=True)),
        task=tr.tasks.Regression(),
        epochs=1,
        batch_size=32,
        optimizer=tr.optim.SGD(lr=0.1),
        device="cpu",
    )
    outcome = overfit(made, lambda _: None)
    assert outcome.learned
    assert outcome.share is None
    assert outcome.last < 0.05 * outcome.first


def test_a_rate_is_suggested_inside_the_fall_of_the_loss(tmp_path):
    found = find_rate(trainer(lr=0.1), 0.1, 1e-4, 1e3, 60)
    assert found.diverged
    assert found.rates[found.start] < found.suggestion < found.rates[found.end]
    assert 1e-2 < found.suggestion < 10
    assert "the loss falls longest between" in found.reason()
    draw(found, 0.1, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000


def test_groups_keep_the_ratio_of_their_rates_and_the_run_that_follows_its_own():
    made = trainer(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), lr=0.1)
    made.train_step.groups[0]["initial_lr"] = 0.1
    find_rate(made, 0.1, 0.01, 1.0, 12)
    assert made.train_step.groups[0]["initial_lr"] == pytest.approx(1.0)
    assert trainer(lr=0.1).train_step.groups[0]["initial_lr"] == 0.1


def test_rates_that_are_too_high_or_teach_nothing_are_refused():
    with pytest.raises(RelayError, match="lower --from"):
        find_rate(trainer(), 0.1, 1e6, 1e9, 30)


def test_the_longest_fall_passes_over_what_rises():
    assert longest_fall([1.0, 0.9, 0.95, 0.8, 0.7, 2.0]) == (0, 4)
    assert longest_fall([1.0, 2.0, 3.0])[0] == longest_fall([1.0, 2.0, 3.0])[1]
