"""What is wrong with the data is found, counted and named."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import torchrelay as tr
from torchrelay.recipe import recipe
from torchrelay.report.check import labels
from torchrelay.report.check.check import check
from torchrelay.report.check.classes import classes
from torchrelay.report.check.duplicates import duplicates
from torchrelay.report.check.findings import Pool
from torchrelay.report.check.images import brightness


def found(findings):
    return {finding.title: finding.count for finding in findings}


def rows(*values, labels):
    return tr.data.arrays(np.array(values, dtype=np.float32)[:, None], np.array(labels), ("a", "b"))


def test_equal_rows_are_counted_within_and_across_the_parts_and_by_their_classes():
    pool = Pool({"train": rows(1, 2, 3, 1, 1, labels=[0, 0, 1, 0, 1]), "test": rows(3, 9, labels=[1, 0])})
    findings = duplicates(pool, None)
    assert found(findings) == {
        "training rows are exact copies of others": 2,
        "test rows are in the training data as well": 1,
        "pairs of equal rows have two classes": 1,
    }
    (across,) = (finding for finding in findings if finding.title.startswith("test"))
    assert [pool.name(sample) for sample in across.examples[0].samples] == ["train 2", "test 0"]
    assert across.serious


def test_classes_are_compared_by_their_sizes():
    train = tr.data.arrays(np.zeros((208, 2)), np.array([0] * 200 + [1] * 8), ("many", "few", "none"))
    test = tr.data.arrays(np.zeros((2, 2)), np.array([0, 2]), ("many", "few", "none"))
    assert found(classes(Pool({"train": train, "test": test}))) == {
        "classes have no train samples": 1,
        "classes have no test samples": 1,
        "classes have fewer than 10 training samples": 1,
        "classes have less than a tenth of the largest one's training samples": 1,
    }


def test_images_of_one_color_and_dark_and_bright_ones_are_told_apart():
    usual = np.random.default_rng(0).integers(0, 255, (5, 8, 8), dtype=np.uint8)
    copies = np.stack([*usual, np.full((8, 8), 90, np.uint8), usual[0] // 9, 255 - usual[1] // 9])
    assert found(brightness(copies)) == {
        "images are of one color": 1,
        "images are very dark": 1,
        "images are very bright": 1,
    }


def test_planted_wrong_labels_are_found():
    pytest.importorskip("cleanlab")
    train, _ = tr.data.digits()
    wrong, targets = np.arange(0, len(train), 100), train.targets.clone()
    targets[wrong] = (targets[wrong] + 5) % 10
    (finding,), note = labels.suspicious(Pool({"train": replace(train, targets=targets)}), lambda _: None)
    shown = {example.samples[0] for example in finding.examples}
    assert len(shown & set(wrong.tolist())) >= 8
    assert "in 5 folds" in note


def test_without_cleanlab_the_section_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(labels, "find_spec", lambda _: None)
    train, _ = tr.data.digits()
    findings, note = labels.suspicious(Pool({"train": train}), lambda _: None)
    assert findings == []
    assert "pip install 'torchrelay[check]'" in note


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photographs" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((32, 32)).save(folder / f"{number}.png")
    return tmp_path / "photographs"


def looked_at(root, tmp_path, *more):
    sets = [f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}", *more]
    return check(recipe.load("image-folder", sets), None, lambda _: None)


def test_a_folder_with_nothing_wrong_has_no_finding(photographs, tmp_path):
    assert looked_at(photographs, tmp_path).findings == ()


def test_a_damaged_file_is_named_and_the_others_are_looked_at(photographs, tmp_path):
    (photographs / "train" / "cat" / "3.png").write_bytes(b"damaged")
    (photographs / "test" / "dog" / "0.png").write_bytes((photographs / "train" / "dog" / "5.png").read_bytes())
    report = looked_at(photographs, tmp_path)
    assert found(report.findings) == {
        "image files can't be decoded": 1,
        "test images are in the training data as well": 1,
    }
    assert report.findings[0].examples[0].note == "train/cat/3.png"
    assert report.serious == 2
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("*/images.bin"))


def test_a_class_that_a_part_lacks_is_named(photographs, tmp_path):
    (photographs / "test" / "dog").rename(tmp_path / "dog")
    report = looked_at(photographs, tmp_path)
    assert found(report.findings) == {"classes have no test samples": 1}


def test_what_would_stop_a_training_is_a_finding(photographs, tmp_path):
    Image.new("L", (300, 20), 90).save(photographs / "train" / "cat" / "long.png")
    report = looked_at(photographs, tmp_path)
    assert found(report.findings) == {
        "error would stop a training": 1,
        "images have a rare mode, while most are RGB": 1,
        "images have an odd size; the median is 32 x 32": 1,
        "images are of one color": 1,
    }


def test_a_dataset_of_ones_own_is_read_into_memory():
    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return torch.tensor([float(index % 3)]), index % 2

    from torchrelay.report.check.samples import in_memory

    pool = Pool({"train": in_memory(tr.data.dataset(Own()))})
    assert found(duplicates(pool, None)) == {
        "training rows are exact copies of others": 3,
        "pairs of equal rows have two classes": 3,
    }
