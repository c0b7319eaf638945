"""The trainer: the seven steps together, on real data, and runs that resume exactly."""

import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import torchrelay as tr
from torchrelay import checkpoint
from torchrelay.checkpoint import CheckpointSettings, writer
from torchrelay.checkpoint.format import read_manifest
from torchrelay.data.augment import CutMix, Mixup, PaddedCrop
from torchrelay.device.device import DeviceSettings
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.errors import Interrupted, RelayError, UsageError
from torchrelay.recipe import recipe
from torchrelay.recipe.build import build_trainer
from torchrelay.train.progress import Best
from torchrelay.train.session import Session


class Net(nn.Module):
    """Layers that a resume must restore: BatchNorm, dropout, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(128, 10),
        )

    def forward(self, images):
        return self.layers(images)


def build(digits, quiet, run=None, **changes):
    torch.manual_seed(1)
    train, test = digits
    arguments = {
        "optimizer": tr.optim.SGD(lr=0.05, momentum=0.9),
        "schedule": tr.optim.OneCycle(),
        "epochs": 3,
        "batch_size": 100,
        "augment": [PaddedCrop(padding=1, mode="zeros")],
        "terminal": quiet,
        "run": run,
    }
    return tr.Trainer(Net(), train, test, **(arguments | changes))


class StopAt(tr.Callback):
    """Sends the process a real signal after a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step = step
        self.number = number

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), self.number)


def test_training_learns_the_digits(digits, quiet, tmp_path):
    found = build(digits, quiet, tmp_path / "run", epochs=5).fit()
    assert found["accuracy"] > 0.9
    assert found["top5_accuracy"] >= found["accuracy"]


def test_a_run_writes_its_folder(digits, quiet, tmp_path):
    run = tmp_path / "run"
    build(digits, quiet, run).fit()
    there = {path.name for path in run.iterdir()}
    assert there >= {"recipe.toml", "log.txt", "metrics.jsonl", "tensorboard", "checkpoints", "model.txt"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [(line["split"], line["epoch"], line["step"]) for line in lines if line["split"] != "step"]
    assert epochs == [(split, epoch, 15 * epoch) for epoch in (1, 2, 3) for split in ("train", "test")]
    log = (run / "log.txt").read_text()
    assert "epoch 3: train accuracy" in log
    assert "best test accuracy: " in log
    last = checkpoint.find(run / "checkpoints", "last")
    assert last.name == "step-00000045"


def test_the_final_weights_open_with_plain_safetensors(digits, quiet, tmp_path):
    trainer = build(digits, quiet, tmp_path / "run")
    trainer.fit()
    weights = load_file(checkpoint.find(tmp_path / "run" / "checkpoints", "last") / "model.safetensors")
    fresh = Net()
    fresh.load_state_dict(weights)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_two_runs_give_the_same_bytes(digits, quiet, tmp_path, same_runs):
    for name in "ab":
        build(digits, quiet, tmp_path / name).fit()
    same_runs(tmp_path / "a", tmp_path / "b")


class Wide(nn.Module):
    """Weights large enough to be copied while the training goes on."""

    def __init__(self, writes_to_its_weights: bool) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(64, 400), nn.BatchNorm1d(400), nn.Linear(400, 10)
        self.writes_to_its_weights = writes_to_its_weights

    def forward(self, images):
        if self.writes_to_its_weights:
            self.hidden.weight.data.div_(self.hidden.weight.data.norm(dim=1, keepdim=True))
        return self.head(torch.relu(self.norm(self.hidden(images.flatten(1)))))


@pytest.mark.parametrize("writes_to_its_weights", [False, True])
def test_background_copies_have_the_bytes_of_immediate_ones(
    writes_to_its_weights, digits, quiet, tmp_path, same_runs, monkeypatch
):
    meanwhile, copy, save = [], writer._copy, Session.save

    def watched(pairs):
        if threading.current_thread().name == "checkpoint writer":
            meanwhile.extend(pairs)
            time.sleep(0.01)  # the forward pass is short
        copy(pairs)

    monkeypatch.setattr(writer, "_copy", watched)
    counts = []
    for name in ("meanwhile", "at once"):
        if name == "at once":
            monkeypatch.setattr(Session, "save", lambda session, **_: save(session))
        torch.manual_seed(1)
        saving = CheckpointSettings(every="1 step", keep=100)
        options = {"optimizer": tr.optim.AdamW(lr=0.01), "ema": 0.9, "checkpoint": saving, "terminal": quiet}
        model = Wide(writes_to_its_weights)
        tr.Trainer(model, *digits, epochs=2, batch_size=300, run=tmp_path / name, **options).fit()
        counts.append(len(meanwhile))
    same_runs(tmp_path / "meanwhile", tmp_path / "at once")
    saves = len(checkpoint.complete(tmp_path / "at once" / "checkpoints"))
    # Of each save but the first: the weights, two moments, the averages. The last is followed by no step, but is no
    # different. The second run copies nothing meanwhile.
    expected = 0 if writes_to_its_weights else 4 * (saves - 1)
    assert counts == [expected, expected]


def test_another_seed_gives_other_bytes(digits, quiet, tmp_path):
    for seed in (0, 1):
        build(digits, quiet, tmp_path / str(seed), seed=seed).fit()
    one, other = (checkpoint.find(tmp_path / name / "checkpoints", "last") for name in "01")
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


RUNS = {
    "plain": {},
    "ema": {"ema": 0.9},
    "replicas": {"parallel": ParallelSettings(replicas=4)},
    "mixup": {"augment": [Mixup(alpha=0.5), CutMix(alpha=1.0)]},
    "adamw, cosine": {"optimizer": tr.optim.AdamW(lr=1e-3), "schedule": tr.optim.Cosine(per="epoch")},
    "plateau": {"schedule": tr.optim.Plateau(patience=0, threshold=0.9)},
    "muon": {"optimizer": tr.optim.Muon(lr=0.02, exclude=["layers.6.*"])},
    "bf16, clipped": {"device": DeviceSettings(precision="bf16"), "clip_norm": 0.5},
    "channels last": {"device": DeviceSettings(channels_last=True)},
    "balanced, drop last": {"sampling": "balanced", "drop_last": True},
    "validation": {"validation": None, "settings": tr.RunSettings(log_every=4)},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_a_stopped_run_resumes_to_the_same_bytes(digits, quiet, tmp_path, same_runs, changes):
    """Stopped inside an epoch, at an epoch's end and after its evaluation; resumed by a new trainer each time."""
    changes = dict(changes)
    if "validation" in changes:
        rest, part = tr.data.split(digits[0], 0.2, seed=3)
        changes["validation"], digits = part, (rest, digits[1])
    saving = CheckpointSettings(keep=100)
    undisturbed = build(digits, quiet, tmp_path / "undisturbed", checkpoint=saving, callbacks=[StopAt(-1)], **changes)
    undisturbed.fit()
    steps = len(undisturbed.batches)
    run = tmp_path / "stopped"
    for number, stop in enumerate((4, steps, 2 * steps - 3)):
        trainer = build(digits, quiet, run, checkpoint=saving, callbacks=[StopAt(stop)], **changes)
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM after step {stop}, saved"):
            trainer.fit() if number == 0 else trainer.resume()
    build(digits, quiet, run, checkpoint=saving, callbacks=[StopAt(-1)], **changes).resume()
    same_runs(run, tmp_path / "undisturbed")


class StoppedAtStart(tr.Callback):
    """Sends the process a signal before the first step, if it shall."""

    def __init__(self, fires: bool) -> None:
        self.fires = fires

    def on_start(self, trainer):
        if self.fires:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at", [3, 4])
def test_a_signal_never_turns_a_regular_checkpoint_into_its_own(digits, quiet, tmp_path, same_runs, at):
    """A checkpoint is due at step 4; one signal comes at this step or before, another right after the resume."""

    def made(folder: str, stop: int, at_start: bool = False):
        saving, stops = CheckpointSettings(every="4 steps", keep=100), [StopAt(stop), StoppedAtStart(at_start)]
        return build(digits, quiet, tmp_path / folder, checkpoint=saving, callbacks=stops)

    made("undisturbed", -1).fit()
    with pytest.raises(Interrupted):
        made("stopped", at).fit()
    folder = tmp_path / "stopped" / "checkpoints"
    assert read_manifest(folder / f"step-{at:08d}").is_interim == (at == 3)
    with pytest.raises(Interrupted):
        made("stopped", -1, at_start=True).resume()
    assert not read_manifest(folder / "step-00000004").is_interim
    made("stopped", -1).resume()
    same_runs(tmp_path / "stopped", tmp_path / "undisturbed")


class StoppedInTest(tr.Classification):
    """Sends the process a real signal during an evaluation batch, counted over all evaluations."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.tested = at, 0

    def predict(self, outputs):
        self.tested += 1
        if self.tested == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().predict(outputs)


@pytest.mark.parametrize(
    ("at", "step", "settings"),
    [
        pytest.param(2, 12, {}, id="the first part"),
        pytest.param(5, 12, {}, id="the second part"),
        pytest.param(9, 20, {"max_steps": 20}, id="where max_steps ends an epoch early"),
        pytest.param(9, 24, {"max_steps": 24}, id="where max_steps ends with an epoch"),
    ],
)
def test_a_run_stopped_in_an_evaluation_resumes_to_the_same_bytes(
    digits, quiet, tmp_path, same_runs, at, step, settings
):
    """Nothing of the evaluation counts twice, neither metrics nor patience; and it is repeated."""
    rest, part = tr.data.split(digits[0], 0.2, seed=3)

    def made(name: str, at: int) -> tr.Trainer:
        stopping = tr.EarlyStopping(patience=1)
        how = {"validation": part, "callbacks": [stopping], "settings": tr.RunSettings(**settings)}
        return build((rest, digits[1]), quiet, tmp_path / name, task=StoppedInTest(at), **how)

    undisturbed = made("undisturbed", -1).fit()
    stopped = made("stopped", at)
    with pytest.raises(Interrupted, match=f"after step {step}, saved"):
        stopped.fit()
    assert stopped.progress.phase == ""  # or the bar of what comes next would say that it tests
    assert made("stopped", -1).resume() == undisturbed
    same_runs(tmp_path / "stopped", tmp_path / "undisturbed")


def test_a_finished_run_stopped_in_its_evaluation_keeps_its_best(digits, quiet, tmp_path):
    build(digits, quiet, tmp_path / "run").fit()
    best = checkpoint.best(tmp_path / "run" / "checkpoints")
    assert best is not None
    manifest = read_manifest(best)
    assert manifest.score is not None
    with pytest.raises(Interrupted):
        build(digits, quiet, tmp_path / "run", task=StoppedInTest(1)).resume()
    assert checkpoint.best(tmp_path / "run" / "checkpoints") == best
    last = checkpoint.find(tmp_path / "run" / "checkpoints", "last")
    assert read_manifest(last).score is not None


def test_after_a_signal_the_trainer_can_still_evaluate(digits, quiet, tmp_path):
    trainer = build(digits, quiet, tmp_path / "run", callbacks=[StopAt(3)])
    with pytest.raises(Interrupted):
        trainer.fit()
    assert trainer.evaluate().samples == len(digits[1])


class Broken:
    """A metric that isn't finite at first."""

    found = iter(())

    def to(self, _device):
        return self

    def update(self, predictions, targets) -> None:
        pass

    def compute(self):
        return torch.tensor(next(Broken.found))


class Judged(tr.Classification):
    """A task with that metric."""

    headline = "broken"

    def metrics(self):
        return {"broken": Broken()}


def test_a_non_finite_metric_is_saved_and_never_the_best(digits, quiet, tmp_path):
    Broken.found = iter([0.5, math.nan, 0.25, math.inf])  # the first one before the training
    callbacks = [tr.EarlyStopping(patience=2)]
    trainer = build(
        digits, quiet, tmp_path / "run", task=Judged(), callbacks=callbacks, checkpoint=CheckpointSettings(keep=9)
    )
    trainer.fit()
    assert trainer.best == Best(0.25, 2)
    saved = checkpoint.complete(tmp_path / "run" / "checkpoints")
    assert [checkpoint.read(path).step for path in saved] == [0, 15, 30, 45]  # each can be read
    assert math.isnan(checkpoint.read(saved[1]).metrics["broken"])
    assert checkpoint.best(tmp_path / "run" / "checkpoints") == saved[2]


def test_a_frozen_mask_may_hold_minus_infinity(digits, quiet, tmp_path):
    trainer = build(digits, quiet, tmp_path / "run", epochs=1)
    trainer.model.mask = nn.Parameter(torch.full((4, 4), -math.inf).triu(1), requires_grad=False)
    trainer.fit()
    last = checkpoint.find(tmp_path / "run" / "checkpoints", "last")
    assert load_file(last / "model.safetensors")["mask"][0, 1] == -math.inf


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(start, tmp_path, same_runs):
    """A real process, killed by SIGKILL at five moments, resumed each time."""
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer import build
import torchrelay as tr
from torchrelay.run.terminal import Terminal
from torchrelay.checkpoint import CheckpointSettings
torch.set_num_threads(1)
folder = sys.argv[1]
import pathlib
often = CheckpointSettings(every="3 steps")
trainer = build(tr.data.digits(), Terminal(quiet=True), folder, epochs=8, checkpoint=often)
trainer.resume() if (pathlib.Path(folder) / "recipe.toml").exists() else trainer.fit()
""")
    assert start(tmp_path / "undisturbed", script=script).done().returncode == 0

    def saved() -> int:
        steps = (int(path.name[len("step-") :]) for path in checkpoint.complete(tmp_path / "killed" / "checkpoints"))
        return max(steps, default=0)

    for number in range(5):
        before = saved()
        process = start(tmp_path / "killed", script=script)
        process.until(lambda before=before: saved() > before + 6)
        time.sleep(0.007 * number)
        process.end()
        assert process.returncode == -signal.SIGKILL, "the machine is too fast for this test: make the run longer"
    done = start(tmp_path / "killed", script=script).done()
    assert done.returncode == 0, done.stderr
    same_runs(tmp_path / "killed", tmp_path / "undisturbed")


def test_a_finished_run_reports_it_and_continues_with_more_epochs(digits, quiet, tmp_path):
    run = tmp_path / "run"
    schedule = {"schedule": tr.optim.Constant()}
    build(digits, quiet, run, epochs=2, **schedule).fit()
    build(digits, quiet, run, epochs=2, **schedule).resume()
    assert "the run is done: 30 steps" in (run / "log.txt").read_text()
    build(digits, quiet, run, epochs=3, **schedule).resume()
    build(digits, quiet, tmp_path / "at once", epochs=3, **schedule).fit()
    one, other = (checkpoint.find(tmp_path / name / "checkpoints", "last") for name in ("run", "at once"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_replicas_add_up_to_the_mean_over_the_batch(digits, quiet):
    """Without BatchNorm and dropout, four replicas give the gradient of one, up to rounding."""
    train, _ = digits
    gradients = []
    for replicas in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        trainer = tr.Trainer(model, train, batch_size=50, terminal=quiet, parallel=ParallelSettings(replicas=replicas))
        trainer.train_step.backward(next(trainer.batches.epoch()), 0)
        gradients.append(model[1].weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_batch_smaller_than_the_replicas_is_trained_on(digits, quiet):
    train, _ = digits
    part = train.take(torch.arange(11))
    trainer = tr.Trainer(Net(), part, batch_size=9, terminal=quiet, epochs=2, parallel=ParallelSettings(replicas=4))
    trainer.fit()  # the last batch has 2 samples for 4 replicas
    assert trainer.step == 4
    assert trainer.model.layers[1].num_batches_tracked.item() == 4, "counted once a step, not once a replica"


def test_the_loss_is_the_mean_over_an_uneven_batch(digits, quiet):
    train, _ = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    trainer = tr.Trainer(model, train, batch_size=7, terminal=quiet)
    batch = next(trainer.batches.epoch())
    expected = nn.functional.cross_entropy(model(batch.inputs), batch.targets)
    assert torch.equal(trainer.train_step.backward(batch, 0).loss, expected.detach())


def test_a_step_in_one_process_equals_a_hand_written_step(digits, quiet):
    """Bit-equal to ten lines of plain PyTorch."""
    train, _ = digits
    trainer = build((train, None), quiet, augment=[], schedule=tr.optim.Constant(), epochs=1)
    trainer.model.layers[5].p = 0.0
    torch.manual_seed(1)
    by_hand = Net()
    by_hand.layers[5].p = 0.0
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    trainer.model.train()
    for step, batch in enumerate(trainer.batches.epoch(0)):
        loss = trainer.train_step.step(batch, step).loss
        expected = nn.functional.cross_entropy(by_hand(batch.inputs), batch.targets)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert torch.equal(loss, expected.detach())
    for mine, theirs in zip(trainer.model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_samples(digits, quiet, tmp_path):
    run = tmp_path / "run"
    inputs, targets = digits[0].inputs.float() / 255, digits[0].targets
    inputs[321] = math.nan
    trainer = build(((inputs, targets), None), quiet, run, augment=[], normalize=False)
    with pytest.raises(RelayError, match=r"the loss of step (\d+) is nan; try a lower optimizer\.lr") as caught:
        trainer.fit()
    (report,) = run.glob("spike-step-*.json")
    assert str(report) in str(caught.value)
    assert 321 in json.loads(report.read_text())["samples"]
    saved = checkpoint.newest(run / "checkpoints", warn=pytest.fail)
    assert all(torch.isfinite(tensor).all() for tensor in saved.model.values())


def test_early_stopping_ends_a_run_and_a_resume_keeps_it_ended(digits, quiet, tmp_path):
    run = tmp_path / "run"

    def make():
        stopping = tr.EarlyStopping(patience=2, least=0.5)
        return build(digits, quiet, run, epochs=20, callbacks=[stopping], schedule=tr.optim.Constant())

    trainer = make()
    trainer.fit()
    stopped_at = trainer.progress.epochs_done
    assert stopped_at < 20
    assert "stopped: early stopping: accuracy has not improved for 2 evaluations" in (run / "log.txt").read_text()
    again = make()
    again.resume()
    assert again.progress.epochs_done == stopped_at


def test_max_steps_ends_a_run(digits, quiet, tmp_path, same_runs):
    def make(name, steps):
        settings = tr.RunSettings(max_steps=steps)
        return build(digits, quiet, tmp_path / name, settings=settings, epochs=3)

    make("run", 20).fit()
    trainer = make("run", 30)
    trainer.resume()
    assert trainer.step == 30
    again = make("run", 30)
    again.resume()
    assert again.step == 30, "there is nothing left to do"
    straight = make("straight", 30)
    straight.fit()
    for mine, theirs in zip(trainer.model.state_dict().values(), straight.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_second_run_in_a_folder_is_refused(digits, quiet, tmp_path):
    run = tmp_path / "run"
    build(digits, quiet, run, epochs=1).fit()
    with pytest.raises(
        UsageError, match=r"holds a run already: choose another folder, or resume it by: trainer\.resume"
    ):
        build(digits, quiet, run).fit()
    with pytest.raises(UsageError, match="holds no run to resume"):
        build(digits, quiet, tmp_path / "nothing").resume()


def test_changed_data_is_refused_at_a_resume(digits, quiet, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        build(digits, quiet, run, callbacks=[StopAt(5)]).fit()
    inputs = digits[0].inputs.clone()
    inputs[0, 0, 0, 0] += 1
    changed = (tr.data.arrays(inputs, digits[0].targets, digits[0].classes, "digits"), digits[1])
    with pytest.raises(
        RelayError, match=r"can't continue to the same result: the training data was .* --accept-changes"
    ):
        build(changed, quiet, run).resume()
    build(changed, quiet, run).resume(accept_changes=True)


def test_a_changed_recipe_is_refused_at_a_resume_unless_accepted(tmp_path, quiet):
    run = tmp_path / "run"

    def make(*overrides):
        loaded = recipe.load("digits", ["run.max_steps=30", "schedule.name=constant", *overrides])
        return build_trainer(loaded, run, terminal=quiet)

    make().fit()
    with pytest.raises(RelayError, match=r"optimizer\.lr was 0\.05 and is 0\.5; undo it, or resume with --accept"):
        make("optimizer.lr=0.5").resume()
    trainer = make("run.max_steps=40", "checkpoint.keep=5")
    trainer.resume()
    assert trainer.step == 40
    log = (run / "log.txt").read_text()
    assert "changed: run.max_steps was 30 and is 40" in log
    assert "changed: checkpoint.keep was 2 and is 5" in log
    trainer = make("run.max_steps=50", "checkpoint.keep=5", "optimizer.lr=0.5")
    trainer.resume(accept_changes=True)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5


def test_a_resume_keeps_the_number_of_threads(digits, quiet, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        build(digits, quiet, run, callbacks=[StopAt(5)]).fit()
    torch.set_num_threads(2)
    build(digits, quiet, run, epochs=3).resume()
    assert torch.get_num_threads() == 1
    log = (run / "log.txt").read_text()
    assert "resuming with 1 thread per operation, as the run began (see device.threads)" in log
    assert "threads was" not in log


def test_another_requested_thread_count_warns(digits, quiet, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        build(digits, quiet, run, callbacks=[StopAt(5)]).fit()
    with pytest.raises(Interrupted):
        build(digits, quiet, run, callbacks=[StopAt(6)], device=DeviceSettings(name="cpu", threads=2)).resume()
    assert "warning: threads was 1 and is 2: the result may differ" in (run / "log.txt").read_text()


def test_evaluation_counts_every_sample_once(digits, quiet):
    train, test = digits
    trainer = build((train, test), quiet, batch_size=7)
    found = trainer.evaluate("test")
    assert found.samples == len(test)
    assert int(found.confusion.sum()) == len(test)
    with torch.no_grad():
        trainer.model.eval()
        outputs = torch.cat([trainer.model(batch.inputs) for batch in trainer.evaluator.parts["test"].epoch()])
    assert found.values["accuracy"] == (outputs.argmax(1) == test.targets).double().mean().item()
    assert found.confusion.diagonal().sum().item() / len(test) == pytest.approx(found.values["accuracy"])


def test_predictions_are_in_the_order_of_the_data(digits, quiet):
    trainer = build(digits, quiet, epochs=4)
    trainer.fit()
    probabilities = trainer.predict(digits[1])
    assert torch.equal(probabilities, trainer.predict(digits[1].inputs))
    assert torch.allclose(probabilities.sum(1), torch.ones(len(digits[1])))
    right = (probabilities.argmax(1) == digits[1].targets).double().mean().item()
    assert right == trainer.evaluate().values["accuracy"]


def test_ema_weights_are_evaluated_and_raw_ones_saved(digits, quiet, tmp_path):
    trainer = build(digits, quiet, tmp_path / "run", ema=0.9)
    trainer.fit()
    path = checkpoint.find(tmp_path / "run" / "checkpoints", "last")
    raw, averaged = load_file(path / "model.safetensors"), load_file(path / "ema.safetensors")
    assert torch.equal(raw["layers.0.weight"], trainer.model.layers[0].weight)
    assert not torch.equal(raw["layers.0.weight"], averaged["layers.0.weight"])
    by_average = Net()
    by_average.load_state_dict(averaged)
    plain = tr.Trainer(by_average, *digits, batch_size=100, terminal=quiet)
    assert plain.evaluate().values["loss"] == trainer.evaluate().values["loss"]


def test_the_second_signal_ends_the_process_at_once(cli):
    program = """
import os, signal, time
from torchrelay.train.signals import StopSignal
with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    print(stop.received.name, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    print("not reached")
"""
    done = cli(program=program, timeout=30)
    assert done.stdout.strip() == "SIGTERM"
    assert done.returncode == 128 + signal.SIGTERM


STOPPED = """
import os, signal, sys, torch
import torchrelay as tr

class Stop(tr.Callback):
    def on_step(self, trainer, batch, loss):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

data, folder = (torch.ones(40, 4), torch.arange(40) % 3), sys.argv[1] if sys.argv[1:] else None
tr.Trainer(torch.nn.Linear(4, 3), data, batch_size=8, run=folder, callbacks=Stop, device="cpu").fit()
"""


@pytest.mark.parametrize(
    ("folder", "code", "says"),
    [
        (["run"], 75, "stopped by SIGTERM after step 3, saved; resume with: trainer.resume()"),
        ([], 1, "stopped by SIGTERM after step 3; there is no run folder to resume from"),
    ],
)
def test_a_script_that_a_signal_stopped_ends_with_the_exit_code_and_one_line(start, tmp_path, folder, code, says):
    (tmp_path / "script.py").write_text(STOPPED)
    done = start(*folder, script=tmp_path / "script.py").done()
    assert (done.returncode, done.stderr, done.stdout.splitlines()[-1]) == (code, "", says)
    if folder:
        assert says in (tmp_path / "run" / "log.txt").read_text()


def test_a_signal_does_not_end_an_interactive_session(cli, tmp_path):
    (tmp_path / "script.py").write_text(STOPPED)
    typed = ["exec(open('script.py').read())", "print('goes', 'on')", "exit()"]
    done = cli(program=f"import code; code.interact(readfunc=lambda prompt, typed=iter({typed}): next(typed))")
    assert "Interrupted: stopped by SIGTERM after step 3" in done.stderr
    assert done.stdout.splitlines()[-1] == "goes on"


def test_a_batch_size_of_zero_and_zero_epochs_are_refused(digits, quiet):
    with pytest.raises(UsageError, match="batch_size is 0: it must be a whole number of 1 or more"):
        build(digits, quiet, batch_size=0)
    with pytest.raises(UsageError, match="epochs"):
        build(digits, quiet, epochs=0)


class LostGradient(tr.Classification):
    """Its loss is finite, and from the fourth step on its gradient isn't."""

    steps = 0

    def loss(self, outputs, targets):
        self.steps += outputs.requires_grad
        if self.steps > 3 and outputs.requires_grad:
            outputs.register_hook(lambda gradient: gradient * math.nan)
        return super().loss(outputs, targets)


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(digits, quiet, tmp_path):
    run = tmp_path / "run"
    every = CheckpointSettings(every="1 steps", keep=100)
    with pytest.raises(RelayError, match=r"not finite after step 4|the loss of step 5 is nan"):
        build(digits, quiet, run, task=LostGradient(), checkpoint=every).fit()
    saved = checkpoint.newest(run / "checkpoints", warn=pytest.fail)
    assert saved.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in saved.model.values())


def test_a_resume_of_a_finished_run_deletes_what_a_process_that_died_left(tmp_path, quiet):
    def trainer() -> tr.Trainer:
        torch.manual_seed(0)
        data = (torch.arange(40.0).reshape(20, 2), torch.arange(20) % 2)
        return tr.Trainer(nn.Linear(2, 2), data, epochs=4, batch_size=10, run=tmp_path / "run", terminal=quiet)

    trainer().fit()
    folder = tmp_path / "run" / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    last = checkpoint.read(folder / names[-1])
    checkpoint.write(folder, replace(last, step=1))
    trainer().resume()
    assert sorted(path.name for path in folder.iterdir()) == names
