"""Exports of other tasks than classification of images, and the facts that don't need a command line."""

import json
import signal
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay import cli
from torchrelay.data.sources import Parts
from torchrelay.errors import RelayError, UsageError
from torchrelay.report.export.export import Asked, Exporter
from torchrelay.report.export.verify import verify

# They take half a minute: imports of the exporters, and traces.
pytestmark = [pytest.mark.ci, pytest.mark.slow]

GENERATOR = torch.Generator().manual_seed(0)
TABLE = torch.rand(40, 3, generator=GENERATOR)


class Mean(nn.Module):
    """Predicts the next token from an embedding; a recurrent part would take seconds to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


class Doubled(tr.Task):
    """A task of the user's that predicts in its own way."""

    def loss(self, outputs, targets):
        return (outputs - targets).square().sum()

    def predict(self, outputs):
        return outputs * 2


class Whole(Doubled):
    """A task that calls the model itself."""

    def forward(self, model, batch):
        return model(batch.inputs) + 1


def export(folder: Path, model: nn.Module, data, task, **asked) -> tuple[Path, dict, Any]:
    trainer = tr.Trainer(
        model, data, data, run=folder / "run", task=task, epochs=1, batch_size=16, settings=tr.RunSettings(log_every=1)
    )
    trainer.fit()
    trained = tr.load(folder / "run", model=model, task=task)
    source = tr.data.as_source(data)
    target, lines = folder / "export", list[str]()
    Exporter(trained, Parts(source, source), "run", {}, Asked(**asked), lines.append).write(target)
    verify(target, say=lines.append)
    return target, json.loads((target / "export.json").read_text()), trained


CASES = {
    "regression": (nn.Linear(3, 1), (TABLE, TABLE.sum(1, keepdim=True)), tr.tasks.Regression(), ["predictions"]),
    "labels": (
        nn.Linear(3, 2),
        (TABLE, (TABLE[:, :2] > 0.5).float()),
        tr.tasks.MultiLabel(labels=2),
        ["probabilities", "logits"],
    ),
    "binary": (nn.Linear(3, 1), (TABLE, (TABLE[:, 0] > 0.5).float()), tr.tasks.Binary(), ["probabilities", "logits"]),
    "tokens": (
        Mean(),
        (torch.arange(80).view(20, 4) % 7, torch.arange(1, 81).view(20, 4) % 7),
        tr.tasks.NextToken(),
        ["probabilities", "logits"],
    ),
    "segmentation": (
        nn.Conv2d(3, 2, 1),
        (torch.rand(20, 3, 6, 6, generator=GENERATOR), torch.randint(2, (20, 6, 6), generator=GENERATOR)),
        tr.tasks.Segmentation(classes=2),
        ["predictions", "outputs"],
    ),
    "own": (nn.Linear(3, 1), (TABLE, TABLE.sum(1, keepdim=True)), Doubled(), ["predictions", "outputs"]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_task_is_exported_with_its_own_predictions(tmp_path, name):
    torch.manual_seed(0)
    model, data, task, outputs = CASES[name]
    folder, facts, trained = export(tmp_path, model, data, task, int8=name == "labels")
    assert facts["outputs"] == outputs
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (given,) = session.get_inputs()
    answer = torch.from_numpy(session.run(outputs[:1], {given.name: data[0].numpy()})[0])
    assert torch.allclose(answer, trained.predict(data[0]), atol=1e-5)
    for row in facts["proof"][:3]:
        assert row["largest_difference"] < 1e-5
        assert row["flipped"] == (None if answer.is_floating_point() and outputs[0] == "predictions" else 0)
    for metric in facts["metrics"].values():
        assert metric["low"] is None or metric["low"] <= metric["value"] <= metric["high"]
    assert "There was no test data" not in (folder / "README.md").read_text()


def test_a_task_that_calls_the_model_itself_leaves_the_weights(tmp_path):
    data = TABLE, TABLE.sum(1, keepdim=True)
    with pytest.raises(RelayError, match=r"Whole calls the model itself, which can't be traced: .* has only README"):
        export(tmp_path, nn.Linear(3, 1), data, Whole())
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_a_failure_midway_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrelay.report.export.export.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(tmp_path, nn.Linear(3, 1), (TABLE, TABLE.sum(1, keepdim=True)), Whole())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_stream_is_refused_in_a_line(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(TABLE, TABLE.sum(1, keepdim=True), strict=True))

    model, data = nn.Linear(3, 1), (TABLE, TABLE.sum(1, keepdim=True))
    tr.Trainer(model, data, run=tmp_path / "run", task=tr.tasks.Regression(), epochs=1).fit()
    trained, source = tr.load(tmp_path / "run", model=model, task=tr.tasks.Regression()), tr.data.stream(Stream())
    with pytest.raises((UsageError, RelayError), match="is a stream, whose samples an export can't read"):
        Exporter(trained, Parts(source, None), "run", {}, Asked(), print).write(tmp_path / "export")


def test_images_that_are_resized_and_cropped_first_are_answered_by_onnx_alike(tmp_path):
    """Resizing rounds some bytes the other way than the run does, by one of 255 levels."""
    images = torch.randint(256, (20, 3, 24, 20), dtype=torch.uint8, generator=GENERATOR)
    prepare = [tr.augment.Resize(size=12, interpolation="bilinear"), tr.augment.CenterCrop(size=8)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = images, torch.arange(20) % 4
    tr.Trainer(model, data, data, run=tmp_path / "run", prepare=prepare, epochs=1).fit()
    trained, source = tr.load(tmp_path / "run", model=model, prepare=prepare), tr.data.arrays(*data)
    Exporter(trained, Parts(source, source), "run", {}, Asked(int8=False)).write(tmp_path / "export")
    facts = json.loads((tmp_path / "export" / "export.json").read_text())
    assert facts["input"] == {"name": "images", "dtype": "uint8", "shape": [3, 24, 20]}
    _, program, onnx = facts["proof"]
    assert 0 <= program["largest_difference"] < 0.01
    assert abs(onnx["largest_difference"] - program["largest_difference"]) < 1e-4
    verify(tmp_path / "export")


def test_what_onnx_lacks_leaves_the_program_with_its_proof(tmp_path):
    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.linalg.eigvalsh(x[:, :, None] * x[:, None]) * self.scale

    with pytest.raises(RelayError, match=r"can't be exported by torch\.onnx\.export .* has only .*program\.pt2"):
        export(tmp_path, Inverse(), (TABLE, TABLE), tr.tasks.Regression())
    facts = json.loads((tmp_path / "export" / "export.json").read_text())
    assert [row["file"] for row in facts["proof"]] == ["model.safetensors", "program.pt2"]
    verify(tmp_path / "export")


def test_a_run_that_is_being_trained_is_exported_at_its_last_checkpoint(tmp_path, start):
    """The training goes on undisturbed."""
    run, out = tmp_path / "run", tmp_path / "out"
    sets = [word for each in ("run.epochs=100000", "model.name=mlp") for word in ("--set", each)]
    training = start("train", "digits", "--run", str(run), *sets)
    training.until(lambda: list((run / "checkpoints").glob("step-*[1-9]*/manifest.json")))
    assert cli.main(["export", str(run), "--out", str(out), "--no-int8", "--quiet"]) == 0
    assert training.runs()
    training.send(signal.SIGTERM)
    assert training.done().returncode == 75
    verify(out)
