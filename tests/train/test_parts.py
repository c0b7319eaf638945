"""Each part of the trainer works alone, in a custom loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchrelay as tr
from torchrelay.run.terminal import Terminal
from torchrelay.train import (
    Batches,
    Checkpointer,
    CheckpointSettings,
    Contents,
    DeviceSettings,
    Evaluator,
    Pipeline,
    ProcessGroup,
    Progress,
    RunFolder,
    SpikeDetector,
    Strategy,
    TrainStep,
    build_strategy,
    set_up,
)


@pytest.fixture
def device():
    return set_up(DeviceSettings(name="cpu", threads=1), exact=True)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def parts(device, digits, replicas: int = 1) -> tuple[Strategy, Batches, TrainStep]:
    strategy = build_strategy(net(), "none", ProcessGroup(0, 1, device.device), device, exact=True)
    batches = Batches(digits[0], 100, device, Pipeline(), replicas=replicas)
    optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1, momentum=0.9)
    step = TrainStep(strategy, tr.Classification(classes=10), optimizer, device, replicas=replicas)
    return strategy, batches, step


def test_a_step_alone_gives_the_bits_of_a_hand_written_one(device, digits):
    strategy, batches, step = parts(device, digits)
    by_hand = net()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for number, batch in enumerate(batches.epoch(0)):
        result = step.step(batch, number)
        loss = F.cross_entropy(by_hand(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.equal(result.loss, loss.detach())
        ((measures, count),) = result.measures
        assert count == batch.size
        assert 0 <= int(measures["accuracy"]) <= batch.size
    for mine, theirs in zip(strategy.model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_step_alone_adds_its_replicas_in_the_tree(device, digits):
    strategy, batches, step = parts(device, digits, replicas=4)
    batch = next(batches.epoch(0))
    step.backward(batch, 0)
    model = net()
    leaves = []
    for inputs, targets in batch.replicas():
        model.zero_grad()
        (F.cross_entropy(model(inputs), targets, reduction="sum") / batch.size).backward()
        leaves.append([parameter.grad.clone() for parameter in model.parameters()])
    for number, parameter in enumerate(strategy.model.parameters()):
        a, b, c, d = (leaf[number] for leaf in leaves)
        assert torch.equal(parameter.grad, (a + b) + (c + d))


def test_a_step_is_not_taken_at_a_spike(device, digits):
    strategy, batches, step = parts(device, digits)
    batch = next(batches.epoch(0))
    before = [parameter.clone() for parameter in strategy.model.parameters()]
    batch.inputs[3] = float("nan")
    result = step.step(batch, 0)
    assert result.spike is not None
    assert result.spike.what == "the loss of step 1 is nan"
    assert all(map(torch.equal, before, strategy.model.parameters()))
    assert all(parameter.grad is None for parameter in strategy.model.parameters())


def test_a_step_marks_its_phases_for_a_profiler(device, digits):
    _, batches, step = parts(device, digits)
    marks: list[str] = []
    step.step(next(batches.epoch(0)), 0, marks.append)
    assert marks == ["forward", "backward", "measure"]


def test_a_steps_state_continues_in_another(device, digits):
    strategy, batches, step = parts(device, digits)
    first, second, third = list(batches.epoch(0))[:3]
    step.step(first, 0)
    step.step(second, 1)
    other_strategy, _, other = parts(device, digits)
    other_strategy.model.load_state_dict(strategy.model.state_dict())
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    assert torch.equal(step.step(third, 2).loss, other.step(third, 2).loss)
    for mine, theirs in zip(strategy.model.parameters(), other_strategy.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_progress_alone_counts_and_continues(device, digits):
    _, batches, step = parts(device, digits)
    progress = Progress(epochs=2, steps_per_epoch=len(batches))
    for batch in batches.epoch(0):
        progress.record(step.step(batch, progress.step), batch.size)
        if progress.step == 5:
            saved = progress.state_dict()
    assert progress.position == len(batches)
    means = progress.sums.means()
    progress.end_epoch()
    assert (progress.epochs_done, progress.position, progress.continues) == (1, 0, True)
    assert progress.sums.means() == {"loss": 0.0}
    again = Progress(epochs=2, steps_per_epoch=len(batches))
    again.load_state_dict(saved)
    assert (again.step, again.position) == (5, 5)
    assert set(means) == {"loss", "accuracy"}


def test_the_stopwatch_counts_samples_per_second_since_its_start():
    watch = Progress(epochs=1, steps_per_epoch=1).stopwatch
    watch.count(600)
    watch.count(400)
    lap = watch.lap()
    assert 0 <= lap["seconds"] < 5
    assert lap["samples_per_second"] > 0
    watch.start()
    assert watch.lap()["samples_per_second"] == 0
    assert watch.total == 1000


def test_progress_ends_at_its_limit():
    progress = Progress(epochs=3, steps_per_epoch=4, max_steps=2)
    progress.step = 2
    assert progress.continues, "the epoch is still to be ended"
    assert progress.stop_at_limit()
    progress.end_epoch()
    assert not progress.continues
    assert progress.epochs_done == 0


def test_the_best_is_never_a_nan_and_keeps_its_first_epoch():
    progress = Progress(epochs=3, steps_per_epoch=4)
    assert progress.is_best(0.5, 1, higher_is_better=True)
    assert not progress.is_best(0.5, 2, higher_is_better=True)
    assert not progress.is_best(float("nan"), 3, higher_is_better=True)
    assert not progress.is_best(0.6, 3, higher_is_better=False)
    assert progress.is_best(0.4, 3, higher_is_better=False)


def test_an_evaluator_alone_evaluates_and_predicts(device, digits):
    model = net()
    model.train()
    batches = Batches(digits[1], 50, device, Pipeline(), train=False)
    evaluator = Evaluator(model, tr.Classification(classes=10), device, {"test": batches})
    evaluation = evaluator.evaluate("test")
    assert evaluation is evaluator.last
    probabilities = evaluator.predict(batches)
    assert model.training, "the mode it had is set again"
    hits = (probabilities.argmax(1) == digits[1].targets).double().mean()
    assert evaluation.values["accuracy"] == pytest.approx(float(hits))
    assert evaluation.samples == len(digits[1])


def test_an_evaluator_stops_on_request(device, digits):
    batches = Batches(digits[1], 50, device, Pipeline(), train=False)
    evaluator = Evaluator(net(), tr.Classification(classes=10), device, {"test": batches})
    asked = iter([False, False, True])
    assert evaluator.evaluate("test", lambda: next(asked)) is None
    assert evaluator.last is None


def test_a_run_folder_and_a_checkpointer_serve_a_loop_of_ones_own(device, digits, tmp_path):
    strategy, batches, step = parts(device, digits)
    run = RunFolder(tmp_path / "run", Terminal(quiet=True))
    run.write_recipe({"run": {"epochs": 1}, "environment": {}})
    progress = Progress(1, len(batches))
    with Checkpointer(
        run.checkpoints, CheckpointSettings(every="5 steps", keep=2), steps_per_epoch=len(batches), total_steps=15
    ) as checkpoints:
        for batch in batches.epoch(0):
            progress.record(step.step(batch, progress.step), batch.size)
            run.record({"step": progress.step, "split": "step", "epoch": 1, "loss": 1.0})
            if checkpoints.due_after(progress.step):
                state = {"progress": progress.state_dict(), "step": step.state_dict()}
                checkpoints.save(Contents(progress.step, strategy.model.state_dict(), state))
        checkpoints.wait()
        found = checkpoints.newest(print)
    run.close()
    assert found is not None
    assert found.step == progress.step - progress.step % 5
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1].endswith(str(found.step))


def test_a_detector_alone_finds_a_high_loss():
    detector = SpikeDetector(threshold=3.0)
    for step in range(1, 12):
        assert detector.check(step, torch.tensor(1.0)) is None
    spike = detector.check(12, torch.tensor(4.0))
    assert spike is not None
    assert (spike.step, spike.finite) == (12, True)
