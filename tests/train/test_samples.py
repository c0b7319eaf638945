"""What an evaluation keeps of each sample, and its file in the run's folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

import torchrelay as tr
from torchrelay.errors import RelayError
from torchrelay.train import samples
from torchrelay.train.samples import Collector

FILE = "samples.safetensors"


def collected(task, outputs, targets, size=7, **options) -> samples.Samples:
    """What is kept of these outputs, which come in batches."""
    collector = Collector(task, **options)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        given = {k: v[part] for k, v in outputs.items()} if isinstance(outputs, dict) else outputs[part]
        collector.add(given, targets[part], np.arange(start, min(start + size, len(targets))))
    return collector.collected()


def alone(task, outputs, targets) -> list[float]:
    """The loss of each sample, as if it were the only one."""
    parts = [(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
    return [float(task.loss(given, wanted) / task.weight(wanted)) for given, wanted in parts]


def trained(quiet, folder, data, task=None, **options) -> tr.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    trainer = tr.Trainer(model, *data, task=task, epochs=1, run=folder, terminal=quiet, **options)
    trainer.fit()
    return trainer


# ------------------------------------------------------------------------------------------------ tasks

LOGITS = 3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(20) % 4
LABELS = (LOGITS.roll(1, 0) > 0).float()


@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        (tr.Classification(label_smoothing=0.1), LOGITS, CLASSES),
        (tr.Classification(), LOGITS, LOGITS.roll(1, 0).softmax(1)),
        (tr.MultiLabel(torch.tensor([1.0, 2, 3, 4]), 4), LOGITS, LABELS),
        (tr.tasks.Binary(torch.tensor(2.0)), LOGITS[:, :1], LABELS[:, 0]),
        (tr.Regression(), LOGITS[:, :1], LABELS[:, 0]),
        (tr.Regression(), LOGITS, LABELS),
        (tr.NextToken(ignore=0), LOGITS.view(4, 5, 4), CLASSES.view(4, 5)),
    ],
)
def test_the_loss_of_each_sample_is_that_of_a_batch_of_it_alone(task, outputs, targets):
    found = collected(task, outputs, targets).columns
    assert found["loss"].tolist() == pytest.approx(alone(task, outputs, targets), rel=1e-5)
    assert found["index"].tolist() == [*range(len(targets))]


@pytest.mark.parametrize("loss", [nn.L1Loss(), F.smooth_l1_loss, nn.MSELoss()])
def test_a_loss_of_pytorchs_is_kept_of_each_sample(quiet, loss):
    inputs, targets = LOGITS, LABELS[:, 0]
    data = inputs, targets
    trainer = tr.Trainer(nn.Linear(4, 1), data, data, loss=loss, epochs=1, terminal=quiet)
    trainer.evaluate()
    plain = loss if not isinstance(loss, nn.Module) else type(loss)()
    with torch.no_grad():
        expected = [float(plain(trainer.model(x[None])[0], y[None])) for x, y in zip(*data, strict=True)]
    assert trainer.evaluator.samples.columns["loss"].tolist() == pytest.approx(expected, rel=1e-5)


def test_class_weights_leave_each_samples_loss_alone():
    weighted = tr.Classification(class_weights=torch.tensor([0.0, 1, 2, 3]))
    expected = F.cross_entropy(LOGITS, CLASSES, reduction="none")
    assert torch.equal(collected(weighted, LOGITS, CLASSES).columns["loss"], expected)


def test_several_labels_have_a_column_each():
    found = collected(tr.MultiLabel(labels=4), LOGITS, LABELS).columns
    assert torch.equal(found["prediction"], LOGITS > 0)
    assert torch.equal(found["target"], LABELS.bool())
    torch.testing.assert_close(found["confidence"], LOGITS.sigmoid())


def test_one_logit_is_one_of_two_classes():
    found = collected(tr.tasks.Binary(), LOGITS[:, 0], LABELS[:, 0]).columns
    assert found["prediction"].tolist() == (LOGITS[:, 0] > 0).long().tolist()
    torch.testing.assert_close(found["confidence"], LOGITS[:, 0].abs().sigmoid())
    assert found["target"].dtype == torch.int64


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_image_of_classes_has_a_mean_iou(wrapped):
    logits = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, 2, (5, 4, 6), generator=torch.Generator().manual_seed(2))
    targets[:, 0] = 255
    found = collected(tr.tasks.Segmentation(3), {"out": logits} if wrapped else logits, targets, 2).columns
    for image, wanted, value in zip(logits.argmax(1), targets, found["mean_iou"].tolist(), strict=True):
        counted, each = wanted != 255, []
        for label in range(3):
            there, said = (wanted == label) & counted, (image == label) & counted
            if (there | said).any():
                each.append(float((there & said).sum() / (there | said).sum()))
        assert value == pytest.approx(sum(each) / len(each))


def test_an_image_of_boxes_has_the_mean_of_their_best_ious():
    box, other = [0.0, 0, 10, 10], [0.0, 0, 5, 10]
    outputs = [{"boxes": torch.tensor([other, box]), "labels": torch.tensor([1, 2]), "scores": torch.ones(2)}]
    outputs += [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}]
    targets = [{"boxes": torch.tensor([box, box]), "labels": torch.tensor([1, 2])}]
    targets += [{"boxes": torch.tensor([box]), "labels": torch.tensor([1])}]
    found = collected(tr.tasks.Detection(), outputs, targets).columns
    assert found["mean_iou"].tolist() == [0.75, 0.0]
    assert found["boxes"].tolist() == [2, 1]


class Own(tr.Task):
    def loss(self, outputs, targets):
        return outputs.square().sum()


class OwnLoss(tr.Classification):
    def loss(self, outputs, targets):
        return 2 * super().loss(outputs, targets)


def test_a_task_of_ones_own_keeps_a_target_that_is_a_number():
    assert [*collected(Own(), LOGITS, CLASSES).columns] == ["index", "target"]
    assert collected(Own(), LOGITS, LABELS) == samples.Samples({})


def test_a_task_with_another_loss_keeps_no_loss():
    assert [*collected(OwnLoss(), LOGITS, CLASSES).columns] == ["index", "prediction", "confidence", "target"]


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("views", [1, 2])
def test_a_run_writes_what_a_loop_by_hand_finds(digits, quiet, tmp_path, views):
    settings = tr.RunSettings(test_views=views)
    trainer = trained(quiet, tmp_path / "run", digits, batch_size=100, settings=settings)
    found = load_file(tmp_path / "run" / FILE)
    assert found["index"].tolist() == [*range(359)]
    mean, std = (torch.tensor(each) for each in (trainer.batches.pipeline.mean, trainer.batches.pipeline.std))
    with torch.no_grad():
        for i in range(0, 359, 31):
            image = (digits[1].inputs[i : i + 1] / 255 - mean) / std
            logits = sum(trainer.model(each) for each in (image, image.flip(-1))[:views]) / views
            assert found["loss"][i] == pytest.approx(
                float(F.cross_entropy(logits, digits[1].targets[i : i + 1])), rel=1e-3
            )
            assert found["confidence"][i] == pytest.approx(float(logits.softmax(1).max()), rel=1e-3)
            assert found["prediction"][i] == logits.argmax()
    assert torch.equal(found["target"], digits[1].targets)
    values = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert float((found["prediction"] == found["target"]).double().mean()) == pytest.approx(values["accuracy"])
    assert float(found["loss"].double().mean()) == pytest.approx(values["loss"], rel=1e-5)
    with safe_open(tmp_path / "run" / FILE, "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert {key: about[key] for key in ("split", "step", "epoch", "task")} == {
        "split": "test",
        "step": values["step"],
        "epoch": 1,
        "task": "Classification",
    }
    assert about["headline"] == {"name": "accuracy", "percent": True, "higher_is_better": True}
    assert [*about["columns"]] == ["index", "loss", "prediction", "confidence", "target"]


def test_drawn_samples_keep_their_index(digits, quiet, tmp_path):
    trained(quiet, tmp_path / "run", digits, batch_size=50, settings=tr.RunSettings(evaluate_batches=2))
    found = load_file(tmp_path / "run" / FILE)
    assert len(set(found["index"].tolist())) == 100
    assert found["index"].tolist() != [*range(100)]
    assert torch.equal(found["target"], digits[1].targets[found["index"]])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.full((1, 8, 8), float(i)), i % 10) for i in range(50)])


def test_the_index_in_a_stream_is_the_position(quiet, tmp_path):
    data = tr.data.stream(Stream(), length=50)
    trained(quiet, tmp_path / "run", (data, tr.data.stream(Stream(), length=50)), batch_size=20)
    found = load_file(tmp_path / "run" / FILE)
    assert found["index"].tolist() == [*range(50)]
    assert found["target"].tolist() == [i % 10 for i in range(50)]


def test_too_many_bytes_are_not_kept_and_one_line_of_the_log_says_so(digits, quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(samples.Collector.__init__, "__defaults__", (2**12,))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text("of a shorter run")
    trained(quiet, tmp_path / "run", digits)
    assert not (tmp_path / "run" / FILE).exists()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("no samples.safetensors: it would hold more than 0 MiB") == 1


class Failing(tr.Classification):
    def per_sample(self, outputs, targets):
        raise ValueError("two\nlines")


class Odd(tr.Classification):
    def per_sample(self, outputs, targets):
        return {"loss": outputs.sum()[None]}


@pytest.mark.parametrize(
    ("task", "why"),
    [(Failing(), "ValueError: two lines"), (Odd(), "Odd.per_sample returns other than a row a sample")],
)
def test_a_task_that_fails_to_say_a_row_costs_the_file_alone(digits, quiet, tmp_path, task, why):
    trained(quiet, tmp_path / "run", digits, task)
    assert not (tmp_path / "run" / FILE).exists()
    assert (tmp_path / "run" / "evaluation.json").exists()
    assert f"no samples.safetensors: {why}\n" in (tmp_path / "run" / "log.txt").read_text()


def test_any_number_of_devices_and_a_resume_write_the_same_bytes(cli, same_runs, tmp_path):
    sets = ("run.epochs=2", "parallel.replicas=2", "device.name=cpu", "checkpoint.keep=9")
    assert cli("train", "digits", "--run=one", sets=sets).returncode == 0
    assert cli("train", "digits", "--run=two", "--devices=2", sets=sets).returncode == 0
    expected = (tmp_path / "one" / FILE).read_bytes()
    assert (tmp_path / "two" / FILE).read_bytes() == expected
    shutil.rmtree(sorted((tmp_path / "two" / "checkpoints").glob("step-*"))[-1])
    (tmp_path / "two" / FILE).unlink()
    assert cli("resume", "two").returncode == 0
    assert (tmp_path / "two" / FILE).read_bytes() == expected
    same_runs(tmp_path / "one", tmp_path / "two")
    assert cli("evaluate", "one", "--checkpoint=last", "--samples=again.safetensors").returncode == 0
    assert (tmp_path / "again.safetensors").read_bytes() == expected


def test_a_full_disk_is_an_error(tmp_path):
    with pytest.raises(RelayError, match=r"can't write .*no/file"):
        samples.Samples({"index": torch.arange(2)}).write(tmp_path / "no" / "file", Own(), "test", 1, 1)
