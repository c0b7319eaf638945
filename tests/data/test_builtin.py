"""Builtin datasets."""

import gzip
import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision

from idx import idx, write_idx
from torchrelay.data import (
    DataSettings,
    breast_cancer,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    load,
    mnist,
    text,
    wine,
)
from torchrelay.data.builtin import read_idx
from torchrelay.errors import RelayError, UsageError


def test_the_digits_are_1797_uint8_images_in_two_disjoint_parts():
    train, test = digits()
    assert (len(train), len(test)) == (1438, 359)
    assert train.inputs.dtype == torch.uint8
    assert train.inputs.shape[1:] == (1, 8, 8)
    assert train.classes == tuple("0123456789")
    assert (int(train.inputs.min()), int(train.inputs.max())) == (0, 255)
    images = {image.numpy().tobytes() for image in torch.cat([train.inputs, test.inputs])}
    assert len(images) == 1797


def test_the_digits_test_part_has_a_fifth_of_every_class():
    train, test = digits()
    everything = torch.bincount(train.targets) + torch.bincount(test.targets)
    assert torch.equal(torch.bincount(test.targets), (everything / 5).round().long())


def test_the_digits_split_depends_only_on_the_seed():
    assert digits()[0].fingerprint() == digits()[0].fingerprint()
    assert digits(seed=1)[0].fingerprint() != digits()[0].fingerprint()


@pytest.mark.parametrize(("read", "samples", "features", "classes"), [(breast_cancer, 569, 30, 2), (wine, 178, 13, 3)])
def test_table_features_are_standardized_by_the_training_part(read, samples, features, classes):
    train, test = read()
    assert len(train) + len(test) == samples
    assert train.inputs.shape[1:] == test.inputs.shape[1:] == (features,)
    assert len(train.classes) == classes
    torch.testing.assert_close(train.inputs.mean(0), torch.zeros(features), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.inputs.std(0, correction=0), torch.ones(features))
    assert test.inputs.mean(0).abs().max() > 1e-3


@pytest.mark.parametrize("read", [cifar10, cifar100])
def test_missing_cifar_files_give_one_line_with_the_remedy(read, tmp_path):
    with pytest.raises(RelayError, match=r"isn't in .*data\.download=true, or data\.root") as found:
        read(tmp_path)
    assert "\n" not in str(found.value)


def test_a_damaged_cifar_file_is_refused_before_it_is_unpickled(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, _ in torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list:
        (folder / name).write_bytes(b"no pickle")
    with pytest.raises(RelayError, match="damaged"):
        cifar10(tmp_path)


def test_cifar_files_with_the_right_checksums_are_read_as_channels_first(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = torch.randint(0, 256, (4, 3 * 32 * 32), dtype=torch.uint8)

    def write(name: str, content: object) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    batch = {"data": pixels.numpy(), "labels": [3, 1, 4, 1]}
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", write("data_batch_1", batch)]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", write("test_batch", batch)]])
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})

    train, test = cifar10(tmp_path)
    assert torch.equal(train.inputs, pixels.view(4, 3, 32, 32))
    assert train.targets.tolist() == [3, 1, 4, 1]
    assert train.classes == tuple("abcdefghij")
    assert train.mean is not None
    assert train.fingerprint() != test.fingerprint()


def test_text_targets_are_the_inputs_shifted_by_one(tmp_path):
    content = "".join(chr(97 + i * i % 26) for i in range(500)) + "é"
    (tmp_path / "a text.txt").write_text(content, encoding="utf-8")
    train, test = text(tmp_path / "a text.txt", length=7, test_share=0.2)
    shown = "".join(train.classes[i] for i in train.inputs.flatten())
    assert train.inputs.shape == train.targets.shape == (57, 7)
    assert content.startswith(shown)
    assert "".join(train.classes[i] for i in train.targets.flatten()) == content[1 : len(shown) + 1]
    assert content[401:].startswith("".join(test.classes[i] for i in test.inputs.flatten()))
    assert train.classes == tuple(sorted(set(content)))


def test_a_text_that_is_too_short_names_the_part_and_the_setting(tmp_path):
    (tmp_path / "t").write_text("abcdefgh" * 10)
    with pytest.raises(UsageError, match=r"its test part has 8 characters, too few for data\.length 8"):
        text(tmp_path / "t", length=8)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00\xd8"])
def test_a_file_that_is_not_text_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(UsageError, match="can't be read as text"):
        text(tmp_path / "t")


# ------------------------------------------------------------------------------------------------ MNIST and its kin


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("place", [".", "MNIST/raw"])
def test_images_and_labels_equal_those_of_the_files(tmp_path, compress, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    written = write_idx(tmp_path / place, compress=compress)
    for prefix, part in zip(("train", "t10k"), mnist(tmp_path), strict=True):
        assert part.inputs.dtype == torch.uint8
        assert np.array_equal(part.inputs[:, 0].numpy(), written[f"{prefix}-images-idx3-ubyte"])
        assert part.targets.tolist() == written[f"{prefix}-labels-idx1-ubyte"].tolist()
        assert part.classes == tuple("0123456789")


def test_a_recipe_loads_both_datasets_from_a_folder(tmp_path):
    write_idx(tmp_path)
    for name in ("mnist", "fashion-mnist"):
        parts = load(DataSettings(name=name, root=str(tmp_path)), seed=0)
        assert (parts.train.name, len(parts.train), len(parts.test)) == (name, 20, 10)
    assert fashion_mnist(tmp_path)[0].classes[9] == "ankle boot"


def test_a_missing_file_is_reported_with_the_remedy(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(RelayError, match=r"there is no t10k-labels-idx1-ubyte .*set data\.root to the folder"):
        mnist(tmp_path)


INTACT = idx(np.zeros((2, 3, 3)))


@pytest.mark.parametrize("content", [b"", INTACT[:3], INTACT[:9], INTACT[:-1], INTACT + b"0", b"\0\0\x0d" + INTACT[3:]])
def test_a_truncated_or_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(RelayError, match="isn't an idx file of bytes, or it is cut off"):
        read_idx(tmp_path / "file")


def test_a_damaged_compressed_file_is_refused(tmp_path):
    write_idx(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RelayError, match="can't be read"):
        mnist(tmp_path)


def test_a_compressed_file_that_expands_to_a_gigabyte_is_refused_at_its_head(tmp_path):
    head = bytes((0, 0, 8, 3)) + np.array((2**20, 32, 32), dtype=">u4").tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(head + bytes(10**6)))
    with pytest.raises(RelayError, match="expands to more than 768 MiB: decompress it, by gunzip"):
        read_idx(tmp_path / "x.gz")


def test_a_head_that_promises_more_than_there_is_allocates_nothing(tmp_path):
    (tmp_path / "x").write_bytes(bytes((0, 0, 8, 3)) + b"\xff" * 12 + b"abc")
    with pytest.raises(RelayError, match="cut off"):
        read_idx(tmp_path / "x")
