"""Full and read-only disks, and paths with unusual characters."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

import torchrelay as tr
from torchrelay import checkpoint

# ------------------------------------------------------------------------------------------------ 7: a full disk


@pytest.fixture
def disk(namespace, tmp_path):
    """Mount a disk of `size` KiB; return its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size: int) -> Path:
        namespace.shell(f"mount -t tmpfs -o size={size}k none {folder}")
        return folder

    return make


def test_a_full_disk_is_an_error_with_the_bytes_needed_and_the_run_resumes_once_there_is_room(
    namespace, disk, cli, one_line, tmp_path, same_runs
):
    settings = ("run.epochs=3",)
    run = disk(700) / "run"  # for the checkpoint of step 0, which has no momentum, and for half of the next
    done = namespace.server.start("train", "digits", "--run", run, folder=tmp_path, sets=settings).done()
    line = one_line(done, f"can't save {run}/checkpoints/step-00000023: ", "No space left on device")
    found = re.search(
        r"it needs ([\d,]+) bytes and ([\d,]+) are free: make room or repair the disk, then resume the run$", line
    )
    assert found is not None, line
    needed, free = (int(number.replace(",", "")) for number in found.groups())
    assert 400_000 < needed < 500_000
    assert 0 < free < needed
    checkpoints = namespace.seen(run / "checkpoints")
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000000"], "the partial one is gone"
    assert checkpoint.newest(checkpoints, warn=pytest.fail).step == 0

    namespace.shell(f"mount -o remount,size=8m {tmp_path}/disk")
    done = namespace.server.start("resume", run, folder=tmp_path).done()
    assert done.returncode == 0, done.stderr
    assert cli("train", "digits", "--run", "undisturbed", sets=settings).returncode == 0
    same_runs(namespace.seen(run), tmp_path / "undisturbed")


@pytest.mark.parametrize("size", [24, 270])
def test_a_disk_that_fills_up_at_another_moment_is_a_one_line_error(namespace, disk, one_line, tmp_path, size):
    """While the first checkpoint, TensorBoard's files or the model summary is written."""
    run = disk(size) / "run"
    done = namespace.server.start("train", "digits", "--run", run, folder=tmp_path, sets=("run.epochs=2",)).done()
    line = one_line(done, "No space left on device")
    assert re.search(r"make room[^;]*, then resume the run$", line)
    assert checkpoint.complete(namespace.seen(run / "checkpoints")) == [] or size == 270


def test_tensorboard_events_that_cannot_be_written_do_not_end_a_run(namespace, cli, tmp_path):
    """TensorBoard's folder is on a full disk of its own; a resume with room draws all charts."""
    sets = ("run.epochs=2", "run.max_steps=23")
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    namespace.shell(f"mount -t tmpfs -o size=4k none {tmp_path}/run/tensorboard")
    done = namespace.server.start("train", "digits", "--run", "run", folder=tmp_path, sets=sets).done()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("tensorboard can't be written (No space left on device): make room") == 1
    assert list((tmp_path / "run" / "tensorboard").iterdir()) == []
    done = cli("resume", "run", sets=("run.max_steps=30",))
    assert (done.returncode, done.stderr) == (0, "")
    written = (tmp_path / "run" / "tensorboard").rglob("*.scalars")
    assert sorted(path.parent.name for path in written) == ["test", "train"]


# ------------------------------------------------------------------------------------------------ 8: read-only


def test_a_read_only_run_folder_is_an_error_before_the_first_step(namespace, cli, one_line, tmp_path):
    """When starting or resuming; evaluating and predicting only read."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    assert cli("train", "digits", "--run", folder / "old", sets=("run.max_steps=5",)).returncode == 0
    picture = tmp_path / "picture.png"
    Image.fromarray(tr.data.digits()[1].inputs[0, 0].numpy()).save(picture)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    namespace.shell(f"mount --bind {folder} {folder}\nmount -o remount,ro,bind {folder}")

    def there(*arguments: str | Path):
        return namespace.server.start(*arguments, folder=tmp_path).done()

    for command, run in (("train", folder / "new"), ("resume", folder / "old")):
        done = there(*(("train", "digits", "--run", run) if command == "train" else ("resume", run)))
        one_line(done, f"can't write in the run folder {run}: Read-only file system; choose another by --run")
        assert "epoch" not in done.stdout
    assert there("evaluate", folder / "old").returncode == 0
    assert there("predict", folder / "old", picture).returncode == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ 35: paths

NAMES = ['zwei Wörter, Ж "quoted" $HOME', "--it's a\nline break"]


@pytest.mark.parametrize("name", NAMES)
def test_spaces_unicode_and_newlines_in_paths_work(cli, tmp_path, name):
    """From training to predicting; the printed resume command can be pasted."""
    data, run = tmp_path / f"data {name}", tmp_path / f"run {name}"
    train, test = tr.data.digits()
    for i in range(120):
        path = data / f"{name} {int(train.targets[i]) % 2}" / f"{i} {name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(train.inputs[i, 0].numpy()).save(path)
    recipe = tmp_path / f"recipe {name}.toml"
    settings = {
        "run": {"epochs": 2, "max_steps": 3},
        "data": {"name": "image-folder", "root": str(data), "channels": 1, "batch_size": 32},
        "model": {"name": "mlp"},
    }
    recipe.write_text(
        "\n".join(
            f"[{key}]\n" + "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in section.items())
            for key, section in settings.items()
        ),
        encoding="utf-8",
    )
    done = cli("train", recipe, "--run", run, sets=(f"data.cache_dir={json.dumps(str(tmp_path / name))}",))
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / name).iterdir()), "the cache lies where it was asked for"
    done = cli("resume", run, sets=("run.max_steps=5",))
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in checkpoint.complete(run / "checkpoints")][-1] == "step-00000005"
    done = cli("evaluate", run, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["checkpoint"].startswith(str(run))
    shutil.rmtree(data)
    picture = tmp_path / name / f"{name}.png"
    Image.fromarray(test.inputs[0, 0].numpy()).save(picture)
    done = cli("predict", run, picture, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = json.loads(done.stdout)
    assert found["path"] == str(picture)
    assert set(found["classes"]) == {f"{name} 0", f"{name} 1"}
