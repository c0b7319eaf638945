"""The contents of an image folder are logged, and folders that could silently train a wrong model are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from torchrelay.data import DataSettings, image_files, image_folder, image_parts, load
from torchrelay.data.listing import images_below
from torchrelay.errors import RelayError, UsageError


def save(path: Path, number: int = 0, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return path


def fill(folder: Path, **classes: int) -> Path:
    """Save `count` images of each class."""
    for name, count in classes.items():
        for i in range(count):
            save(folder / name / f"{i}.png", i)
    return folder


def report(root: Path, **how) -> list[str]:
    said: list[str] = []
    image_parts(root, cache=False, log=said.append, **how)
    return [line.replace(str(root), "ROOT") for line in said if not line.startswith("decod")]


# ------------------------------------------------------------------------------------------------ what is said


def test_the_log_lists_classes_and_images_per_part_and_class(tmp_path):
    fill(tmp_path / "train", cat=3, dog=4)
    fill(tmp_path / "val", cat=1, dog=1)
    fill(tmp_path / "test", cat=2, dog=1)
    assert report(tmp_path) == [
        "ROOT: 2 classes: cat, dog",
        "ROOT/train: 7 images (cat 3, dog 4)",
        "ROOT/val: 2 images (cat 1, dog 1)",
        "ROOT/test: 3 images (cat 2, dog 1)",
    ]


def test_the_log_shortens_the_list_of_many_classes(tmp_path):
    fill(tmp_path, **{f"c{i}": 2 + (i == 3) for i in range(10)})
    assert report(tmp_path, test_share=0.5) == [
        "ROOT: 10 classes: c0, c1, c2, c3, c4, c5, c6, c7, … (2 more)",
        "images: 21 images (2 of c9 to 3 of c3)",
        "test data: a share of 0.5 of each class, as the folder isn't divided",
    ]


def test_other_files_are_counted_by_suffix_and_other_folders_are_named(tmp_path):
    fill(tmp_path / "train", cat=1, dog=1)
    fill(tmp_path / "test", cat=1, dog=1)
    fill(tmp_path / "extra", cow=1)
    for name in ("labels.csv", "train/notes.txt", "train/cat/a.txt", "test/dog/LICENSE", "test/dog/deep/b.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words")
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("hidden")
    assert report(tmp_path)[-2:] == [
        "left out, since they aren't part of the data: the folders extra",
        "left out, since they aren't images: 3 .txt, 1 .csv, 1 without a suffix",
    ]


def test_the_macosx_folder_of_an_archive_is_not_a_class(tmp_path):
    fill(tmp_path, cat=2, dog=2, __MACOSX=1)
    assert report(tmp_path)[0] == "ROOT: 2 classes: cat, dog"


# ------------------------------------------------------------------------------------------------ classes in folders


def test_folders_that_hold_the_same_classes_are_no_classes(tmp_path):
    for year in ("2019", "2020", "2021"):
        fill(tmp_path / year, cat=2, dog=2, **({"cow": 1} if year == "2021" else {}))
    with pytest.raises(RelayError) as found:
        report(tmp_path)
    assert str(found.value) == (
        f"{tmp_path}/2019 and {tmp_path}/2020 both have the folders cat, dog, so 2019 and 2020 would be the classes: "
        f"if cat and dog are classes, join the images of each in one folder ({tmp_path}/cat), or give one of the "
        f"folders ({tmp_path}/2019); if not, move the images up into {tmp_path}/2019 and so on"
    )


def test_parts_within_classes_are_refused_with_the_way_to_turn_them(tmp_path):
    for name in ("cat", "dog"):
        fill(tmp_path / name, train=2, test=1)
    with pytest.raises(RelayError, match=f"put the classes into the parts: {tmp_path}/test/cat$"):
        report(tmp_path)


def test_classes_with_folders_of_other_names_inside_are_classes(tmp_path):
    fill(tmp_path / "cat", images=2, indoors=2)
    fill(tmp_path / "dog", images=2, park=2)
    assert report(tmp_path)[0] == "ROOT: 2 classes: cat, dog"


# ------------------------------------------------------------------------------------------------ a single class


@pytest.mark.parametrize("inside", ["", "train"])
@pytest.mark.parametrize("nested", ["archive", "archive/photos"])
def test_an_image_folder_nested_in_the_given_one_is_suggested(tmp_path, nested, inside):
    fill(tmp_path / nested / inside, cat=3, dog=3)
    with pytest.raises(RelayError, match=f"single class, 'archive'.*did you mean {tmp_path / nested}\\?"):
        report(tmp_path)


def test_a_single_class_beside_a_label_file_is_refused_and_the_file_is_named(tmp_path):
    fill(tmp_path, images=5)
    (tmp_path / "labels.csv").write_text("file,label\n")
    with pytest.raises(RelayError, match=r"single class, 'images'.*a folder of its own; labels in a \.csv file aren't"):
        report(tmp_path)


def test_a_single_class_in_a_split_folder_is_refused(tmp_path):
    for part in ("train", "test"):
        fill(tmp_path / part, cat=2)
    with pytest.raises(RelayError, match="train has a single class, 'cat'"):
        report(tmp_path)


def test_a_folder_without_images_reports_its_contents(tmp_path):
    fill(tmp_path, cat=2)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.cr2").write_bytes(b"raw")
    with pytest.raises(RelayError, match=r"raw has no images in it, only 1 \.cr2: add some, or move") as found:
        report(tmp_path)
    assert "remove" not in str(found.value)


# ------------------------------------------------------------------------------------------------ parts


@pytest.fixture
def three(tmp_path) -> Path:
    fill(tmp_path / "train", cat=3, dog=3)
    fill(tmp_path / "test", cat=2, dog=2)
    fill(tmp_path / "val", cat=1, dog=1)
    return tmp_path


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_a_validation_folder_is_the_validation_part(three, name):
    (three / "val").rename(three / name)
    parts = load(DataSettings(name="image-folder", root=str(three), cache=False), seed=0, log=lambda _: None)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (6, 2, 4)


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN", "TEST")])
def test_part_names_are_case_insensitive(three, names):
    for old, new in zip(("train", "test"), names, strict=True):
        (three / old).rename(three / new)
    assert report(three)[0] == "ROOT: 2 classes: cat, dog"


def test_two_folders_for_one_part_are_refused(three):
    shutil.copytree(three / "val", three / "valid")
    with pytest.raises(UsageError, match="'val' and 'valid', which name the same part"):
        report(three)


def test_a_validation_share_is_refused_beside_a_validation_folder(three):
    settings = DataSettings(name="image-folder", root=str(three), cache=False, validation=0.3)
    with pytest.raises(UsageError, match=r"has a folder for validation: leave out data\.validation"):
        load(settings, seed=0, log=lambda _: None)


def test_a_pair_reports_the_skipped_validation_part(three):
    said: list[str] = []
    train, test = image_folder(three, cache=False, log=said.append)
    assert (len(train), len(test)) == (6, 4)
    assert said[-1] == "left out: the validation part, which image_parts() returns as well"


def test_a_test_part_without_a_training_part_is_refused(three):
    shutil.rmtree(three / "train")
    with pytest.raises(RelayError, match="has a folder 'val' but none named train"):
        report(three)


# ------------------------------------------------------------------------------------------------ formats


def test_files_without_a_suffix_are_recognized_by_content(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    save(tmp_path / "cat" / "x.JFIF", format="JPEG")
    save(tmp_path / "dog" / "e3b0c442", format="PNG")
    (tmp_path / "dog" / "README").write_text("P1 no image")
    assert report(tmp_path)[1:3] == [
        "images: 6 images (cat 3, dog 3)",
        "left out, since they aren't images: 1 without a suffix",
    ]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_if_pillow_reads_it(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    save(tmp_path / "cat" / "x.avif")
    assert report(tmp_path)[1] == "images: 5 images (cat 3, dog 2)"


@pytest.mark.skipif(image_files._HAS_HEIF, reason="the extra is installed")
def test_heic_files_are_counted_and_the_extra_is_named(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    (tmp_path / "cat" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert report(tmp_path)[2].endswith("1 .heic (HEIC needs pillow-heif, the extra 'heif')")


@pytest.mark.skipif(not image_files._HAS_HEIF, reason="the extra isn't installed")
def test_heic_is_read_where_the_extra_is_installed(tmp_path):
    import pillow_heif

    pillow_heif.register_heif_opener()
    fill(tmp_path, cat=2, dog=2)
    save(tmp_path / "cat" / "IMG_1.heic")
    assert report(tmp_path)[1] == "images: 5 images (cat 3, dog 2)"


def test_images_in_subfolders_are_found_and_other_files_counted(tmp_path):
    fill(tmp_path, cat=1, dog=1)
    (tmp_path / "notes.txt").write_text("words")
    paths, others = images_below(tmp_path)
    assert paths == [tmp_path / "cat" / "0.png", tmp_path / "dog" / "0.png"]
    assert others == {".txt": 1}
