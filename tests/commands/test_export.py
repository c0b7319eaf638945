"""`torchrelay export`: the folder answers like the run, a damaged file is named, and what can't be exported is said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

import torchrelay as tr
from torchrelay import cli
from torchrelay.checkpoint.retention import find
from torchrelay.report.export.folder import write_sums
from torchrelay.report.export.program import load_program

# They take half a minute: imports of the exporters, and traces.
pytestmark = [pytest.mark.ci, pytest.mark.slow]

FILES = {
    "README.md",
    "SHA256SUMS",
    "example.py",
    "export.json",
    "golden.safetensors",
    "model.int8.onnx",
    "model.onnx",
    "model.safetensors",
    "program.pt2",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "run"
    settings = ("model.name=mlp", "run.epochs=4", "data.validation=0.1", "model.ema=0.9", "device.threads=1")
    sets = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(["train", "digits", "--run", str(folder), "--quiet", *sets]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run) -> Path:
    assert cli.main(["export", str(run), "--quiet"]) == 0
    return run.with_name("run-export")


@pytest.fixture
def export(exported, tmp_path) -> Path:
    """A copy, to damage."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


@pytest.fixture(scope="module")
def facts(exported) -> dict:
    return json.loads((exported / "export.json").read_text())


def test_the_folder_is_complete_and_the_run_unchanged(run, exported):
    assert {path.name for path in exported.iterdir()} == FILES
    assert not [path.name for path in run.parent.iterdir() if path.name.startswith(".")]
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {
        (exported / "README.md").stat().st_mode & 0o777
    }
    assert "export" not in {path.name for path in run.iterdir()}


def test_both_forms_answer_raw_pixels_in_batches_of_any_size_like_the_run(run, exported, facts, digits):
    """The run's probabilities at the temperature; without it, those of `tr.load`."""
    images = digits[1].inputs[:30]
    expected = tr.load(run).predict(images)
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    program = load_program(exported / "program.pt2")
    for size in (1, 2, 30):
        answer, logits = map(torch.from_numpy, session.run(None, {"images": images[:size].numpy()}))
        assert torch.allclose(logits.softmax(1), expected[:size], atol=1e-5)
        assert torch.allclose((logits / facts["temperature"]).softmax(1), answer, atol=1e-5)
        for mine, other in zip(program(images[:size]), (answer, logits), strict=True):
            assert torch.allclose(mine, other, atol=1e-4)
    assert facts["temperature"] != 1
    assert torch.equal(tr.load(run).predict(images), expected), "tracing has changed what the process computes"


def test_the_proof_covers_all_test_data(facts, digits):
    assert [row["form"] for row in facts["proof"]] == ["the run", "torch.export", "ONNX", "ONNX int8"]
    assert facts["data"]["samples"] == len(digits[1])
    for row in facts["proof"][:3]:
        assert (row["flipped"], row["headline"]) == (0, facts["metrics"]["accuracy"]["value"])
        assert row["largest_difference"] < 1e-4
    assert all(0 < row["p50"] <= row["p95"] and row["size"] > 0 for row in facts["proof"])
    int8, whole = facts["proof"][3], facts["proof"][2]
    assert 0 < int8["largest_difference"] < 0.5
    assert int8["size"] < whole["size"] / 2
    metric = facts["metrics"]["accuracy"]
    assert (metric["low"] < metric["value"] < metric["high"], metric["method"]) == (True, "Wilson")
    assert facts["metrics"]["top5_accuracy"]["low"] < 1
    assert facts["calibration"]["after"]["loss"] < facts["calibration"]["before"]["loss"]


def test_the_metrics_are_those_of_an_evaluation(run, facts, capsys):
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["test"]
    for name in ("accuracy", "loss", "top5_accuracy"):
        assert facts["metrics"][name]["value"] == pytest.approx(found[name], abs=1e-6)


def test_the_averaged_weights_are_exported(run, exported):
    averaged = load_file(find(run / "checkpoints", "best") / "ema.safetensors")
    found = load_file(exported / "model.safetensors")
    assert {*found} == {*averaged}
    assert all(torch.equal(found[name], averaged[name]) for name in found)


def test_the_card_is_hugging_faces_and_names_no_folder_of_this_machine(exported, facts):
    card = ModelCard.load(exported / "README.md")
    (result,) = [each for each in card.data.eval_results if each.metric_type == "accuracy"]
    assert result.metric_value == pytest.approx(facts["metrics"]["accuracy"]["value"], abs=1e-6)
    assert card.data.pipeline_tag == "image-classification"
    for words in (
        "## Use",
        "## Metrics",
        "(Wilson)",
        "## Calibration",
        "flipped answers",
        "## Limits",
        'name = "digits"',
    ):
        assert words in card.text, words
    here = str(Path(tr.__file__).parent).encode()
    assert not [path.name for path in exported.iterdir() if here in path.read_bytes()]


def test_the_example_needs_nothing_of_torchrelay(exported, digits, tmp_path):
    image = digits[1].inputs[0, 0]
    Image.fromarray(image.numpy()).save(tmp_path / "digit.png")
    assert len((exported / "example.py").read_text().splitlines()) <= 12
    command = [sys.executable, "example.py", str(tmp_path / "digit.png")]
    out = subprocess.run(command, cwd=exported, check=True, capture_output=True, text=True).stdout
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    (answer,) = session.run(["probabilities"], {"images": image[None, None].numpy()})[0]
    assert out.splitlines()[0] == f"{np.argmax(answer)}: {answer.max():.1%}"


def test_verify_answers_the_golden_samples_again(exported, capsys):
    assert cli.main(["export", "--verify", str(exported)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["files", "program.pt2", "model.onnx", "model.int8.onnx"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_file_is_named(export, capsys, name):
    path = export / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert cli.main(["export", "--verify", str(export)]) == 1
    assert name in capsys.readouterr().err
    path.unlink()
    assert cli.main(["export", "--verify", str(export)]) == (2 if name == "export.json" else 1)
    assert name in capsys.readouterr().err


def test_a_model_that_answers_differently_is_named_though_its_checksum_is_right(export, capsys):
    shutil.copy(export / "model.int8.onnx", export / "model.onnx")
    write_sums(export)
    assert cli.main(["export", "--verify", str(export)]) == 1
    assert "model.onnx answers the golden samples differently, by " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("model.onnx", lambda content: content[:5000], "model.onnx can't answer"),
        ("golden.safetensors", lambda content: content[:100], "golden.safetensors is damaged or isn't ours"),
        ("program.pt2", lambda content: content[:5000], "program.pt2 is damaged or isn't ours"),
        ("export.json", lambda content: content.replace(b"limits", b"bounds"), "export.json is damaged or isn't ours"),
    ],
)
def test_a_file_that_was_damaged_before_its_checksum_is_a_line(export, capsys, name, change, said):
    (export / name).write_bytes(change((export / name).read_bytes()))
    write_sums(export)
    assert cli.main(["export", "--verify", str(export)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_an_export_is_replaced_only_by_force_and_other_folders_never(run, export, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("words")
    assert cli.main(["export", str(run), "--out", str(export)]) == 2
    assert "holds an export already" in capsys.readouterr().err
    for force in ((), ("--force",)):
        assert cli.main(["export", str(run), "--out", str(tmp_path / "mine"), *force]) == 2
        assert "exists and is no export" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "words"
    assert cli.main(["export", str(export)]) == 2
    assert "is an export already" in capsys.readouterr().err


def test_a_folder_that_is_no_run_or_no_export_is_a_line(tmp_path, run, capsys):
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "isn't a run" in capsys.readouterr().err
    assert cli.main(["export", "--verify", str(run)]) == 2
    assert "isn't an export" in capsys.readouterr().err
    assert cli.main(["export", str(run), "--checkpoint", "7", "--out", str(tmp_path / "x")]) == 2
    assert "has no checkpoint '7'" in capsys.readouterr().err


def test_a_missing_package_is_a_line_that_says_how_to_install_it(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "x")]) == 2
    assert "pip install 'torchrelay[export]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_upload_that_fails_is_a_line(export, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["export", str(export), "--push", "ann/digits"]) == 1
    assert "can't be uploaded to ann/digits" in capsys.readouterr().err


CODE = """
import torch, torchrelay as tr
from torch import nn

class Odd(nn.Module):
    def __init__(self, classes=1):
        super().__init__()
        self.linear = nn.Linear(64, 10)
    def forward(self, x):
        x = self.linear(x.flatten(1))
        return x if x.sum().item() > 0 else x * 2

def odd(classes, channels, image_size):
    return Odd()
"""


def test_a_model_that_cant_be_traced_leaves_its_weights_and_the_card(tmp_path, capsys):
    (tmp_path / "own.py").write_text(CODE)
    own = ["--code", str(tmp_path / "own.py"), "--quiet"]
    run, out = tmp_path / "run", tmp_path / "out"
    sets = ["--set", "model.name=odd", "--set", "run.max_steps=2"]
    assert cli.main(["train", "digits", "--run", str(run), *sets, *own]) == 0
    assert cli.main(["export", str(run), "--out", str(out)]) == 2
    assert "add --code" in capsys.readouterr().err
    assert cli.main(["export", str(run), "--out", str(out), *own]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "Odd can't be exported by torch.export" in error
    assert error.endswith("has only README.md, SHA256SUMS, export.json, model.safetensors\n")
    assert "can't be exported by torch.export" in (out / "README.md").read_text()
    assert cli.main(["export", "--verify", str(out)]) == 1
    assert "holds nothing that answers" in capsys.readouterr().err
