"""A dataset file that is added, removed or edited between a stop and the resume."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SETTINGS = ["run.epochs=3", "data.batch_size=8", "device.precision=float32", "model.name=small-cnn"]


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    """Sixty images of three classes, without a test part."""
    root = tmp_path / "photos"
    for number in range(60):
        write(root / ("cat", "dog", "owl")[number % 3] / f"{number}.png", number)
    return root


@pytest.fixture
def stopped(cli, photos):
    """The folder of a run on the photos that stopped after its third step."""
    sets = [*SETTINGS, f"data.root={photos}", "run.max_steps=3"]
    assert cli("train", "image-folder", "--run", "run", sets=sets).returncode == 0
    return "run"


def added(photos: Path) -> str:
    write(photos / "cat" / "new.png", 99)
    return "cat/new.png was added"


def removed(photos: Path) -> str:
    (photos / "dog" / "7.png").unlink()
    return "dog/7.png was removed"


def edited(photos: Path) -> str:
    before = (photos / "owl" / "8.png").stat()
    write(photos / "owl" / "8.png", 98)
    assert (photos / "owl" / "8.png").stat().st_mtime_ns != before.st_mtime_ns
    return "owl/8.png was edited"


@pytest.mark.parametrize("change", [added, removed, edited])
def test_a_resume_names_the_changed_file_and_accepts_it_if_told_to(cli, one_line, photos, stopped, change):
    expected = change(photos)
    done = cli("resume", stopped, sets=["run.max_steps=5"])
    one_line(done, "this run can't continue to the same result", f"data changed: {expected};", "--accept-changes")
    accepted = cli("resume", stopped, "--accept-changes", sets=["run.max_steps=5"])
    assert accepted.returncode == 0, accepted.stderr
    assert f"data changed: {expected}: the result may differ" in accepted.stdout
    again = cli("resume", stopped, sets=["run.max_steps=6"])
    assert again.returncode == 0, "the changed data is the run's own now"


def test_a_resume_counts_the_changed_files_if_there_are_many(cli, one_line, photos, stopped):
    for number in range(0, 60, 3):
        (photos / "cat" / f"{number}.png").rename(photos / "cat" / f"renamed-{number}.png")
    done = cli("resume", stopped, sets=["run.max_steps=5"])
    one_line(done, "cat/0.png was removed, cat/12.png was removed, cat/15.png was removed and 37 more changes")


def test_a_resume_accepts_data_that_was_only_moved_or_touched(cli, photos, stopped):
    moved = photos.with_name("elsewhere")
    shutil.move(photos, moved)
    for path in moved.rglob("*.png"):
        path.touch()
    done = cli("resume", stopped, sets=["run.max_steps=5", f"data.root={moved}"])
    assert done.returncode == 0, done.stderr


def test_a_resume_names_a_changed_file_of_the_test_set(cli, one_line, tmp_path):
    for part, first in (("train", 0), ("test", 100)):
        for number in range(12):
            write(tmp_path / "parts" / part / ("cat", "dog")[number % 2] / f"{number}.png", first + number)
    sets = [*SETTINGS, f"data.root={tmp_path / 'parts'}", "run.max_steps=1"]
    assert cli("train", "image-folder", "--run", "run", sets=sets).returncode == 0
    write(tmp_path / "parts" / "test" / "dog" / "3.png", 7)
    one_line(cli("resume", "run", sets=["run.max_steps=2"]), "the test data changed: test/dog/3.png was edited;")
