"""MNIST and Fashion-MNIST."""

import numpy as np
import pytest
import torch

from idx import idx, write_idx
from torchrelay.data import DataSettings, fashion_mnist, load, mnist
from torchrelay.data.idx import read_idx
from torchrelay.errors import RelayError


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
