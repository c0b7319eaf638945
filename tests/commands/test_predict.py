"""Classifying image files: broken ones are named and don't stop the others, and the result can be CSV."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

import torchrelay as tr
from torchrelay import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "run"
    sets = [word for setting in ("model.name=mlp", "run.max_steps=2") for word in ("--set", setting)]
    assert cli.main(["train", "digits", "--run", str(folder), "--quiet", *sets]) == 0
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    test = tr.data.digits()[1]
    for i in range(5):
        Image.fromarray(test.inputs[i, 0].numpy()).save(tmp_path / f"{i}, a digit.png")
    return tmp_path


def test_csv_has_a_line_per_image_and_agrees_with_json(run, images, capsys):
    assert cli.main(["predict", str(run), str(images), "--top", "2", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert cli.main(["predict", str(run), str(images), "--top", "2", "--json"]) == 0
    for row, entry in zip(rows, json.loads(capsys.readouterr().out), strict=True):
        (first, p), (second, q) = entry["classes"].items()
        assert row == {
            "path": entry["path"],
            "class": first,
            "probability": str(p),
            "class_2": second,
            "probability_2": str(q),
        }


@pytest.mark.parametrize("form", [(), ("--json",), ("--csv",)])
def test_a_broken_file_is_named_and_the_others_are_classified(run, images, capsys, form):
    broken = images / "1, a digit.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert cli.main(["predict", str(run), str(images), *form]) == 1
    out, err = capsys.readouterr()
    assert all(f"{i}, a digit.png" in out for i in (0, 2, 3, 4))
    assert str(broken) not in out
    named, last = err.splitlines()
    assert named.startswith(f"left out: {broken} can't be read as an image: ")
    assert "on_error" not in named
    assert last.startswith(f"error: 1 of 5 files can't be read as images, such as {broken}")


def test_files_that_are_not_images_are_counted(run, images, capsys):
    (images / "notes.txt").write_text("words")
    assert cli.main(["predict", str(run), str(images)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert err == "left out, since they aren't images: 1 .txt\n"
