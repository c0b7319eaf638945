"""The data section of a recipe."""

import os
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from torchrelay.data.settings import DataSettings, load
from torchrelay.errors import UsageError


def own(**functions) -> ModuleType:
    module = ModuleType("own")
    for name, function in functions.items():
        function.__module__ = "own"  # as if it was written in that file
        setattr(module, name, function)
    return module


def pair(samples: int = 4):
    return (np.zeros((samples, 2)), np.zeros(samples)), (np.zeros((2, 2)), np.zeros(2))


def test_the_default_is_the_digits():
    parts = load(DataSettings(), seed=0)
    assert (parts.train.name, len(parts.train), parts.validation) == ("digits", 1438, None)


def test_a_validation_part_is_taken_only_from_the_training_part():
    without, parts = load(DataSettings(), seed=0), load(DataSettings(validation=0.1), seed=0)
    assert len(parts.train) + len(parts.validation) == 1438
    assert parts.test.fingerprint() == without.test.fingerprint()


def test_a_mistyped_name_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"'cifar-10' is unknown; did you mean 'cifar10'\?"):
        load(DataSettings(name="cifar-10"), seed=0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "image-folder", "text"])
def test_data_that_needs_a_root_asks_for_it(name):
    with pytest.raises(UsageError, match=r"data\.root isn't set"):
        load(DataSettings(name=name), seed=0)


def test_a_mean_needs_a_deviation():
    with pytest.raises(UsageError, match="go together"):
        DataSettings(mean=[0.5])


def test_a_mean_in_the_recipe_replaces_that_of_the_data():
    parts = load(DataSettings(mean=[0.25], std=[0.5]), seed=0)
    assert (parts.train.mean, parts.train.std) == ((0.25,), (0.5,))


def test_an_unused_mean_is_refused():
    code = own(mine=lambda: (TensorDataset(torch.zeros(3, 1), torch.zeros(3)), None))
    with pytest.raises(UsageError, match="read sample by sample"):
        load(DataSettings(name="mine", mean=[0.5], std=[0.5]), seed=0, code=code)


def test_a_user_function_is_called_with_the_options():
    parts = load(DataSettings(name="pair", options={"samples": 7}), seed=0, code=own(pair=pair))
    assert (len(parts.train), len(parts.test)) == (7, 2)


def test_unknown_options_of_a_function_are_refused():
    with pytest.raises(UsageError, match=r"data\.options don't match 'pair'.*'sample'"):
        load(DataSettings(name="pair", options={"sample": 7}), seed=0, code=own(pair=pair))


def test_a_function_that_does_not_return_a_pair_is_refused():
    with pytest.raises(UsageError, match="must return a pair"):
        load(DataSettings(name="one"), seed=0, code=own(one=lambda: np.zeros(3)))


def test_a_random_transform_cannot_prepare_test_images():
    with pytest.raises(UsageError, match="flip"):
        DataSettings(prepare=["flip"])


def test_an_image_folder_follows_the_settings(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (9, 7), (i, i, i)).save(tmp_path / "data" / name / f"{i}.png")
    said = []
    settings = DataSettings(
        name="image-folder",
        root=str(tmp_path / "data"),
        size=5,
        channels=1,
        test_share=0.5,
        cache_dir=str(tmp_path / "cache"),
    )
    parts = load(settings, seed=0, log=said.append)
    assert parts.train.inputs.shape == parts.test.inputs.shape == (4, 1, 5, 5)
    assert said[-1] == "decoding 8 images, once"
    assert said[0] == f"{tmp_path / 'data'}: 2 classes: cat, dog"
    assert list((tmp_path / "cache").glob("*/images.bin"))


def test_functions_that_the_user_file_imports_are_not_called():
    code = ModuleType("own")
    code.system = os.system
    with pytest.raises(UsageError, match=r"data\.name 'system' is unknown"):
        load(DataSettings(name="system"), seed=0, code=code)


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"name": "digits", "size": 32, "root": "x", "test_share": 0.3}, ["data.root", "data.size"]),
        ({"name": "image-folder", "root": "x", "size": 32, "length": 9}, ["data.length"]),
        ({"name": "mine", "options": {"n": 1}, "channels": 1}, ["data.channels"]),
        ({"name": "image-folder", "root": "x", "options": {"n": 1}}, ["data.options"]),
        ({"name": "cifar10", "root": "x", "download": True, "channels": 3}, []),
    ],
)
def test_unused_keys_are_reported(given, unused):
    assert DataSettings(**given).without_effect() == unused
