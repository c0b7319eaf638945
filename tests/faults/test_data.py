"""Faults of data, loader workers and memory, and changes that a resume accepts or refuses."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import torchrelay as tr
from torchrelay import checkpoint
from torchrelay.checkpoint.format import Manifest
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.errors import RelayError
from torchrelay.tasks.multilabel import MultiLabel
from torchrelay.tasks.regression import Regression

# A dataset whose transform draws from all three generators, and what makes it fail, by variables of the environment.
CODE = """
import os
import random
import signal

import numpy as np
import torch
from torch.utils.data import Dataset

import torchrelay as tr


class Rows(Dataset):
    def __init__(self, count, classes=()):
        drawn = torch.Generator().manual_seed(count)
        self.rows = torch.rand(count, 6, generator=drawn)
        self.labels = torch.randint(3, (count,), generator=drawn).tolist()
        if classes:
            self.classes = classes

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index] + 0.1 * torch.randn(6) + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        return row, self.labels[index]


class Killed(Rows):
    def __getitem__(self, index):
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Wide(Rows):
    def __getitem__(self, index):
        return torch.ones(200_000), self.labels[index]


class Mislabelled(Rows):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.labels[20] = 12


def rows(kind="Rows", classes=()):
    return globals()[kind](60, classes), Rows(20, classes)


def vectors(label):
    train, test = Rows(60), Rows(20)
    train.labels[20] = label
    return (train.rows, train.labels), (test.rows, test.labels)


class Net(torch.nn.Sequential):
    def __init__(self, outputs: int = 3, width: int = 6):
        parts = (torch.nn.Linear(width, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.3))
        super().__init__(*parts, torch.nn.Linear(8, outputs))


class Hungry(Net):
    def forward(self, x):
        if self.training and len(x) > 8:
            import resource

            now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
                resource.setrlimit(resource.RLIMIT_AS, (now + 2**27, now + 2**27))
            torch.ones(len(x), 2**22)
        return super().forward(x)


class Stopped(tr.Classification):
    '''Sends the process a signal in the step that STOP_IN names, counted from this process's start.'''

    steps = 0

    def loss(self, outputs, targets):
        self.steps += outputs.requires_grad
        if outputs.requires_grad and self.steps == int(os.environ.get("STOP_IN", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(outputs, targets)
"""
SETTINGS = (
    *("data.name=rows", "data.batch_size=8", "data.augment=[]", "model.name=Net", "run.epochs=1", "run.seed=3"),
    *("optimizer.lr=0.05", "schedule.name=constant"),
)


@pytest.fixture
def code(tmp_path) -> Path:
    """A user's code file with the data and the networks above."""
    file = tmp_path / "own.py"
    file.write_text(CODE)
    return file


def readable(run: Path) -> list[int]:
    """The steps of a run's checkpoints, after verifying each."""
    return [checkpoint.read(path).step for path in checkpoint.complete(run / "checkpoints")]


def rewrite(saved: Path, name: str, content: bytes) -> None:
    """Replace a file in a checkpoint, and update its manifest."""
    (saved / name).write_bytes(content)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    forged = Manifest.model_validate(manifest)
    forged.checksum = forged.own_checksum()  # as a forger would
    (saved / "manifest.json").write_text(forged.model_dump_json())


# ------------------------------------------------------------------------------------------------ 19: workers


def test_the_number_of_workers_may_change_at_every_resume(cli, code, tmp_path, same_runs):
    settings = (*SETTINGS, "loss.name=Stopped", "run.epochs=5")
    done = cli("train", "digits", "--run", "undisturbed", "--code", code, sets=(*settings, "data.workers=0"))
    assert done.returncode == 0, done.stderr
    command = ("train", "digits", "--run", "stopped", "--code", code)
    for workers, stop in ((2, 3), (0, 9), (4, 7), (0, 0)):  # in the epochs 1, 2 and 3 of 8 steps each
        sets = (*(settings if command[0] == "train" else ()), f"data.workers={workers}")
        done = cli(*command, sets=sets, environment={"STOP_IN": str(stop)})
        assert done.returncode == (75 if stop else 0), done.stderr
        command = ("resume", "stopped", "--code", code)
    assert "changed: data.workers was 4 and is 0" in done.stdout
    same_runs(tmp_path / "stopped", tmp_path / "undisturbed")


# ------------------------------------------------------------------------------------------------ 21, 22: what changed


@pytest.fixture
def digits_run(cli) -> str:
    """The folder of a run that stopped inside an epoch."""
    sets = ("run.max_steps=3", "model.name=mlp", "schedule.name=constant")
    assert cli("train", "digits", "--run", "run", sets=sets).returncode == 0
    return "run"


def test_recipe_changes_that_break_exactness_are_shown_and_refused(cli, one_line, tmp_path, digits_run):
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()}
    recipe = (tmp_path / "run" / "recipe.toml").read_text()
    for changes, shown in (
        (
            ["optimizer.lr=0.5", "optimizer.momentum=0.5"],
            "optimizer.lr was 0.05 and is 0.5, optimizer.momentum was 0.9",
        ),
        (["data.batch_size=50"], "data.batch_size was 64 and is 50"),
        (["run.seed=7"], "run.seed was 0 and is 7"),
        (["model.options.widths=[32]"], "model.options was {} and is {'widths': [32]}"),
    ):
        done = cli("resume", digits_run, sets=changes)
        one_line(
            done,
            "this run can't continue to the same result",
            shown,
            "undo it, or resume with --accept-changes",
        )
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "run" / "recipe.toml").read_text() == recipe


def test_recipe_changes_are_shown_and_break_exactness_only_if_accepted(cli, one_line, digits_run):
    done = cli("resume", digits_run, sets=["run.max_steps=5", "checkpoint.keep=3"])
    assert done.returncode == 0, done.stderr
    assert "changed: run.max_steps was 3 and is 5" in done.stdout
    assert "changed: checkpoint.keep was 2 and is 3" in done.stdout
    done = cli("resume", digits_run, "--accept-changes", sets=["run.max_steps=7", "optimizer.lr=0.5"])
    assert done.returncode == 0, done.stderr
    assert "changed: optimizer.lr was 0.05 and is 0.5" in done.stdout
    assert "resuming after step 5" in done.stdout
    done = cli("resume", digits_run, sets=["run.max_steps=8"])
    assert done.returncode == 0, "the accepted recipe is the run's own now"


def test_another_thread_count_torch_version_or_device_is_a_warning(cli, tmp_path, digits_run):
    (saved,) = (path for path in checkpoint.complete(tmp_path / "run" / "checkpoints") if path.name.endswith("3"))
    state = json.loads((saved / "state.json").read_text())
    state["identity"] |= {"torch": "2.11.0+elsewhere", "device": "NVIDIA H100"}
    rewrite(saved, "state.json", json.dumps(state).encode())
    done = cli("resume", digits_run, sets=["run.max_steps=5", "device.threads=2"])
    assert done.returncode == 0, done.stderr
    for change in (
        "threads was 1 and is 2",
        f"torch was 2.11.0+elsewhere and is {torch.__version__}",
        "device was NVIDIA H100 and is cpu",
    ):
        (line,) = (line for line in done.stdout.splitlines() if change in line)
        assert line.startswith("warning: ")
        assert line.endswith("the result may differ from an uninterrupted run's")
        assert line in (tmp_path / "run" / "log.txt").read_text()


# ------------------------------------------------------------------------------------------------ 24, 25: images

# Bytes are compared, so nothing is left to a probe of the machine.
DEVICE = ("device.precision=float32", "device.channels_last=false")
PHOTOS = ("data.root=photos", "data.batch_size=8", "model.name=small-cnn", *DEVICE, "run.epochs=1")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Forty images of two classes, in a training and a test part."""
    root = tmp_path / "photos"
    for number in range(40):
        path = root / ("test" if number % 4 == 3 else "train") / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    # A class that stands in both parts
    for part, number in (("train", 50), ("test", 51)):
        for name in ("cat", "dog"):
            path = root / part / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16, 3), number, dtype=np.uint8)).save(path)
    return root


def cut(path: Path) -> Path:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_a_corrupt_image_is_an_error_with_its_path(cli, one_line, photos, tmp_path):
    cut(photos / "train" / "cat" / "4.png")
    done = cli("train", "image-folder", "--run", "run", sets=PHOTOS)
    one_line(done, "photos/train/cat/4.png can't be read as an image", "repair or remove it, or set data.on_error=skip")
    assert not (tmp_path / "run").exists()


def test_skipped_images_are_counted_logged_and_replaced_the_same_way_every_time(cli, photos, tmp_path, same_runs):
    cut(photos / "train" / "cat" / "4.png")
    cut(photos / "train" / "dog" / "13.png")
    runs = {"decoded": "true", "cached": "true", "uncached": "false"}
    for name, cache in runs.items():
        done = cli("train", "image-folder", "--run", name, sets=(*PHOTOS, "data.on_error=skip", f"data.cache={cache}"))
        assert done.returncode == 0, done.stderr
        told = "photos/train: 2 unreadable images left out, the first is photos/train/cat/4.png"
        assert told in done.stdout
        assert told in (tmp_path / name / "log.txt").read_text()
        assert "(30 samples)" in done.stdout  # of 32
    same_runs(tmp_path / "decoded", tmp_path / "cached")
    same_runs(tmp_path / "decoded", tmp_path / "uncached")


def test_more_corrupt_images_than_the_limit_are_an_error(cli, one_line, photos):
    for name in ("4", "8", "12"):
        cut(photos / "train" / "cat" / f"{name}.png")
    done = cli("train", "image-folder", "--run", "r", sets=(*PHOTOS, "data.on_error=skip", "data.max_errors=2"))
    one_line(done, "3 images can't be read and 2 may be left out", "photos/train/cat/12.png", "data.max_errors")


def emptied(photos: Path) -> str:
    (photos / "train" / "owl").mkdir()
    return "photos/train/owl has no images in it"


def without_images(photos: Path) -> str:
    for path in photos.rglob("*.png"):
        path.rename(path.with_suffix(".txt"))
    return "photos/train/cat has no images in it"


def without_classes(photos: Path) -> str:
    photos.rename(photos.with_name("kept"))
    photos.mkdir()
    return "photos has no class folders in it"


def untested(photos: Path) -> str:
    (photos / "test" / "dog").rename(photos / "spare")
    return "photos/test has no class 'dog', unlike photos/train"


@pytest.mark.parametrize("fault", [emptied, without_images, without_classes, untested])
def test_a_folder_without_images_is_named_before_training(cli, one_line, photos, tmp_path, fault):
    text = fault(photos)
    one_line(cli("train", "image-folder", "--run", "run", sets=PHOTOS), text, ": ")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ 26: targets


class Rows(Dataset):
    """Forty rows with the targets that a function gives."""

    def __init__(self, target, row=lambda index: torch.ones(6)) -> None:
        self.row, self.target = row, target

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int):
        return self.row(index), self.target(index)


def wrong_at(position: int, wrong):
    """A class for each sample, and something else for one."""
    return lambda index: wrong if index == position else index % 3


def arrays(values, **how):
    return tr.data.arrays(torch.ones(len(values), 6), values, **how)


LABELS = [i % 3 for i in range(40)]
NAMES = ["a", "b", "c"]
FAULTS = {
    # where the data lies in memory: before the first step
    "array, named": (lambda: arrays([*LABELS, 12], classes=NAMES), {}, r"sample 40 has label 12.* 0 to 2"),
    "array": (lambda: arrays([*LABELS, 12]), {}, r"3 outputs, but sample 40 of arrays \(training\) has label 12"),
    "array, negative": (lambda: arrays([*LABELS, -1]), {}, r"sample 40 has label -1: classes count from 0"),
    "array, -100": (lambda: arrays([*LABELS, -100]), {}, r"sample 40 has label -100: "),
    "array, numbers": (lambda: arrays([0.5] * 40), {}, r"sample 0 has target 0\.5 \(float32\): a class is a whole"),
    "array, labels": (
        lambda: arrays([[0.0, 1.0, 2.0]] * 9),
        {"task": MultiLabel(labels=3)},
        r"sample 0 has label 2\.0: each label is there \(1\) or not \(0\)",
    ),
    # where a dataset is read one by one: at its batch
    "dataset": (lambda: Rows(wrong_at(33, 12)), {}, r"Rows \(training\): sample 33 has label 12: .* 0 to 2: correct"),
    "dataset, named": (lambda: tr.data.dataset(Rows(wrong_at(33, 12)), NAMES), {}, r"Rows: sample 33 has label 12"),
    "dataset, workers": (
        lambda: tr.data.dataset(Rows(wrong_at(33, 12)), NAMES),
        {"workers": 2},
        r"Rows: sample 33 has label 12: the 3 classes are 0 to 2",
    ),
    "dataset, negative": (lambda: Rows(wrong_at(33, -1)), {}, r"sample 33 has label -1"),
    "dataset, -100": (lambda: Rows(wrong_at(33, -100)), {}, r"sample 33 has label -100"),
    "dataset, replicas": (
        lambda: Rows(wrong_at(33, 12)),
        {"parallel": ParallelSettings(replicas=4)},
        r"sample 33 has label 12",
    ),
    "dataset, weighted": (
        lambda: Rows(wrong_at(33, 12)),
        {"task": tr.Classification(class_weights=torch.ones(3))},
        r"sample 33 has label 12",
    ),
    "dataset, mixed": (
        lambda: tr.data.dataset(Rows(wrong_at(33, 12), lambda i: torch.ones(1, 2, 3)), NAMES),
        {"augment": [tr.augment.Mixup()]},
        r"sample 33 has label 12",
    ),
    "dataset, int32": (lambda: Rows(lambda i: np.int32(2)), {}, r"sample \d+ has target 2 \(int32\): .* int64"),
    "dataset, numbers": (lambda: Rows(lambda i: 0.5), {}, r"sample \d+ has target 0\.5 \(float64\): .* class's number"),
    "dataset, words": (lambda: Rows(lambda i: "cat"), {}, r"sample \d+ has target 'cat': .* return an int"),
    "dataset, nothing": (lambda: Rows(lambda i: None), {}, r"sample \d+ is \(float32 \(6,\), NoneType\), which"),
    "dataset, shape": (
        lambda: Rows(lambda i: torch.tensor([1])),
        {},
        r"sample \d+ has target \[1\] \(int64 of shape \(1,\)\): the loss wants one class a sample",
    ),
    "dataset, probabilities": (
        lambda: Rows(lambda i: torch.tensor([0.5, 0.5])),
        {},
        r"sample \d+ has target \[0\.5, 0\.5\] .* a probability for each of 3 classes",
    ),
    "regression": (
        lambda: Rows(lambda i: torch.zeros(2)),
        {"task": Regression()},
        r"sample \d+ has target \[0\.0, 0\.0\] .*: the model gives \(8, 3\) for targets of \(8, 2\)",
    ),
    # inputs
    "inputs of another shape": (
        lambda: Rows(wrong_at(0, 0), lambda i: torch.ones(5 if i == 33 else 6)),
        {},
        r"sample \d+ is \(float32 \(\d,\), int\), but sample \d+ is \(float32 \(\d,\), int\): "
        "give all samples one shape and type",
    ),
    "inputs of another type": (
        lambda: Rows(wrong_at(0, 0), lambda i: torch.ones(6, dtype=torch.float64 if i == 33 else None)),
        {},
        r"sample \d+ is \(float\d\d \(6,\), int\), but sample \d+ is \(float\d\d \(6,\), int\): "
        "give all samples one shape and type",
    ),
    "inputs of double precision": (
        lambda: Rows(wrong_at(0, 0), lambda i: np.ones(6)),
        {},
        r"sample \d+ is \[1\.0.*\(float64 of shape \(6,\)\), and the model computes in float32",
    ),
    # models
    "too few outputs": (lambda: arrays([0, 1, 2, 3], classes=[*"abcd"]), {}, "3 outputs for 4 classes: build it"),
    "too many outputs": (lambda: arrays([0, 1], classes=[*"ab"]), {}, r"3 outputs for 2 classes: .*num_classes=2"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "how", "says"), FAULTS.values(), ids=FAULTS.keys())
def test_an_invalid_target_or_input_is_named_with_its_sample(quiet, data, how, says):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    with pytest.raises(RelayError, match=says) as found:
        tr.Trainer(model, data(), epochs=1, batch_size=8, terminal=quiet, **how).fit()
    assert "\n" not in str(found.value)


def test_an_invalid_test_label_is_named_before_training_or_at_the_evaluation(quiet):
    model = nn.Linear(6, 3)
    with pytest.raises(RelayError, match=r"arrays \(evaluation\): sample 40 has label -1"):
        tr.Trainer(model, arrays(LABELS), arrays([*LABELS, -1]), terminal=quiet)
    trainer = tr.Trainer(model, arrays(LABELS), Rows(wrong_at(33, 12)), batch_size=8, terminal=quiet)
    with pytest.raises(RelayError, match=r"Rows \(evaluation\): sample 33 has label 12"):
        trainer.evaluate()


def test_valid_targets_of_every_kind_are_accepted(quiet):
    sources = {
        "classes": arrays(LABELS, classes=NAMES),
        "more outputs than labels": arrays([0, 1] * 20),
        "probabilities": arrays([[0.2, 0.3, 0.5]] * 40),
        "dataset": Rows(wrong_at(33, 2)),
        "bytes": Rows(lambda i: np.uint8(i % 3)),
    }
    for name, source in sources.items():
        found = tr.Trainer(nn.Linear(6, 3), source, source, epochs=1, batch_size=8, terminal=quiet).fit()
        assert found["loss"] > 0, name


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.options.kind=Mislabelled"], "Mislabelled (training): sample 20 has label 12: the 3 classes are 0 to 2"),
        (["data.options.kind=Mislabelled", "data.workers=2", 'data.options.classes=["a","b","c"]'], "sample 20 has"),
        (["data.name=vectors", "data.options={label=12}"], "sample 20 of arrays (training) has label 12: build it"),
        (["data.options.kind=Rows", "model.options.outputs=2"], "label 2: the 2 classes are 0 to 1: correct the label"),
    ],
)
def test_an_invalid_label_ends_a_run_with_a_one_line_error(cli, one_line, code, tmp_path, settings, says):
    done = cli("train", "digits", "--run", "run", "--code", code, "--quiet", sets=(*SETTINGS, *settings))
    one_line(done, says)
    assert readable(tmp_path / "run") == [0]


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kind", ["array, named", "array", "array, negative", "dataset, workers", "too few outputs"])
def test_a_label_out_of_range_is_refused_before_it_reaches_a_gpu(quiet, kind):
    data, how, says = FAULTS[kind]
    with pytest.raises(RelayError, match=says):
        tr.Trainer(nn.Linear(6, 3), data(), epochs=1, batch_size=8, terminal=quiet, device="cuda", **how).fit()
    torch.cuda.synchronize()  # it would fail if a kernel had used the label


# ------------------------------------------------------------------------------------------------ 33, 34: workers


def test_a_killed_loader_worker_is_named_within_15_seconds(cli, one_line, code, tmp_path):
    sets = (*SETTINGS, "data.options.kind=Killed", "data.workers=2")
    began = time.monotonic()
    done = cli("train", "digits", "--run", "run", "--code", code, "--quiet", sets=sets)
    assert time.monotonic() - began < 15
    one_line(done, "Killed: DataLoader worker (pid", "perhaps it ran out of memory: use fewer data.workers, and resume")
    assert readable(tmp_path / "run") == [0]


def test_too_little_shared_memory_is_an_error_with_the_remedy(namespace, one_line, code, tmp_path):
    sets = (*SETTINGS, "data.options.kind=Wide", "model.options.width=200000", "data.workers=2")
    namespace.shell("mount -t tmpfs -o size=4m tmpfs /dev/shm")
    try:
        command = ("train", "digits", "--run", "run", "--code", code, "--quiet")
        done = namespace.server.start(*command, folder=tmp_path, sets=sets).done()
    finally:
        namespace.shell("umount /dev/shm")
    one_line(done, "Wide: workers pass batches through /dev/shm, which is full: enlarge it, or use fewer data.workers")


# ------------------------------------------------------------------------------------------------ 39: memory


def test_out_of_memory_is_an_error_with_the_batch_size_and_the_remedies(cli, one_line, code, tmp_path):
    sets = ("model.name=Hungry", "data.batch_size=16")
    done = cli("train", "digits", "--run", "run", "--code", code, "--quiet", sets=(*SETTINGS, *sets))
    one_line(
        done,
        "cpu has no memory left (it tried to get 268435456 bytes) at batches of 16: lower data.batch_size, ",
        "raise parallel.replicas",
    )
    assert readable(tmp_path / "run") == [0]
    assert "batch_size = 16" in (tmp_path / "run" / "recipe.toml").read_text(), "it changed what is computed"
    smaller = cli("train", "digits", "--run", "smaller", "--code", code, sets=(*SETTINGS, sets[0], "data.batch_size=8"))
    assert smaller.returncode == 0, smaller.stderr
    parts = ("parallel.replicas=2", *sets)
    parted = cli("train", "digits", "--run", "parted", "--code", code, sets=(*SETTINGS, *parts))
    assert parted.returncode == 0, parted.stderr


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_out_of_gpu_memory_is_an_error_with_the_batch_size_and_the_remedies(quiet):
    class Hungry(nn.Linear):
        def forward(self, x):
            torch.empty(2**50, device=x.device)
            return super().forward(x)

    trainer = tr.Trainer(Hungry(6, 3), arrays(LABELS), batch_size=16, terminal=quiet, device="cuda")
    with pytest.raises(RelayError, match=r"cuda has no memory left .* at batches of 16: lower data\.batch_size"):
        trainer.fit()
