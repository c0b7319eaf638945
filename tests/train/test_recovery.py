"""Loss spikes: stopping, or rolling back and skipping batches, reproducibly."""

import contextlib
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay import checkpoint
from torchrelay.checkpoint import CheckpointSettings
from torchrelay.errors import Interrupted, RelayError
from torchrelay.train.spikes import Spike, SpikeDetector

ROLLBACK = {"on_spike": "rollback", "log_every": 3}


def build(quiet, run, *, bad=(), settings=None, callbacks=(), task=None, saving=None, lr=0.05, norm=True):
    """A run over 120 different samples in batches of 12, some of which are NaN or outliers."""
    torch.manual_seed(2)
    inputs = torch.rand(120, 8, generator=torch.Generator().manual_seed(3))
    for sample, value in dict(bad).items():
        inputs[sample] = value
    targets = torch.arange(120) % 3
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )
    return tr.Trainer(
        model,
        (inputs, targets),
        (torch.rand(30, 8, generator=torch.Generator().manual_seed(4)), torch.arange(30) % 3),
        optimizer=tr.optim.SGD(lr=lr, momentum=0.9),
        schedule=tr.optim.Cosine(),
        batch_size=12,
        epochs=3,
        ema=0.9,
        run=run,
        settings=tr.RunSettings(**(settings or ROLLBACK)),
        terminal=quiet,
        task=task,
        callbacks=callbacks,
        checkpoint=saving or CheckpointSettings(every="4 steps", keep=100),
    )


def skipped_of(run):
    return dict(newest(run).state["skipped"].items())


def newest(run):
    return checkpoint.newest(run / "checkpoints", warn=pytest.fail)


class StopAt(tr.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_batch_that_gives_nan_is_skipped_in_each_epoch(quiet, tmp_path):
    run = tmp_path / "run"
    trainer = build(quiet, run, bad={77: math.nan})
    found = trainer.fit()
    assert math.isfinite(found["loss"])
    assert trainer.step == 30
    assert len(trainer.progress.skipped) == 3
    for epoch, (step, samples) in enumerate(sorted(trainer.progress.skipped.items())):
        assert epoch * 10 < step <= epoch * 10 + 10
        assert 77 in samples
        assert len(samples) == 12
        assert json.loads((run / f"spike-step-{step:08d}.json").read_text())["samples"] == samples
    assert skipped_of(run) == trainer.progress.skipped
    log = (run / "log.txt").read_text()
    step = min(trainer.progress.skipped)
    back = (step - 1) // 4 * 4
    assert (
        f"the loss of step {step} is nan: rolling back to step {back} and leaving out the batch of step {step}" in log
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    positions = [(line["step"], line["split"]) for line in lines]
    assert len(positions) == len(set(positions)), "the rolled-back steps are not in the metrics"
    assert all(line["loss"] is not None for line in lines)


def test_skipped_batches_do_not_affect_the_result(quiet, tmp_path):
    """The same weights as a run that skips those batches from the start."""
    trainer = build(quiet, tmp_path / "run", bad={77: math.nan})
    trainer.fit()
    told = build(quiet, tmp_path / "told", bad={77: math.nan})
    told.progress.skipped = dict(trainer.progress.skipped)
    told.fit()
    for mine, theirs in zip(trainer.model.state_dict().values(), told.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("stops", [(3, 14), (9, 10, 19), (1, 2, 29)])
def test_a_resumed_run_skips_the_same_batches(quiet, tmp_path, same_runs, stops):
    bad = {77: math.nan, 20: math.inf}
    build(quiet, tmp_path / "undisturbed", bad=bad, callbacks=[StopAt(-1)]).fit()
    run = tmp_path / "stopped"
    for stop in (*stops, -1):
        trainer = build(quiet, run, bad=bad, callbacks=[StopAt(stop)])
        go = trainer.resume if run.exists() else trainer.fit
        if stop in trainer.progress.skipped or stop == -1:
            go()
            continue
        with contextlib.suppress(Interrupted):
            go()
    build(quiet, run, bad=bad, callbacks=[StopAt(-1)]).resume()
    same_runs(run, tmp_path / "undisturbed")
    assert len(newest(run).state["skipped"]) >= 3


class Derail(tr.Callback):
    """Moves the weights far off after a step, like the update of a bad batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.step:
            with torch.no_grad():
                trainer.model[4].weight.mul_(1e4)


def test_damage_by_the_previous_step_is_rolled_back(quiet, tmp_path):
    """The loss shows it a step later: that batch is skipped, then also the one whose update caused it."""
    settings = ROLLBACK | {"spike_threshold": 5.0}
    trainer = build(quiet, tmp_path / "run", settings=settings, callbacks=[Derail(14)])
    trainer.fit()
    assert sorted(trainer.progress.skipped) == [14, 15, 16]
    assert newest(tmp_path / "run").step == 30
    assert trainer.best is not None


def test_a_loss_far_above_the_median_is_a_spike_on_request(quiet, tmp_path):
    bad = {33: 500.0}
    trainer = build(quiet, tmp_path / "run", bad=bad, norm=False, settings=ROLLBACK | {"spike_threshold": 4.0})
    trainer.fit()
    assert trainer.progress.skipped
    assert all(33 in samples for samples in trainer.progress.skipped.values())
    stopping = build(quiet, tmp_path / "stop", bad=bad, norm=False, settings={"spike_threshold": 4.0})
    with pytest.raises(RelayError, match=r"the loss of step \d+ is .*; the median before was .*; try a lower .*lr"):
        stopping.fit()
    untold = build(quiet, tmp_path / "untold", bad=bad, norm=False, settings={})
    untold.fit()
    assert untold.progress.skipped == {}


def test_a_spike_seen_at_the_last_step_does_not_shorten_the_run(quiet, tmp_path, monkeypatch):
    """On a GPU losses are read later: here after `max_steps` has already ended the run."""
    settings = ROLLBACK | {"max_steps": 17, "log_every": 50}
    sample = int(build(quiet, None, settings=settings).batches.indices(*divmod(17 - 1, 10))[0])
    at_once = build(quiet, tmp_path / "at-once", bad={sample: math.nan}, settings=settings)
    at_once.fit()
    monkeypatch.setattr(SpikeDetector, "check", lambda self, *seen: self._unread.append(seen))
    later = build(quiet, tmp_path / "later", bad={sample: math.nan}, settings=settings)
    later.fit()
    assert 17 in later.progress.skipped
    assert later.progress.skipped == at_once.progress.skipped
    assert later.step == at_once.step == 17
    for mine, theirs in zip(later.model.state_dict().values(), at_once.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_too_many_spikes_stop_the_run(quiet, tmp_path):
    bad = dict.fromkeys(range(0, 120, 9), math.nan)
    trainer = build(quiet, tmp_path / "run", bad=bad, settings=ROLLBACK | {"max_skipped": 4})
    with pytest.raises(RelayError, match=r"is nan, and [34] batches are left out already: .*run\.max_skipped"):
        trainer.fit()


def test_a_non_finite_gradient_is_a_spike_of_its_step(quiet, tmp_path):
    class Lost(tr.Classification):
        def loss(self, outputs, targets):
            if outputs.requires_grad and 1 in targets and int(targets[0]) == 1 and int(targets[1]) == 1:
                outputs.register_hook(lambda gradient: gradient * math.nan)
            return super().loss(outputs, targets)

    trainer = build(quiet, tmp_path / "run", task=Lost(), saving=CheckpointSettings(every="1 steps", keep=100))
    trainer.fit()
    assert trainer.progress.skipped
    for samples in trainer.progress.skipped.values():
        assert samples[0] % 3 == samples[1] % 3 == 1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "the norm of the gradient of step" in log


def test_a_missing_checkpoint_before_the_spike_is_an_error(quiet, tmp_path):
    settings = ROLLBACK | {"spike_threshold": 5.0}
    saving = CheckpointSettings(every="1 steps", keep=1, keep_best=0)
    trainer = build(quiet, tmp_path / "run", settings=settings, callbacks=[Derail(14)], saving=saving)
    with pytest.raises(RelayError, match=r"no checkpoint before step 14 is kept: raise checkpoint\.keep"):
        trainer.fit()


def test_without_a_run_folder_a_spike_stops_the_run(quiet):
    with pytest.raises(RelayError, match="is nan"):
        build(quiet, None, bad={5: math.nan}).fit()


def test_max_steps_holds_when_its_step_is_skipped(quiet, tmp_path):
    probe = build(quiet, tmp_path / "probe", bad={77: math.nan})
    probe.fit()
    step = min(probe.progress.skipped)
    trainer = build(quiet, tmp_path / "run", bad={77: math.nan}, settings=ROLLBACK | {"max_steps": step})
    trainer.fit()
    assert trainer.step == step


def test_the_detector_reads_in_order_and_drops_later_losses():
    detector = SpikeDetector()
    losses = [torch.tensor(value) for value in (1.0, math.nan, math.inf)]
    assert detector.check(1, losses[0]) is None
    assert detector.check(2, losses[1]) == Spike(2, "the loss of step 2 is nan")
    assert detector.read() is None
    assert detector.check(3, losses[0], losses[2]) == Spike(3, "the norm of the gradient of step 3 is inf")


def test_the_detector_resumes_from_recent_losses():
    detector, again = SpikeDetector(3.0), SpikeDetector(3.0)
    for step in range(20):
        detector.check(step, torch.tensor(1.0))
    again.load_state_dict(detector.state_dict())
    for each in (detector, again):
        spike = each.check(21, torch.tensor(3.5))
        assert spike is not None
        assert spike.finite
        assert "the loss of step 21 is 3.5; the median before was 1" in spike.what
    assert SpikeDetector(3.0).check(1, torch.tensor(1e9)) is None  # there is no median yet


@pytest.mark.parametrize("harm", [{"sums": 3}, {"best": []}, {"optimizer": {}}, {"identity": {"threads": 10**9}}])
def test_a_state_of_another_form_is_refused_with_a_line(tmp_path, quiet, harm):
    build(quiet, tmp_path / "run", settings={"max_steps": 2}).fit()
    resumed = build(quiet, tmp_path / "run", settings={"max_steps": 4})
    path = checkpoint.complete(tmp_path / "run" / "checkpoints")[-1]
    saved = checkpoint.read(path)
    with pytest.raises(RelayError, match="the state in the newest checkpoint is damaged or isn't ours"):
        resumed.session._restore(replace(saved, state=saved.state | harm), accept_changes=True)
