"""Evaluation: every sample once, and sums that don't depend on when they are read."""

import json

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay.data.augment import Pipeline
from torchrelay.data.batches import Batches
from torchrelay.device.device import DeviceSettings, set_up
from torchrelay.errors import UsageError
from torchrelay.run.metrics import read_metrics
from torchrelay.run.settings import RunSettings
from torchrelay.tasks.classification import Classification
from torchrelay.train.evaluation import Evaluation, Evaluator
from torchrelay.train.progress import RunningSums


def evaluate(model, data, task, device) -> Evaluation:
    evaluation = Evaluator(model, task, device, {"test": data}).evaluate("test")
    assert evaluation is not None
    return evaluation


def predict(model, data, task, device) -> torch.Tensor:
    return Evaluator(model, task, device).predict(data)


@pytest.fixture
def device():
    return set_up(DeviceSettings(name="cpu"), exact=True)


def batches(source, size, device) -> Batches:
    return Batches(source, size, device, Pipeline(), train=False)


class Seen(nn.Module):
    """A linear network that records its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.5)
        self.sizes: list[int] = []

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.sizes.append(len(images))
        return self.layer(self.dropout(images.flatten(1)))


def by_hand(model: Seen, source) -> torch.Tensor:
    with torch.no_grad():
        return model.layer(source.inputs.flatten(1).float() / 255)


def test_a_batch_of_zero_weight_keeps_the_loss_finite(digits, device):
    positions = digits[1].targets.argsort(stable=True)  # the first batch holds one class alone
    source, model = digits[1].take(positions), Seen()
    weights = torch.tensor([0.0, *[1.0] * 9])
    found = evaluate(model, batches(source, 10, device), Classification(class_weights=weights), device)
    expected = nn.functional.cross_entropy(by_hand(model, source).double(), source.targets, weights.double())
    assert found.values["loss"] == pytest.approx(float(expected))


@pytest.mark.parametrize("size", [1, 100, 359, 1000])
def test_every_sample_counts_once_for_any_batch_size(digits, device, size):
    model, source = Seen(), digits[1]
    model.train()
    found = evaluate(model, batches(source, size, device), Classification(classes=10), device)
    assert model.training
    assert sum(model.sizes) == found.samples == 359
    logits = by_hand(model, source)
    assert found.values["accuracy"] == pytest.approx(float((logits.argmax(1) == source.targets).float().mean()))
    expected = float(nn.functional.cross_entropy(logits.double(), source.targets))
    assert found.values["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_keeps_a_model_in_eval_mode(digits, device):
    model = Seen().eval()
    evaluate(model, batches(digits[1], 100, device), Classification(), device)
    predict(model, batches(digits[1], 100, device), Classification(), device)
    assert not model.training


def test_class_weights_apply_to_an_evaluation(digits, device):
    model, source, weights = Seen(), digits[1], torch.linspace(0.5, 2, 10)
    task = Classification(class_weights=weights)
    found = evaluate(model, batches(source, 100, device), task, device)
    expected = float(nn.functional.cross_entropy(by_hand(model, source), source.targets, weights))
    assert found.values["loss"] == pytest.approx(expected, rel=1e-5)


def test_predictions_are_in_the_order_of_the_data(digits, device):
    model, source = Seen(), digits[1]
    found = predict(model, batches(source, 50, device), Classification(), device)
    torch.testing.assert_close(found, by_hand(model, source).softmax(1))


def test_an_evaluation_repeats_the_recorded_metrics(digits, quiet, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    trainer = tr.Trainer(model, *digits, epochs=2, run=tmp_path / "run", terminal=quiet)
    trainer.fit()
    again = trainer.evaluate()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["split"] == "test"][-1].items() >= again.values.items()


def test_an_evaluation_of_a_missing_part_is_refused(digits, quiet):
    trainer = tr.Trainer(nn.Linear(1, 1), digits[0], terminal=quiet)
    with pytest.raises(UsageError, match=r"there is no test data to evaluate on: give Trainer\(..., test=...\)"):
        trainer.evaluate()


# ------------------------------------------------------------------------------------------------ sums


def some_sums(fetch_after: tuple[int, ...] = (), save_after: int | None = None) -> dict[str, float]:
    """The means of some batches, read, saved and loaded in between."""
    sums = RunningSums()
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        sums.add_loss(torch.rand((), generator=generator), float(i + 1))
        sums.add_measures({"accuracy": torch.randint(9, (), generator=generator)}, 9)
        if i in fetch_after:
            sums.means()
        if i == save_after:
            state = json.loads(json.dumps(sums.state_dict()))
            sums = RunningSums()
            sums.load_state_dict(state)
    return sums.means()


def test_reading_or_saving_sums_changes_no_bit():
    undisturbed = some_sums()
    assert some_sums(fetch_after=(0, 3, 4, 19)) == undisturbed
    for position in range(20):
        assert some_sums(save_after=position) == undisturbed


def test_sums_of_a_long_epoch_hold_few_steps():
    sums = RunningSums()
    for _ in range(5000):
        sums.add_measures({"accuracy": torch.tensor(1)}, 2)
        sums.add_loss(torch.tensor(0.5), 2.0)
    assert max(len(sums._losses), len(sums._measures)) < 2000
    assert sums.means() == {"loss": 0.5, "accuracy": 0.5}


def test_means_are_weighted():
    sums = RunningSums()
    sums.add_loss(torch.tensor(1.0), 3.0)
    sums.add_loss(torch.tensor(5.0), torch.tensor(1.0))
    sums.add_measures({"accuracy": torch.tensor(2)}, 3)
    sums.add_measures({"accuracy": torch.tensor(0)}, 1)
    assert sums.means() == {"loss": 2.0, "accuracy": 0.5}


def test_the_mean_of_no_samples_is_zero():
    assert RunningSums().means() == {"loss": 0.0}


def test_without_train_metrics_an_epoch_has_only_its_loss(digits, quiet, tmp_path):
    for measured in (True, False):
        torch.manual_seed(0)
        run = tmp_path / str(measured)
        settings = RunSettings(train_metrics=measured)
        tr.Trainer(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            *digits,
            epochs=1,
            settings=settings,
            run=run,
            device="cpu",
            terminal=quiet,
        ).fit()
    lines = [
        next(line for line in read_metrics(tmp_path / name) if line["split"] == "train") for name in ("True", "False")
    ]
    assert "accuracy" in lines[0]
    assert "accuracy" not in lines[1]
    assert lines[0]["loss"] == lines[1]["loss"]
    weights = [(tmp_path / name / "checkpoints").glob("*/model.safetensors") for name in ("True", "False")]
    assert len({next(iter(files)).read_bytes() for files in weights}) == 1


# ------------------------------------------------------------------------------------------------ as JSON


def test_a_per_class_metric_is_keyed_by_class_name_or_index():
    found = Evaluation({"loss": 0.5}, {"accuracy_by_class": [0.25, 0.75]}, torch.tensor([[1, 3], [1, 3]]), 8)
    assert found.to_json(("cat", "dog")) == {
        "samples": 8,
        "loss": 0.5,
        "accuracy_by_class": {"cat": 0.25, "dog": 0.75},
        "confusion_matrix": [[1, 3], [1, 3]],
    }
    assert found.to_json(())["accuracy_by_class"] == {"0": 0.25, "1": 0.75}


def test_samples_are_sequences_when_a_task_counts_tokens(quiet):
    tokens = torch.arange(60).view(6, 10) % 7
    source = tr.data.arrays(tokens, tokens)
    model = torch.nn.Embedding(7, 7)  # tokens (batch, length) to logits (batch, length, 7)
    trainer = tr.Trainer(model, source, source, task=tr.NextToken(), batch_size=4, terminal=quiet)
    assert trainer.evaluate().samples == 6
    trainer.fit()
    assert trainer.last_evaluation.samples == 6


def test_sums_on_the_cpu_keep_numbers_and_no_tensors():
    """A small tensor kept from each step fragments the heap, which then grows by megabytes a step."""
    sums = RunningSums()
    for _ in range(3):
        sums.add_loss(torch.tensor(0.5), torch.tensor(4.0))
        sums.add_measures({"right": torch.tensor(3)}, torch.tensor(4))
    kept = [each for pair in sums._losses for each in pair]
    kept += [each for measures, count in sums._measures for each in (*measures.values(), count)]
    assert not any(isinstance(each, torch.Tensor) for each in kept)
    assert sums.means() == {"loss": 0.5, "right": 0.75}
