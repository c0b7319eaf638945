"""Evaluating a run on a folder of images: classes match by name; a missing class is reported, not counted as zero."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import torchrelay as tr
from torchrelay import cli

SETTINGS = ("model.name=mlp", "device.precision=float32", "device.threads=1", "run.epochs=3", "data.batch_size=64")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of the digits that learned something."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    assert cli.main(["train", "digits", "--run", str(folder), "--quiet", *sets]) == 0
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    """Sixty test digits, a folder for each class."""
    test = tr.data.digits()[1]
    for i in range(60):
        path = tmp_path / "images" / str(int(test.targets[i])) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test.inputs[i, 0].numpy()).save(path)
    return tmp_path / "images"


def evaluate(run, images, capsys, *more: str) -> tuple[dict, str]:
    """Return the JSON output and the text output."""
    given = ["evaluate", str(run), str(images), "--set", "data.cache=false", *more]
    assert cli.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(given) == 0
    return found, capsys.readouterr().out


def test_all_images_of_a_labeled_folder_are_evaluated(run, images, capsys):
    found, text = evaluate(run, images, capsys)
    trainer = tr.recipe.build_trainer(tr.recipe.load(str(run / "recipe.toml")), run, fresh=False)
    trainer.load("best")
    predicted = trainer.predict(tr.data.digits()[1].inputs[:60]).argmax(1)
    right = (predicted == tr.data.digits()[1].targets[:60]).double().mean()
    assert found["all"]["samples"] == 60
    assert found["all"]["accuracy"] == pytest.approx(float(right))
    assert f"{images}: 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, … (2 more)" in text
    assert "all (60 samples)   loss" in text


def test_each_part_of_a_split_folder_is_evaluated(run, images, capsys):
    shutil.copytree(images, images.parent / "parts" / "train")
    shutil.copytree(images, images.parent / "parts" / "test")
    found, _ = evaluate(run, images.parent / "parts", capsys)
    assert found["train"] == found["test"]
    assert found["train"]["samples"] == 60


def test_classes_are_matched_by_name_and_not_by_position(run, images, capsys):
    whole, _ = evaluate(run, images, capsys)
    for missing in ("0", "4"):
        shutil.rmtree(images / missing)
    found, text = evaluate(run, images, capsys)
    for name, share in found["all"]["accuracy_by_class"].items():
        assert share == (None if name in "04" else whole["all"]["accuracy_by_class"][name])
    assert f"classes without images in {images}: 0, 4" in text
    assert "    4  no samples" in text


def test_images_of_an_unknown_class_are_skipped_and_reported(run, images, capsys):
    whole, _ = evaluate(run, images, capsys)
    shutil.copytree(images / "3", images / "a letter")
    found, text = evaluate(run, images, capsys)
    assert found == whole
    assert f"left out of {images}, as the run has no such class: a letter" in text


def test_a_folder_without_the_classes_is_refused_and_the_nested_one_suggested(run, images, capsys):
    assert cli.main(["evaluate", str(run), str(images.parent)]) == 1
    error = capsys.readouterr().err
    assert f"{images.parent} has none of the run's classes, 0, 1, 2, " in error
    assert f"but images: did you mean {images}?" in error


def test_data_with_other_class_names_is_not_evaluated_by_position(tmp_path, capsys):
    """`data.root` of another folder, with as many classes of other names."""
    for root, names in (("pets", ("cat", "dog")), ("farm", ("cow", "dog"))):
        for number, name in enumerate(names):
            for i in range(4):
                path = tmp_path / root / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (9 * i, 99 * number, 0)).save(path)
    sets = ["--set", "data.cache=false", "--set", "data.augment=[]", "--set", "run.max_steps=1"]
    sets += [word for setting in SETTINGS for word in ("--set", setting)]
    run = str(tmp_path / "run")
    command = ["train", "image-folder", "--run", run, "--quiet", "--set", f"data.root={tmp_path / 'pets'}", *sets]
    assert cli.main(command) == 0
    assert cli.main(["evaluate", run, "--set", f"data.root={tmp_path / 'farm'}"]) == 1
    error = capsys.readouterr().err
    assert "the run's classes and those of farm differ in cat, cow" in error


def test_a_class_without_samples_has_no_accuracy():
    by_class = tr.Classification(classes=3).metrics()["accuracy_by_class"]
    by_class.update(torch.eye(3)[[0, 1]], torch.tensor([0, 0]))
    found = tr.train.Evaluation({}, {"accuracy_by_class": by_class.compute().tolist()})
    assert found.to_json(("a", "b", "c"))["accuracy_by_class"] == {"a": 0.5, "b": None, "c": None}
