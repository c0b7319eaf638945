"""Callbacks: when each hook is called, their state in checkpoints, and the shipped ones."""

import itertools
import json
import os
import signal
import time

import pytest
import torch
from PIL import Image
from torch import nn

import torchrelay as tr
from torchrelay import checkpoint
from torchrelay.checkpoint import CheckpointSettings
from torchrelay.errors import Interrupted, RelayError, UsageError


def build(digits, quiet, run=None, **changes) -> tr.Trainer:
    torch.manual_seed(0)
    model = changes.pop("model", None) or nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    train, test = digits
    settings = {"epochs": 3, "batch_size": 400, "run": run, "terminal": quiet, "optimizer": tr.optim.SGD(lr=0.1)}
    return tr.Trainer(model, train, test, **(settings | changes))


class Recorder(tr.Callback):
    """Records each call, and keeps a count in the checkpoint."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.steps = 0

    def on_start(self, trainer) -> None:
        self.calls.append(("start", trainer.step))

    def on_step(self, trainer, batch, loss) -> None:
        assert loss.shape == ()
        assert len(batch.indices) == len(batch.targets)
        self.steps += 1
        self.calls.append(("step", trainer.step))

    def on_evaluate(self, trainer, split, values) -> None:
        assert {"loss", "accuracy"} <= set(values)
        self.calls.append(("evaluate", split))

    def on_epoch(self, trainer, epoch, values) -> None:
        assert {"loss", "accuracy"} <= set(values)
        self.calls.append(("epoch", epoch))

    def on_end(self, trainer) -> None:
        self.calls.append(("end", trainer.step))

    def state_dict(self):
        return {"steps": self.steps, "tensor": torch.tensor(self.steps)}

    def load_state_dict(self, state) -> None:
        assert int(state["tensor"]) == state["steps"]
        self.steps = state["steps"]


def epoch_of(number: int, splits=("test",)) -> list[tuple]:
    steps = [("step", 4 * (number - 1) + i) for i in (1, 2, 3, 4)]  # 1438 samples in batches of 400
    return [*steps, *[("evaluate", split) for split in splits], ("epoch", number)]


def test_the_five_hooks_are_called_in_order(digits, quiet):
    recorder = Recorder()
    build(digits, quiet, epochs=2, callbacks=[recorder]).fit()
    assert recorder.calls == [("start", 0), *epoch_of(1), *epoch_of(2), ("end", 8)]


def test_each_part_is_evaluated_at_the_interval_and_after_the_last_epoch(digits, quiet):
    recorder = Recorder()
    settings = tr.RunSettings(evaluate_every=2)
    changes = {"epochs": 3, "settings": settings, "validation": digits[1], "callbacks": [recorder]}
    build(digits, quiet, **changes).fit()
    both = ("validation", "test")
    assert recorder.calls == [("start", 0), *epoch_of(1, ()), *epoch_of(2, both), *epoch_of(3, both), ("end", 12)]


def test_several_callbacks_are_called_in_the_order_they_are_given(digits, quiet):
    order = []

    class Say(tr.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_start(self, trainer) -> None:
            order.append(self.name)

    build(digits, quiet, epochs=1, callbacks=[Say("first"), Say("second")]).fit()
    assert order == ["first", "second"]


def test_a_callback_resumes_from_the_checkpoint(digits, quiet, tmp_path):
    """An exception ends training after 6 steps; the epoch's checkpoint is at step 4."""

    class Stumble(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            if trainer.step == 6:
                raise RuntimeError("stumbled")

    first = Recorder()
    with pytest.raises(RelayError, match="the callback Stumble failed in on_step after step 6: RuntimeError: stumbled"):
        build(digits, quiet, tmp_path / "run", callbacks=[first, Stumble()]).fit()
    assert first.steps == 6
    assert ("end", 6) not in first.calls
    second = Recorder()
    build(digits, quiet, tmp_path / "run", callbacks=[second, tr.Callback()]).resume()
    assert second.calls == [("start", 4), *epoch_of(2), *epoch_of(3), ("end", 12)]
    assert second.steps == 12


def test_state_that_a_checkpoint_cannot_hold_is_reported(digits, quiet, tmp_path):
    class Wrong(tr.Callback):
        def state_dict(self):
            return {"thing": object()}

    with pytest.raises(TypeError, match=r"a checkpoint can't hold object at 'callbacks\.2\.thing'"):
        build(digits, quiet, tmp_path / "run", callbacks=[Wrong()]).fit()


# ------------------------------------------------------------------------------------------------ early stopping


class Script(tr.Callback):
    """Replaces the metrics by scripted values, one per evaluation of a split."""

    def __init__(self, values: dict[str, list[float]], name: str = "accuracy") -> None:
        self.values, self.name = values, name

    def on_evaluate(self, trainer, split, values) -> None:
        values[self.name] = self.values[split].pop(0)


def stopped_after(digits, quiet, values, stopping, name="accuracy", **changes) -> int:
    """The number of epochs of a run whose evaluations give these values."""
    script = Script(values, name)
    trainer = build(digits, quiet, epochs=8, callbacks=[script, stopping], **changes)
    trainer.fit()
    assert trainer.progress.stop_reason is None or "has not improved for" in trainer.progress.stop_reason
    return trainer.progress.epochs_done


def test_early_stopping_waits_for_its_patience(digits, quiet):
    values = [0.1, 0.3, 0.2, 0.4, 0.4, 0.3, 0.9, 0.9]
    assert stopped_after(digits, quiet, {"test": values.copy()}, tr.EarlyStopping(1)) == 3
    assert stopped_after(digits, quiet, {"test": values.copy()}, tr.EarlyStopping(2)) == 6
    assert stopped_after(digits, quiet, {"test": values.copy()}, tr.EarlyStopping(3)) == 8
    assert stopped_after(digits, quiet, {"test": values.copy()}, tr.EarlyStopping(2, least=0.15)) == 4


def test_the_patience_in_run_settings_works_from_python(digits, quiet):
    nothing_learned = tr.optim.SGD(lr=0.0, weight_decay=0.0)
    trainer = build(digits, quiet, epochs=8, optimizer=nothing_learned, settings=tr.RunSettings(patience=2))
    trainer.fit()
    assert trainer.progress.stop_reason == "early stopping: accuracy has not improved for 2 evaluations"
    assert trainer.progress.epochs_done == 3


def test_early_stopping_uses_the_validation_part(digits, quiet):
    values = {"validation": [0.5, 0.4, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5], "test": [0.9 - i / 10 for i in range(8)]}
    assert stopped_after(digits, quiet, values, tr.EarlyStopping(2), validation=digits[1]) == 5


@pytest.mark.parametrize("name", ["loss", "mean_absolute_error"])
def test_a_lower_loss_or_error_is_better(digits, quiet, name):
    values = {"test": [0.9, 0.8, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9]}
    assert stopped_after(digits, quiet, values, tr.EarlyStopping(2, metric=name), name) == 5


def test_early_stopping_on_an_unknown_metric_lists_the_available_ones(digits, quiet):
    with pytest.raises(UsageError, match="watches 'acuracy', but an evaluation has only loss, accuracy"):
        build(digits, quiet, callbacks=[tr.EarlyStopping(1, metric="acuracy")]).fit()


def test_early_stopping_needs_positive_patience():
    with pytest.raises(UsageError, match="patience is 0: choose 1 or more"):
        tr.EarlyStopping(0)


def test_a_run_stopped_early_is_saved_and_stays_stopped(digits, quiet, tmp_path):
    def trainer() -> tr.Trainer:
        optimizer = tr.optim.SGD(lr=0.0)  # nothing can improve
        return build(digits, quiet, tmp_path / "run", optimizer=optimizer, callbacks=[tr.EarlyStopping(2)])

    first = trainer()
    first.fit()
    assert first.progress.epochs_done == 3
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "stopped: early stopping: accuracy has not improved for 2 evaluations" in log
    second = trainer()
    second.resume()
    assert second.step == first.step == 12


# ------------------------------------------------------------------------------------------------ what ships


def test_the_step_log_averages_the_losses_since_its_last_line(digits, quiet, tmp_path):
    losses = []

    class Note(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            losses.append(float(loss))

    settings = tr.RunSettings(log_every=5)
    build(digits, quiet, tmp_path / "run", settings=settings, callbacks=[Note()]).fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["split"] == "step"]
    assert [(line["step"], line["epoch"]) for line in found] == [(5, 2), (10, 3)]
    for line, part in zip(found, (losses[:5], losses[5:10]), strict=True):
        assert line["loss"] == pytest.approx(sum(part) / 5, rel=1e-12)
        assert line["lr"] == 0.1
        assert line["samples_per_second"] > 0


def test_a_run_shorter_than_log_every_writes_no_step_line(digits, quiet, tmp_path):
    build(digits, quiet, tmp_path / "run", epochs=1).fit()
    assert '"split": "step"' not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.plots
def test_the_plots_of_a_run_are_not_blank(digits, quiet, tmp_path):
    run = tmp_path / "run"
    build(digits, quiet, run).fit()
    for name in ("curves.png", "confusion.png"):
        with Image.open(run / name) as image:
            assert min(image.size) >= 300
            colors = image.convert("RGB").getcolors(maxcolors=2**24)
        background = max(count for count, _ in colors)
        assert len(colors) > 50
        assert background < 0.97 * image.size[0] * image.size[1]
    assert "parameters" in (run / "model.txt").read_text()
    (media,) = (run / "tensorboard").glob("*.media")
    assert all(tag in media.read_bytes() for tag in (b"pictures/first batch", b"pictures/confusion matrix"))


def test_a_summary_that_a_failing_disk_left_out_is_made_when_the_run_is_resumed(digits, quiet, tmp_path):
    run = tmp_path / "run"
    build(digits, quiet, run, epochs=1).fit()
    summary = (run / "model.txt").read_text()
    (run / "model.txt").unlink()
    build(digits, quiet, run, epochs=2).resume()
    assert (run / "model.txt").read_text() == summary


def test_the_last_evaluation_is_written_to_a_file(digits, quiet, tmp_path):
    trainer = build(digits, quiet, tmp_path / "run")
    found = trainer.fit()
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {name: written[name] for name in found} == found
    assert written["samples"] == 359
    assert (written["step"], written["epoch"]) == (12, 3), "of the last epoch, which needn't be the best"
    assert set(written["accuracy_by_class"]) == set("0123456789")
    assert sum(map(sum, written["confusion_matrix"])) == 359


def test_a_model_that_cannot_be_summarized_still_trains(quiet, tmp_path):
    class Fussy(nn.Module):
        """Refuses a batch of one sample, which a summary uses."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            if len(x) < 2:
                raise ValueError("two at least")
            return self.layer(x)

    x, y = torch.randn(20, 3), torch.arange(20) % 2
    tr.Trainer(Fussy(), (x, y), epochs=1, batch_size=10, run=tmp_path / "run", terminal=quiet).fit()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "no summary of the model: ValueError: two at least" in log
    assert checkpoint.find(tmp_path / "run" / "checkpoints", "last").name == "step-00000002"


class Lines:
    """A custom tracker."""

    def __init__(self) -> None:
        self.lines: list[dict] = []
        self.closed = False

    def write(self, line) -> None:
        self.lines.append(dict(line))

    def close(self) -> None:
        self.closed = True


def test_a_custom_tracker_gets_every_line(digits, quiet, tmp_path):
    tracker = Lines()

    class Attach(tr.Callback):
        def on_start(self, trainer) -> None:
            trainer.run.trackers.append(tracker)

    saving = CheckpointSettings(every="2 steps")
    settings = tr.RunSettings(log_every=3)
    run = tmp_path / "run"
    build(digits, quiet, run, settings=settings, checkpoint=saving, callbacks=[Attach()]).fit()
    assert tracker.lines == [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert tracker.closed


# ------------------------------------------------------------------------------------------------ counting


def lines_of(run, split: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def test_a_run_may_be_measured_in_steps(digits, quiet, tmp_path):
    settings = tr.RunSettings(steps=10, evaluate_every="3 steps", log_every=5)
    trainer = build(digits, quiet, tmp_path, epochs=None, settings=settings, schedule=tr.optim.Cosine())
    trainer.fit()
    assert trainer.step == 10
    assert trainer.train_step.schedule.at(10, 1.0) == pytest.approx(0.0, abs=1e-6), "the schedule spans the steps"
    assert [line["step"] for line in lines_of(tmp_path, "test")] == [3, 6, 9, 10]
    assert [line["step"] for line in lines_of(tmp_path, "train")] == [4, 8, 10]
    assert [line["step"] for line in lines_of(tmp_path, "step")] == [5, 10]
    assert "stopped" not in (tmp_path / "log.txt").read_text()


def test_an_evaluation_inside_an_epoch_saves_the_best(digits, quiet, tmp_path):
    settings = tr.RunSettings(steps=6, evaluate_every="2 steps")
    trainer = build(digits, quiet, tmp_path, epochs=None, settings=settings)
    trainer.fit()
    values = [line["accuracy"] for line in lines_of(tmp_path, "test")]
    assert trainer.best.value == max(values)
    assert "step 2: test accuracy" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("at", [2, 4])
def test_a_run_killed_in_an_evaluation_inside_an_epoch_repeats_it(digits, quiet, same_runs, tmp_path, at):
    settings = tr.RunSettings(steps=6, evaluate_every="2 steps")

    class Stop(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            if trainer.step == at:
                os.kill(os.getpid(), signal.SIGTERM)

    build(digits, quiet, tmp_path / "whole", epochs=None, settings=settings).fit()
    with pytest.raises(Interrupted):
        build(digits, quiet, tmp_path / "cut", epochs=None, settings=settings, callbacks=[Stop()]).fit()
    build(digits, quiet, tmp_path / "cut", epochs=None, settings=settings).resume()
    same = [
        [line for split in ("test", "train") for line in lines_of(tmp_path / run, split)] for run in ("whole", "cut")
    ]
    for one, other in zip(*same, strict=True):
        assert (one["step"], one["loss"]) == (other["step"], other["loss"])


def test_a_partial_evaluation_uses_the_same_samples_each_time(digits, quiet):
    settings = tr.RunSettings(evaluate_batches=2)
    trainer = build(digits, quiet, settings=settings, batch_size=50)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first.samples == 100
    assert first.values == second.values
    indices = [index for batch in trainer.evaluator.parts["test"].epoch() for index in batch.indices]
    assert sorted(indices) != list(range(100)), "they are drawn"


def test_an_evaluation_may_be_scheduled_by_wall_clock_time(digits, quiet, tmp_path):
    settings = tr.RunSettings(evaluate_every="0.01 s", epochs=1)
    build(digits, quiet, tmp_path, epochs=1, batch_size=100, settings=settings).fit()
    assert len(lines_of(tmp_path, "test")) >= 2


class Slow(tr.Callback):
    """Takes its time, and stops the run after a step."""

    def __init__(self, stop: int = 0) -> None:
        self.stop = stop

    def on_step(self, trainer, batch, loss) -> None:
        time.sleep(0.02)
        tr.log("seen", trainer.step)
        if trainer.step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_clock_may_say_when_a_line_is_written_and_decides_nothing_else(digits, quiet, tmp_path, same_runs):
    by_clock = {"settings": tr.RunSettings(log_every="0.2 s"), "batch_size": 100, "epochs": 2}
    build(digits, quiet, tmp_path / "whole", callbacks=Slow(), **by_clock).fit()
    times = [line["time"] for line in lines_of(tmp_path / "whole", "step")]
    assert len(times) >= 2, "30 steps take 0.6 s and more"
    assert all(later - earlier > 0.1 for earlier, later in itertools.pairwise(times))
    for line in lines_of(tmp_path / "whole", "step"):
        assert line["seen"] <= line["step"]
    with pytest.raises(Interrupted):
        build(digits, quiet, tmp_path / "parted", callbacks=Slow(stop=20), **by_clock).fit()
    build(digits, quiet, tmp_path / "parted", callbacks=Slow(), **by_clock).resume()
    build(digits, quiet, tmp_path / "by steps", callbacks=Slow(), batch_size=100, epochs=2).fit()
    folders = (checkpoint.find(tmp_path / run / "checkpoints", "last") for run in ("whole", "parted", "by steps"))
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize(
    ("setting", "says"), [({"evaluate_every": 0}, "0 is no interval"), ({"log_every": "0 steps"}, "is no interval")]
)
def test_an_interval_of_zero_is_refused(setting, says):
    with pytest.raises(UsageError, match=says):
        tr.RunSettings(**setting)


# ------------------------------------------------------------------------------------------------ hooks


def test_hooks_around_a_step_are_called_in_order(digits, quiet):
    calls = []

    class Hooks(tr.Callback):
        def on_epoch_start(self, trainer, epoch) -> None:
            calls.append(("epoch", epoch, trainer.step))

        def on_batch(self, trainer, batch) -> None:
            calls.append(("batch", trainer.step))
            assert all(parameter.grad is None for parameter in trainer.model.parameters())

        def on_gradients(self, trainer) -> None:
            calls.append(("gradients", trainer.step))
            assert all(parameter.grad is not None for parameter in trainer.model.parameters())

        def on_step(self, trainer, batch, loss) -> None:
            calls.append(("step", trainer.step))

    build(digits, quiet, epochs=1, batch_size=1000, callbacks=[Hooks()]).fit()
    first = [("epoch", 1, 0), ("batch", 0), ("gradients", 0), ("step", 1)]
    assert calls == [*first, ("batch", 1), ("gradients", 1), ("step", 2)]


@pytest.mark.parametrize(
    "hook", ["on_start", "on_batch", "on_gradients", "on_step", "on_evaluate", "on_epoch", "on_end"]
)
def test_a_failing_callback_is_reported_with_the_step(digits, quiet, hook):
    def fails(*_) -> None:
        raise KeyError("row")

    callback = type("Faulty", (tr.Callback,), {hook: fails})()
    with pytest.raises(RelayError, match=rf"the callback Faulty failed in {hook} after step \d+: KeyError: 'row'"):
        build(digits, quiet, epochs=1, callbacks=[callback]).fit()


def test_a_group_is_trained_during_its_part_of_the_run(digits, quiet, tmp_path, same_runs):
    groups = [
        tr.optim.Group(match=["1.bias"], freeze="2 epochs"),
        tr.optim.Group(match=["1.weight"], train_for="9 steps"),
    ]
    seen = []

    class Watch(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            seen.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})

    optimizer = tr.optim.SGD(lr=0.1, groups=groups)
    build(digits, quiet, tmp_path / "whole", optimizer=optimizer, callbacks=[Watch()]).fit()
    moved = [
        {name for name in seen[0] if not torch.equal(seen[i][name], seen[i + 1][name])} for i in range(len(seen) - 1)
    ]
    assert moved == [{"1.weight"}] * 7 + [{"1.weight", "1.bias"}] + [{"1.bias"}] * 3

    class Stop(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            if trainer.step == 9:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        build(digits, quiet, tmp_path / "cut", optimizer=optimizer, callbacks=[Stop()]).fit()
    build(digits, quiet, tmp_path / "cut", optimizer=optimizer).resume()
    gap = [tr.optim.Group(match=["1.bias"], freeze="2 epochs"), tr.optim.Group(match=["1.weight"], train_for="6 steps")]
    with pytest.raises(UsageError, match="nothing is trained in step 7"):
        build(digits, quiet, optimizer=tr.optim.SGD(lr=0.1, groups=gap))
    whole, cut = (tmp_path / run / "checkpoints" / "step-00000012" / "model.safetensors" for run in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


# ------------------------------------------------------------------------------------------------ before the training


class Sums(tr.Task):
    headline = "loss"

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, reduction="sum")


def test_an_unmeasured_headline_is_reported_before_the_first_step(digits, quiet):
    class Odd(Sums):
        headline = "score"

    trainer = build(digits, quiet, task=Odd())
    with pytest.raises(UsageError, match=r"Odd.headline is 'score', and an evaluation measures loss"):
        trainer.fit()
    assert trainer.step == 0


def test_a_failing_metric_is_reported_before_the_first_step(digits, quiet):
    class Odd(Sums):
        def measure(self, outputs, targets):
            raise KeyError("no")

    trainer = build(digits, quiet, task=Odd())
    with pytest.raises(KeyError):
        trainer.fit()
    assert trainer.step == 0


def test_a_run_that_failed_in_its_first_step_may_start_again_in_its_folder(digits, quiet, tmp_path):
    class Fails(tr.Callback):
        def on_batch(self, trainer, batch) -> None:
            raise KeyError("no")

    with pytest.raises(RelayError, match="the callback Fails failed in on_batch after step 0"):
        build(digits, quiet, tmp_path, callbacks=[Fails()]).fit()
    build(digits, quiet, tmp_path, epochs=1).fit()
    assert [line["step"] for line in lines_of(tmp_path, "test")] == [4]
    with pytest.raises(UsageError, match="holds a run already"):
        build(digits, quiet, tmp_path, epochs=1).fit()


def test_resume_auto_starts_or_resumes_a_run(digits, quiet, tmp_path):
    first = build(digits, quiet, tmp_path, epochs=1)
    first.fit(resume="auto")
    second = build(digits, quiet, tmp_path, epochs=2)
    second.fit(resume="auto")
    assert second.step == 8
    assert [line["epoch"] for line in second.history if line["split"] == "train"] == [2]


def test_a_run_keeps_its_replicas_when_it_is_resumed_from_python(digits, quiet, tmp_path):
    build(digits, quiet, tmp_path, epochs=1, parallel=tr.ParallelSettings(replicas=4)).fit()
    assert build(digits, quiet, tmp_path, epochs=2).batches.replicas == 4


def test_test_data_may_be_several_named_datasets(digits, quiet, tmp_path):
    train, test = digits
    few = test.take(torch.arange(20))
    trainer = tr.Trainer(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        train,
        {"all": test, "few": few},
        epochs=1,
        run=tmp_path,
        terminal=quiet,
        test_batch_size=7,
    )
    trainer.fit()
    assert trainer.selects_on == "all"
    assert len(lines_of(tmp_path, "few")) == 1
    assert trainer.evaluate("few").samples == 20


def test_metrics_that_a_callback_adds_are_recorded(digits, quiet, tmp_path):
    class Adds(tr.Callback):
        def on_evaluate(self, trainer, split, values) -> None:
            values["twice"] = 2 * values["loss"]

    build(digits, quiet, tmp_path, epochs=1, callbacks=[Adds()]).fit()
    (line,) = lines_of(tmp_path, "test")
    assert line["twice"] == 2 * line["loss"]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_loss_that_is_a_mean_gets_a_hint(digits, quiet, tmp_path, reduction):
    class Own(Sums):
        def loss(self, outputs, targets):
            return nn.functional.cross_entropy(outputs, targets, reduction=reduction)

    build(digits, quiet, tmp_path, epochs=1, task=Own()).fit()
    assert ("hint: the loss of Own is" in (tmp_path / "log.txt").read_text()) == (reduction == "mean")


def test_a_rate_that_the_schedule_would_overwrite_is_refused(digits, quiet):
    class Sets(tr.Callback):
        def __init__(self, hook: str, key: str) -> None:
            self.hook, self.key, self.seen = hook, key, []

        def set(self, trainer, hook: str) -> None:
            if hook == self.hook:
                trainer.optimizer.param_groups[0][self.key] = 0.05

        def on_epoch(self, trainer, epoch, values) -> None:
            self.set(trainer, "on_epoch")

        def on_gradients(self, trainer) -> None:
            self.set(trainer, "on_gradients")

        def on_step(self, trainer, batch, loss) -> None:
            self.seen.append(trainer.optimizer.param_groups[0]["lr"])

    with pytest.raises(UsageError, match="Sets sets a group's 'lr' in on_epoch, and the schedule sets it anew"):
        build(digits, quiet, callbacks=Sets("on_epoch", "lr")).fit()
    for callback, rates in ((Sets("on_epoch", "initial_lr"), {0.1, 0.05}), (Sets("on_gradients", "lr"), {0.05})):
        build(digits, quiet, epochs=2, callbacks=callback).fit()
        assert set(callback.seen) == rates


def test_what_is_unfrozen_and_has_no_optimizer_is_named(digits, quiet):
    class Unfreezes(tr.Callback):
        def on_epoch(self, trainer, epoch, values) -> None:
            trainer.model.requires_grad_(True)

    def fit(optimizer) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 10))
        frozen = model[1].requires_grad_(False).weight
        before = frozen.clone()
        build(digits, quiet, model=model, epochs=2, optimizer=optimizer, callbacks=Unfreezes()).fit()
        return (frozen - before).abs().max()

    with pytest.raises(
        UsageError, match=r"'1.weight' was unfrozen \(2 parameters in all\), but the optimizer left out"
    ):
        fit(tr.optim.SGD(lr=0.1))
    assert fit(lambda model: torch.optim.SGD(model.parameters(), lr=0.1)) > 0


def test_wall_clock_durations_are_refused_where_they_change_results(digits, quiet):
    by_clock = {"evaluate_every": "10 min"}
    with pytest.raises(UsageError, match="the clock would decide what is computed: give epochs or steps"):
        build(digits, quiet, settings=tr.RunSettings(patience=2, **by_clock))
    with pytest.raises(UsageError, match="the clock would decide what is computed"):
        build(digits, quiet, settings=tr.RunSettings(**by_clock), schedule=tr.optim.Plateau())


def test_values_logged_since_the_last_line_survive_a_stop(digits, quiet, tmp_path):
    class Logs(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            tr.log("twice", 2 * trainer.step)

    class Stop(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            if trainer.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = tr.RunSettings(log_every=4)
    build(digits, quiet, tmp_path / "whole", settings=settings, callbacks=[Logs()]).fit()
    with pytest.raises(Interrupted):
        build(digits, quiet, tmp_path / "cut", settings=settings, callbacks=[Logs(), Stop()]).fit()
    build(digits, quiet, tmp_path / "cut", settings=settings, callbacks=[Logs()]).resume()
    whole, cut = ([line["twice"] for line in lines_of(tmp_path / run, "step")] for run in ("whole", "cut"))
    assert whole == cut
