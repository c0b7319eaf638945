"""Tasks: equal to PyTorch's losses, and they learn."""

import math
from collections import Counter

import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MultilabelF1Score

import torchrelay as tr
from torchrelay.errors import RelayError, UsageError
from torchrelay.tasks.classification import balanced_weights


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(40, 7, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def targets() -> torch.Tensor:
    return torch.randint(7, (40,), generator=torch.Generator().manual_seed(4))


def mean_loss(task: tr.Task, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The trainer's loss: the sum over the parts, divided by the total weight."""
    parts = [task.loss(o, t) for o, t in zip(outputs.split(16), targets.split(16), strict=True)]
    return torch.stack(parts).sum() / task.weight(targets)


# ------------------------------------------------------------------------------------------------ classification


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_classification_is_the_mean_cross_entropy_of_the_whole_batch(logits, targets, smoothing, weighted):
    weights = torch.linspace(0.5, 2.0, 7) if weighted else None
    found = mean_loss(tr.Classification(smoothing, weights), logits, targets)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets, weights, label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_are_probabilities(logits, targets, smoothing):
    other = F.one_hot(targets.roll(1), 7).float()
    mixed = 0.7 * F.one_hot(targets, 7).float() + 0.3 * other
    found = mean_loss(tr.Classification(smoothing), logits, mixed)
    torch.testing.assert_close(found, F.cross_entropy(logits, mixed, label_smoothing=smoothing))


def test_one_hot_targets_have_the_weights_of_their_classes(logits, targets):
    task = tr.Classification(class_weights=torch.linspace(0.5, 2.0, 7))
    pure = F.one_hot(targets, 7).float()
    torch.testing.assert_close(mean_loss(task, logits, pure), mean_loss(task, logits, targets))


def test_accuracy_uses_the_larger_part_of_a_mixed_target(logits, targets):
    right = (logits.argmax(1) == targets).sum()
    mixed = 0.7 * F.one_hot(targets, 7).float() + 0.3 * F.one_hot(targets.roll(1), 7).float()
    for given in (targets, mixed):
        assert tr.Classification().measure(logits, given) == {"accuracy": right}


@pytest.mark.parametrize("form", ["classes", "probabilities"])
def test_classification_metrics_agree_with_torchmetrics(logits, targets, form):
    targets[targets == 3] = 2  # a class that the data doesn't have
    beside = {
        "accuracy_by_class": MulticlassAccuracy(7, average="none"),
        "confusion_matrix": MulticlassConfusionMatrix(7),
        "top5_accuracy": MulticlassAccuracy(7, average="micro", top_k=5),
    }
    given = targets if form == "classes" else 0.6 * F.one_hot(targets, 7) + 0.4 / 7
    metrics = tr.Classification(classes=7).metrics()
    assert set(metrics) == set(beside)
    for name, metric in metrics.items():
        for part in range(0, 40, 16):
            metric.update(logits[part : part + 16].softmax(1), given[part : part + 16])
            beside[name].update(logits[part : part + 16].softmax(1), targets[part : part + 16])
        # Theirs says 0 for a class without samples.
        torch.testing.assert_close(metric.compute().nan_to_num(0), beside[name].compute(), check_dtype=False)


def test_five_classes_have_no_top5_accuracy():
    assert set(tr.Classification(classes=5).metrics()) == {"accuracy_by_class", "confusion_matrix"}


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_an_invalid_label_smoothing_is_refused(share):
    with pytest.raises(UsageError, match="choose a share from 0 up to, not including, 1"):
        tr.Classification(label_smoothing=share)


def test_balanced_weights_give_every_class_the_same_weight():
    targets = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = balanced_weights(targets, 4)
    sums = [float(weights[targets][targets == c].sum()) for c in range(3)]
    assert sums == pytest.approx([2.5, 2.5, 2.5])
    assert torch.isfinite(weights).all()  # a class that the data doesn't have


def test_class_weights_change_the_learned_probabilities(quiet):
    """With one constant feature, the network can only learn the class frequencies."""
    x, y = torch.ones(200, 1), (torch.arange(200) % 10 == 0).long()  # a tenth is of class 1
    said = {}
    for name, weights in (("plain", None), ("balanced", balanced_weights(y, 2))):
        torch.manual_seed(0)
        trainer = tr.Trainer(
            nn.Linear(1, 2),
            (x, y),
            task=tr.Classification(class_weights=weights),
            optimizer=tr.optim.SGD(lr=0.5),
            epochs=150,
            batch_size=200,
            terminal=quiet,
        )
        trainer.fit()
        said[name] = float(trainer.predict(x[:1])[0, 1])
    assert said["plain"] == pytest.approx(0.1, abs=0.03)
    assert said["balanced"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.plots)])
def test_classification_needs_no_names_of_classes(digits, quiet, tmp_path, named):
    train, test = digits
    parts = [(part.inputs.flatten(1) / 255, part.targets) for part in (train, test)]
    if named:
        parts = [tr.data.arrays(*part, classes=tuple("abcdefghij")) for part in parts]
    torch.manual_seed(0)
    trainer = tr.Trainer(
        nn.Linear(64, 10),
        *parts,
        task=tr.Classification(classes=10),
        optimizer=tr.optim.AdamW(lr=1e-2),
        epochs=4,
        run=tmp_path / "run",
        terminal=quiet,
    )
    assert trainer.fit()["accuracy"] > 0.8
    assert trainer.last_evaluation is not None
    table = trainer.last_evaluation.to_json(trainer.classes)["accuracy_by_class"]
    assert "".join(table) == ("abcdefghij" if named else "0123456789")
    assert (tmp_path / "run" / "confusion.png").exists() == (not named)


# ------------------------------------------------------------------------------------------------ several labels


def multilabel_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Three labels, each a linear question about five features."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=generator)
    questions = torch.randn(5, 3, generator=generator)
    return x, (x @ questions > 0.5).float()


@pytest.mark.parametrize("positive_weights", [None, torch.tensor([1.0, 2.0, 3.0])])
def test_multilabel_is_the_mean_binary_cross_entropy(positive_weights):
    x, y = multilabel_data()
    found = mean_loss(tr.MultiLabel(positive_weights), x[:, :3], y)
    expected = F.binary_cross_entropy_with_logits(x[:, :3], y, pos_weight=positive_weights)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.bool])
def test_multilabel_metrics_are_bit_equal_to_torchmetrics(kind):
    generator = torch.Generator().manual_seed(1)
    probabilities, targets = torch.rand(70, 5, generator=generator), torch.rand(70, 5, generator=generator) < 0.3
    targets[:, 2], targets[:, 3], probabilities[:, 3] = False, False, 0.1  # never present; nor predicted
    probabilities[:9, 0] = 0.5  # on the threshold
    metrics = tr.MultiLabel(labels=5).metrics()
    beside = {"f1": MultilabelF1Score(5, average="micro"), "f1_by_label": MultilabelF1Score(5, average="none")}
    assert set(metrics) == set(beside)
    for name, metric in metrics.items():
        for part in range(0, 70, 16):
            metric.update(probabilities[part : part + 16], targets[part : part + 16].to(kind))
            beside[name].update(probabilities[part : part + 16], targets[part : part + 16].long())
        found, expected = metric.compute(), beside[name].compute()
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name


def test_multilabel_classification_learns(quiet, tmp_path):
    x, y = multilabel_data()
    torch.manual_seed(0)
    trainer = tr.Trainer(
        nn.Linear(5, 3),
        (x[:500], y[:500]),
        (x[500:], y[500:]),
        task=tr.MultiLabel(labels=3),
        optimizer=tr.optim.AdamW(lr=0.05),
        epochs=15,
        batch_size=50,
        run=tmp_path / "run",
        terminal=quiet,
    )
    found = trainer.fit()
    assert found["f1"] > 0.93
    assert found["accuracy"] > 0.93
    said = trainer.predict(x[500:]) > 0.5
    assert float((said == (y[500:] > 0.5)).float().mean()) == pytest.approx(found["accuracy"], abs=1e-6)
    true_positives = (said & (y[500:] > 0.5)).sum()
    assert found["f1"] == pytest.approx(float(2 * true_positives / (said.sum() + y[500:].sum())), abs=1e-6)


def test_label_names_give_the_number_of_labels(quiet):
    x, y = multilabel_data()
    data = tr.data.arrays(x, y, classes=("sweet", "sour", "salty"))
    trainer = tr.Trainer(nn.Linear(5, 3), data, data, task=tr.MultiLabel(), epochs=1, terminal=quiet)
    trainer.fit()
    assert trainer.last_evaluation is not None
    assert set(trainer.last_evaluation.to_json(trainer.classes)["f1_by_label"]) == {"sweet", "sour", "salty"}


def test_multilabel_without_a_number_of_labels_is_refused():
    with pytest.raises(RelayError, match=r"give MultiLabel\(labels=...\)"):
        tr.MultiLabel().metrics()


# ------------------------------------------------------------------------------------------------ numbers


def diabetes() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    return 20 * x, (y - y.mean()) / y.std()  # the features come with a sum of squares of one


def test_regression_learns_more_than_the_mean(quiet, tmp_path):
    x, y = diabetes()
    torch.manual_seed(0)
    trainer = tr.Trainer(
        nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1)),
        (x[:340], y[:340]),
        (x[340:], y[340:]),
        task=tr.Regression(),
        optimizer=tr.optim.AdamW(lr=5e-3),
        epochs=30,
        batch_size=34,
        run=tmp_path / "run",
        terminal=quiet,
    )
    found = trainer.fit()
    of_the_mean = float((y[340:] - y[:340].mean()).square().mean())
    assert found["mean_squared_error"] < 0.65 * of_the_mean
    assert found["mean_squared_error"] == pytest.approx(found["loss"], rel=1e-5)
    predicted = trainer.predict(x[340:])
    assert predicted.shape == (102, 1)
    assert found["mean_absolute_error"] == pytest.approx(float((predicted[:, 0] - y[340:]).abs().mean()), rel=1e-5)
    assert trainer.best is not None
    lines = (tmp_path / "run" / "log.txt").read_text()
    assert "best test mean squared error: " in lines


def test_regression_of_another_shape_is_refused():
    with pytest.raises(RelayError, match=r"the model gives \(4, 3\) for targets of \(4,\): make them equal"):
        tr.Regression().loss(torch.zeros(4, 3), torch.zeros(4))


def test_several_regression_targets_are_averaged():
    outputs, targets = torch.arange(6.0).view(3, 2), torch.ones(3, 2)
    torch.testing.assert_close(mean_loss(tr.Regression(), outputs, targets), F.mse_loss(outputs, targets))
    assert tr.Regression().count(targets) == 6


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_next_token_ignores_padding(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(6, 5, 9, generator=generator), torch.randint(9, (6, 5), generator=generator)
    tokens[1, 2:] = tokens[4] = -100
    task = tr.NextToken(smoothing)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(mean_loss(task, logits, tokens), expected)
    assert task.count(tokens) == 22
    assert int(task.measure(F.one_hot(tokens.clamp(min=0), 9), tokens)["accuracy"]) == 22


def test_a_character_model_beats_character_frequencies(quiet, tmp_path):
    text = "the relay goes on: one runner stops, another runs, the flame stays alight. " * 60
    (tmp_path / "text.txt").write_text(text)
    train, test = tr.data.text(tmp_path / "text.txt", length=32)
    torch.manual_seed(0)
    settings = tr.models.ModelSettings(name="char-lm", options={"width": 32, "layers": 1})
    trainer = tr.Trainer(
        tr.models.build(settings, classes=len(train.classes), log=quiet.say),
        train,
        test,
        task=tr.NextToken(),
        optimizer=tr.optim.AdamW(lr=1e-2),
        epochs=4,
        batch_size=16,
        run=tmp_path / "run",
        terminal=quiet,
    )
    found = trainer.fit()
    shares = [count / len(text) for count in Counter(text).values()]
    unigram_entropy = -sum(share * math.log(share) for share in shares)  # nats a character
    assert found["loss"] < 0.8 * unigram_entropy
    assert found["accuracy"] > 0.5


# ------------------------------------------------------------------------------------------------ one's own


class Ranked(tr.Task):
    """Which of two is larger: a task in eight lines that weighs by pairs."""

    headline = "agreement"
    higher_is_better = True

    def loss(self, outputs, targets):
        return F.softplus(-(outputs[:, 0] - outputs[:, 1]) * targets).sum()

    def measure(self, outputs, targets):
        return {"agreement": ((outputs[:, 0] > outputs[:, 1]) == (targets > 0)).sum()}


class Score(nn.Module):
    """The same small network for both of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, pairs):  # (batch, 2, 4) -> (batch, 2)
        return self.layer(pairs)[..., 0]


def test_a_custom_task_trains_and_selects_the_best_checkpoint(quiet, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(400, 2, 4, generator=generator)
    truth = torch.sign(pairs[:, 0, 1] - pairs[:, 1, 1])
    torch.manual_seed(0)
    trainer = tr.Trainer(
        Score(),
        (pairs[:300], truth[:300]),
        (pairs[300:], truth[300:]),
        task=Ranked(),
        optimizer=tr.optim.AdamW(lr=0.05),
        epochs=12,
        batch_size=50,
        run=tmp_path / "run",
        terminal=quiet,
    )
    assert trainer.fit()["agreement"] > 0.9
    assert trainer.best is not None
    assert trainer.predict(pairs[:5]).shape == (5, 2)


def test_a_task_without_a_loss_names_the_method_to_define(digits, quiet):
    with pytest.raises(UsageError, match=r"Task has no loss: define loss\(outputs, targets\)"):
        tr.Trainer(nn.Linear(64, 10), digits[0], task=tr.Task(), terminal=quiet)
