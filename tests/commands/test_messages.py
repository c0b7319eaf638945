"""Error messages: one line with the cause, the place and the remedy."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import torchrelay as tr
from torchrelay import cli
from torchrelay.errors import UsageError
from torchrelay.models.small import small_cnn
from torchrelay.recipe import recipe

CODE = """
from torch import nn
from torchvision.models import resnet18


class MyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 7)

    def forward(self, images):
        return self.head(images.flatten(1))


def build_net():
    return MyNet()
"""
SECTIONS = (
    "'name' is a key of several sections: choose data.name, model.name, device.name, optimizer.name, schedule.name "
    "or loss.name"
)
EPOCHS = "(such as epochs = 10)"
WIDTHS = "(such as --set 'model.options.widths=[32, 64, 64]')"
AUGMENT = '(such as augment = ["flip", {name = "crop", padding = 4}])'

# The arguments of `torchrelay`, the message after "error: ", and the exit code.
MESSAGES = [
    # options that are keys of the recipe
    ("train digits --epochs 3", "there is no option '--epochs'; write --set run.epochs=3", 2),
    ("train --epochs 3 digits", "there is no option '--epochs'; write --set run.epochs=3", 2),
    ("train digits --epoch=3", "there is no option '--epoch'; write --set run.epochs=3", 2),
    ("train digits --epochs", "there is no option '--epochs'; write --set run.epochs=VALUE", 2),
    ("train digits --lr 0.1", "there is no option '--lr'; write --set optimizer.lr=0.1", 2),
    ("train digits --learning-rate 1", "there is no option '--learning-rate'; write --set optimizer.lr=1", 2),
    ("train digits --batch-size 32", "there is no option '--batch-size'; write --set data.batch_size=32", 2),
    ("train digits --root 'my pics'", "there is no option '--root'; write --set 'data.root=my pics'", 2),
    ("train digits --data pics", "there is no option '--data'; write --set data.root=pics", 2),
    ("train digits --data.root=x", "there is no option '--data.root'; write --set data.root=x", 2),
    ("train digits --seed 1", "there is no option '--seed'; write --set run.seed=1", 2),
    ("train digits --device cpu", "there is no option '--device'; write --set device.name=cpu", 2),
    ("train digits --precision bf16", "there is no option '--precision'; write --set device.precision=bf16", 2),
    ("train digits --optimizer adamw", "there is no option '--optimizer'; write --set optimizer.name=adamw", 2),
    ("train digits --name x", f"there is no option '--name'; {SECTIONS}", 2),
    ("train digits --gpus 2", "there is no option '--gpus'; write --devices 2", 2),
    ("train digits --gpu 1", "there is no option '--gpu'; write CUDA_VISIBLE_DEVICES=1 before the command", 2),
    ("train digits --resume", "there is no option '--resume'; write torchrelay resume FOLDER", 2),
    ("train digits run.epochs=3", "unrecognized arguments: run.epochs=3; write --set run.epochs=3", 2),
    ("recipes --epochs 3", "there is no option '--epochs'; see 'torchrelay recipes --help'", 2),
    # keys without their section, or in another one
    ("train digits --set lr=0.1", "--set lr=0.1: write --set optimizer.lr=0.1", 2),
    ("train digits --set epochs=3", "--set epochs=3: write --set run.epochs=3", 2),
    ("train digits --set batch_size=8", "--set batch_size=8: write --set data.batch_size=8", 2),
    ("train digits --set root=x", "--set root=x: write --set data.root=x", 2),
    ("train digits --set precision=bf16", "--set precision=bf16: write --set device.precision=bf16", 2),
    ("train digits --set name=x", f"--set name=x: {SECTIONS}", 2),
    ("train digits --set foo=3", "--set foo=3: write section.key=value, such as optimizer.lr=0.02", 2),
    ("train digits --set optimizer.epochs=3", "digits: unknown key 'optimizer.epochs'; did you mean 'run.epochs'?", 2),
    ("train digits --set rum.epochs=3", "digits: unknown key 'rum'; did you mean 'run'?", 2),
    # values of another type
    (
        "train digits --set run.epochs=a",
        "digits: run.epochs should be a whole number, not 'a' (such as epochs = 10)",
        2,
    ),
    ("train digits --set optimizer.lr=0,1", "digits: optimizer.lr should be a number, not '0,1' (such as lr = 0.1)", 2),
    ("train digits --set device.name=0", 'digits: device.name should be a string, not 0 (such as name = "auto")', 2),
    ("train digits --set data.augment=flip", f"digits: data.augment should be a list, not 'flip' {AUGMENT}", 2),
    (
        "train digits --set 'model.options.widths=(8, 8, 8)'",
        f"model.options.widths of 'small-cnn' should be a list, not '(8, 8, 8)' {WIDTHS}",
        2,
    ),
    # files
    (
        "train pics",
        "pics is a folder, and a recipe is a TOML file; to train on its images: "
        "torchrelay train image-folder --set data.root=pics",
        2,
    ),
    ("train run", "run is a run's folder: resume it by torchrelay resume, or give its run/recipe.toml", 2),
    (
        "train syntax.toml",
        "syntax.toml isn't TOML: Expected ']' at the end of a table declaration (at line 3, column 6)",
        2,
    ),
    ("train big.toml", "big.toml has 2,000,000 bytes, too many for a recipe: give its TOML file", 2),
    ("train digits --code big.py", "--code big.py has 300,000,000 bytes, too many for code: give a Python file", 2),
    ("train digits --code pics", "--code pics is a folder: give a Python file, such as my_net.py", 2),
    ("train digits --code none.py", "--code none.py: there is no such file", 2),
    ("train digits --code wrong.py", "--code wrong.py fails: SyntaxError: invalid syntax (wrong.py, line 1)", 1),
    # names that a file of code has
    (
        "train digits --code own.py --set model.name=mynet",
        "there is no model 'mynet'; own.py defines MyNet, build_net; did you mean 'MyNet'?",
        2,
    ),
    (
        "train digits --code own.py --set data.name=photos",
        "data.name 'photos' is unknown; known: build_net, digits, breast-cancer, wine, mnist, fashion-mnist, cifar10, "
        "cifar100, text, image-folder",
        2,
    ),
    # numbers of classes
    (
        "train digits --code own.py --set model.name=MyNet",
        "the model gives 7 outputs for 10 classes: build it with 10 (often num_classes=10)",
        1,
    ),
    (
        "train digits --set model.pretrained=seven.safetensors",
        "seven.safetensors doesn't fit, nothing was loaded: it was trained for 7 classes, and the model has 10: set "
        "model.new_head=true to train a new head",
        1,
    ),
    # data
    (
        "train cifar10-fast --set data.root=pics",
        "data.root pics holds pictures, and not CIFAR10's files: to train on them, add --set data.name=image-folder",
        2,
    ),
    (
        "train cifar10-fast --set data.root=nowhere",
        "CIFAR10 isn't in nowhere, or its files are damaged: set data.download=true, or data.root to its folder",
        1,
    ),
    (
        "train image-folder --set data.root=https://example.com/pics.zip",
        "data.root https://example.com/pics.zip is an address: download the data, and set data.root to its path",
        2,
    ),
    (
        "train digits --set model.pretrained=https://example.com/net.pth",
        "model.pretrained https:/example.com/net.pth is an address: download the file, and give its path",
        2,
    ),
    ("train characters", "data.root isn't set: set it to a text file, such as --set data.root=book.txt", 2),
    (
        "train characters --set data.root=pics",
        "data.root pics can't be read as text (Is a directory): give a text file in UTF-8",
        2,
    ),
    (
        "train characters --set data.root=big.txt",
        "data.root big.txt has 3,000,000,000 bytes, and a text of at most 1,000,000,000 is held in memory: give a part "
        "of it, or read it by an IterableDataset in --code",
        2,
    ),
    # devices
    ("train digits --set device.name=gpu", "device.name 'gpu' is unknown: use auto, cpu, cuda, cuda:1 or mps", 2),
    (
        "train digits --devices 3 --set device.name=cpu",
        "an exact run can't be spread over 3 devices: use 2 or 4, or --set run.exact=false",
        2,
    ),
    ("--local-rank=1 train digits --set lr=1", "--set lr=1: write --set optimizer.lr=1", 2),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with the files that the commands name."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("pics/a/1.png", "pics/b/2.png"):
        (folder / name).parent.mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / name)
    (folder / "run").mkdir()
    (folder / "run" / "recipe.toml").write_text("")
    (folder / "own.py").write_text(CODE)
    (folder / "wrong.py").write_text("def f(:\n")
    (folder / "syntax.toml").write_text("[run]\nepochs = 3\n[data\nname = 'digits'\n")
    for name, size in (("big.py", 300_000_000), ("big.toml", 2_000_000), ("big.txt", 3_000_000_000)):  # holes
        with (folder / name).open("wb") as file:
            file.truncate(size)
    save_file(small_cnn(7, 1).state_dict(), folder / "seven.safetensors")
    return folder


@pytest.mark.parametrize(("command", "says", "code"), MESSAGES, ids=[row[0] for row in MESSAGES])
def test_a_usage_error_prints_one_line(command, says, code, desk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    torch.set_num_threads(1)
    arguments = shlex.split(command)
    if "--code own.py --set model.name=MyNet" in command:
        arguments += ["--run", str(tmp_path / "run"), "--quiet"]
    try:
        found = cli.main(arguments)
    except SystemExit as leave:  # argparse's way out
        found = leave.code
    assert capsys.readouterr().err == f"error: {says}\n"
    assert found == code


WRITE = [
    (command, override)
    for command, says, _ in MESSAGES
    for override in re.findall(r"(?<!or )write --set ('[^']+'|[\w.]+=\S+)", says)
]


@pytest.mark.parametrize(("command", "override"), WRITE, ids=[command for command, _ in WRITE])
def test_what_is_to_be_written_instead_is_a_recipe(command, override):
    if override.endswith("=VALUE"):
        override = override.replace("VALUE", "3")
    (written,) = shlex.split(override)
    recipe.load("digits", [written])


# ------------------------------------------------------------------------------------------------ from Python


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tr.RunSettings(epochs=0), "RunSettings: epochs should be at least 1, not 0"),
        (lambda: tr.RunSettings(epochs="many"), "RunSettings: epochs should be a whole number, not 'many' (such as"),
        (lambda: tr.RunSettings(epoch=3), "RunSettings: unknown key 'epoch'; did you mean 'epochs'?"),
        (lambda: tr.optim.SGD(lr=-1), "SGD: lr should be "),
        (lambda: tr.augment.Flip(q=1), "Flip: unknown key 'q'; known here: "),
        (
            lambda: tr.DeviceSettings(precision="half"),
            "DeviceSettings: precision should be 'float32', 'bf16', 'fp16' or 'auto'",
        ),
        (lambda: tr.ParallelSettings(replicas=0), "ParallelSettings: replicas should be at least 1, not 0"),
        (lambda: tr.Recipe(run={"epochs": 0}), "Recipe: run.epochs should be at least 1, not 0"),
        (lambda: tr.Recipe(data={"mean": [0.5]}), "Recipe: data: data.mean and data.std go together"),
        (lambda: tr.Recipe(epochs=3), "Recipe: unknown key 'epochs'; did you mean 'run.epochs'?"),
        (
            lambda: setattr(tr.RunSettings(), "epochs", 3),
            "RunSettings.epochs can't be set, since settings never change",
        ),
    ],
)
def test_wrong_settings_raise_a_one_line_error_in_python(make, says):
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ without a network


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("cifar10-small --set data.root=data --set data.download=true", "CIFAR10 can't be downloaded to data: "),
        (
            "digits --set model.name=resnet18 --set model.pretrained=true",
            "of 'resnet18' can't be fetched from https://",
        ),
        (
            "digits --set model.name=timm/resnet18 --set model.pretrained=true",
            "can't be had (no connection to the Hub)",
        ),
    ],
)
def test_without_a_network_a_download_fails_at_once_with_one_line(cli, tmp_path, one_line, arguments, says):
    proxy = "http://127.0.0.1:9"  # refuses
    environment = {"http_proxy": proxy, "https_proxy": proxy, "HOME": str(tmp_path)}
    one_line(cli("train", *shlex.split(arguments), environment=environment), says)


def test_a_checkpoint_of_other_classes_is_refused_with_the_number_of_classes(desk, monkeypatch, tmp_path, quiet):
    monkeypatch.chdir(desk)
    images, targets = torch.zeros(12, 1, 8, 8, dtype=torch.uint8), torch.arange(12) % 3

    def trainer(classes: int) -> tr.Trainer:
        data = tr.data.arrays(images, targets, tuple("abcd"[:classes]))
        return tr.Trainer(small_cnn(classes, 1), data, data, epochs=1, run=tmp_path / "run", terminal=quiet)

    trainer(3).fit()
    with pytest.raises(
        tr.RelayError, match="the checkpoint was trained for 3 classes, and arrays has 4: give the data"
    ):
        trainer(4).resume(accept_changes=True)
