"""A program is loaded only if its loading runs no code: each way in is refused by name."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay.errors import RelayError
from torchrelay.report.export.formats import write_program
from torchrelay.report.export.inference import Inference
from torchrelay.report.export.program import load_program

# They take half a minute: imports of the exporters, and traces.
pytestmark = [pytest.mark.ci, pytest.mark.slow]


class Touch:
    """What unpickles to a call."""

    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A program of convolution, normalization and pooling, with inputs and the answers."""
    folder = tmp_path_factory.mktemp("program")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = torch.randint(256, (8, 3, 12, 12), dtype=torch.uint8)
    trainer = tr.Trainer(
        model, (data, torch.arange(8) % 4), run=folder / "run", epochs=1, prepare={"name": "resize", "size": 8}
    )
    trainer.fit()
    trained = tr.load(folder / "run", model=model, prepare=[tr.augment.Resize(size=8)])
    inference = Inference(trained, data[0], temperature=2.0)
    write_program(inference, data[:2], folder / "program.pt2")
    return folder / "program.pt2", data, trained.outputs(tr.data.arrays(data))


def changed(path: Path, target: Path, entry: str, change) -> Path:
    """A copy with another content of an entry, or a new entry."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        names = [name.partition("/")[2] for name in old.namelist()]
        top = old.namelist()[0].partition("/")[0]
        for name in names:
            content = old.read(f"{top}/{name}")
            new.writestr(f"{top}/{name}", change(content) if name == entry else content)
        if entry not in names:
            new.writestr(f"{top}/{entry}", change(b""))
    return target


def test_our_own_is_loaded_and_answers_batches_of_any_size(program):
    path, data, outputs = program
    module = load_program(path)
    for size in (1, 5, 8):
        probabilities, logits = module(data[:size])
        assert torch.allclose(logits, outputs[:size], atol=0.02)  # resizing rounds some bytes the other way
        assert torch.allclose(probabilities, (logits / 2).softmax(1), atol=1e-6)


def model_json(change):
    def changed_json(content: bytes) -> bytes:
        model = json.loads(content)
        change(model["graph_module"]["graph"])
        return json.dumps(model).encode()

    return changed_json


def set_target(graph, text):
    graph["nodes"][0]["target"] = text


def set_size(graph, text):
    sizes = [size for value in graph["tensor_values"].values() for size in value["sizes"] if "as_expr" in size]
    sizes[0]["as_expr"]["expr_str"] = text


@pytest.mark.parametrize(
    ("entry", "change", "named"),
    [
        ("data/sample_inputs/model.pt", lambda _: pickle.dumps(Touch()), "its sample inputs, which are pickled"),
        ("data/weights/model.pt", lambda _: pickle.dumps(Touch()), r"its entry 'data/weights/model\.pt'"),
        ("data/constants/opaque_obj_0", lambda _: pickle.dumps(Touch()), "its entry 'data/constants/opaque_obj_0'"),
        (
            "data/weights/model_weights_config.json",
            lambda content: content.replace(b'"use_pickle": false', b'"use_pickle": true', 1),
            r"its weights 'model\.0\.weight'",
        ),
        ("models/model.json", model_json(lambda g: set_target(g, "torch.load")), r"its target 'torch\.load'"),
        ("models/model.json", model_json(lambda g: set_target(g, "torch.ops.aten.from_file.default")), "from_file"),
        (
            "models/model.json",
            model_json(lambda g: set_size(g, "__import__('os').getcwd()")),
            "its expr_str '__import__",
        ),
        (
            "models/model.json",
            lambda content: content.replace(b"builtins.tuple", b"collections.defaultdict"),
            "its in_spec",
        ),
    ],
)
def test_what_could_run_code_is_refused(program, tmp_path, monkeypatch, entry, change, named):
    monkeypatch.chdir(tmp_path)
    path = changed(program[0], tmp_path / "program.pt2", entry, change)
    assert path.read_bytes() != program[0].read_bytes()
    with pytest.raises(RelayError, match=f"could run code when it is loaded, by .*{named}"):
        load_program(path)
    assert not (tmp_path / "touched").exists()


def test_a_damaged_file_is_a_line(program, tmp_path):
    path = Path(shutil.copy(program[0], tmp_path))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RelayError, match="is damaged or isn't ours"):
        load_program(path)
