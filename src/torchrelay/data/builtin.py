"""Step 2: the built-in datasets: digits and tables of scikit-learn, CIFAR, MNIST and its kin, and text files."""

import gzip
import socket
import zlib
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrelay.data.image_files import SUFFIXES
from torchrelay.data.sources import ArraySource, arrays, split
from torchrelay.errors import RelayError, UsageError

# A character takes eight bytes of memory, and some more while the text is read.
_LARGEST_TEXT = 1_000_000_000
# The reference recipe's. Its deviations are averaged over the images' own, so they are below those of all pixels.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_SILENCE = 30.0  # seconds without data after which a download has failed
_BRIGHTEST = 16  # the largest pixel value of scikit-learn's digits


def digits(test_share: float = 0.2, seed: int = 0) -> tuple[ArraySource, ArraySource]:
    """Return the training and test part of scikit-learn's 1,797 handwritten digits, uint8 (samples, 1, 8, 8).

    Args:
        test_share: the test part's share of each class.
        seed: determines the test samples.

    Raises:
        RelayError: scikit-learn isn't installed.
    """
    data = _from_scikit_learn("digits")
    images = np.round(data.images * (255 / _BRIGHTEST)).astype(np.uint8)[:, None]
    return split(arrays(images, data.target, tuple("0123456789"), "digits"), test_share, seed)


def breast_cancer(test_share: float = 0.2, seed: int = 0) -> tuple[ArraySource, ArraySource]:
    """Return the training and test part of scikit-learn's table of 569 tumors: 30 features, 2 classes.

    The features are float32, shifted and scaled to a mean of 0 and a deviation of 1 in the training part.

    Args:
        test_share: the test part's share of each class.
        seed: determines the test samples.

    Raises:
        RelayError: scikit-learn isn't installed.
    """
    return _table("breast_cancer", test_share, seed)


def wine(test_share: float = 0.2, seed: int = 0) -> tuple[ArraySource, ArraySource]:
    """Return the training and test part of scikit-learn's table of 178 wines: 13 features, 3 classes.

    See `breast_cancer`.
    """
    return _table("wine", test_share, seed)


def _table(name: str, test_share: float, seed: int) -> tuple[ArraySource, ArraySource]:
    data = _from_scikit_learn(name)
    classes = tuple(str(each) for each in data.target_names)
    parts = split(arrays(data.data, data.target, classes, name.replace("_", "-")), test_share, seed)
    features = parts[0].inputs.numpy().astype(np.float64)
    mean, deviation = features.mean(0), features.std(0)

    def standardized(part: ArraySource) -> ArraySource:
        return replace(part, inputs=torch.from_numpy((part.inputs.numpy() - mean) / deviation).float())

    return standardized(parts[0]), standardized(parts[1])


def _from_scikit_learn(name: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError:
        raise RelayError(
            f"data '{name}' comes with scikit-learn, which isn't installed: pip install 'torchrelay[digits]'"
        ) from None
    return getattr(datasets, f"load_{name}")()


def cifar10(root: str | Path, download: bool = False) -> tuple[ArraySource, ArraySource]:
    """Return the training and test part of CIFAR-10, uint8 (50,000 and 10,000, 3, 32, 32).

    Args:
        root: the folder that contains torchvision's `cifar-10-batches-py`.
        download: download it if the folder doesn't contain it.

    Raises:
        RelayError: the folder doesn't contain it, or its files don't have the published checksums.
    """
    return _cifar("CIFAR10", "cifar10", root, download)


def cifar100(root: str | Path, download: bool = False) -> tuple[ArraySource, ArraySource]:
    """Return the training and test part of CIFAR-100; see `cifar10`."""
    return _cifar("CIFAR100", "cifar100", root, download)


def _cifar(kind: str, name: str, root: str | Path, download: bool) -> tuple[ArraySource, ArraySource]:
    import torchvision

    folder = Path(root).expanduser()
    if _holds_pictures(folder) and not (folder / getattr(torchvision.datasets, kind).base_folder).is_dir():
        raise UsageError(
            f"data.root {root} holds pictures, and not {kind}'s files: to train on them, add "
            "--set data.name=image-folder"
        )
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE)  # torchvision sets none and would wait forever

    def read(train: bool) -> ArraySource:
        try:
            data: Any = getattr(torchvision.datasets, kind)(folder, train=train, download=download)
        except RuntimeError as error:
            remedy = "check the connection" if download else "set data.download=true, or data.root to its folder"
            raise RelayError(f"{kind} isn't in {root}, or its files are damaged: {remedy}") from error
        except OSError as error:
            raise RelayError(
                f"{kind} can't be downloaded to {root}: {error}; copy torchvision's files there yourself"
            ) from None
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        stamp = f"{name}/{'train' if train else 'test'}"  # is enough, as torchvision has checked the files' checksums
        return ArraySource(
            images, torch.tensor(data.targets), tuple(data.classes), name, CIFAR_MEAN, CIFAR_STD, stamp=stamp
        )

    try:
        return read(True), read(False)
    finally:
        socket.setdefaulttimeout(patience)


def _holds_pictures(folder: Path) -> bool:
    """Return whether a folder has pictures in the folders below it, as an image folder has."""
    return any(path.suffix.lower() in SUFFIXES for depth in ("*/*", "*/*/*") for path in folder.glob(depth))


def text(source: str | Path, length: int = 64, test_share: float = 0.1) -> tuple[ArraySource, ArraySource]:
    """Return a text for a character language model: windows of characters, and the same windows shifted by one.

    Args:
        source: the path of a text file.
        length: characters in a window; the windows don't overlap.
        test_share: the test part's share of the text, taken from its end.

    Returns:
        Training and test part: int64 inputs and targets (windows, length); `classes` are the characters.

    Raises:
        UsageError: the file can't be read, or it is too short.
    """
    path = Path(source).expanduser()
    try:
        if (size := path.stat().st_size) > _LARGEST_TEXT:
            raise UsageError(
                f"data.root {source} has {size:,} bytes, and a text of at most {_LARGEST_TEXT:,} is held in memory: "
                "give a part of it, or read it by an IterableDataset in --code"
            )
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"data.root {source} can't be read as text ({cause}): give a text file in UTF-8") from None
    characters = tuple(sorted(set(content)))
    index = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([index[character] for character in content])
    cut = round(len(tokens) * (1 - test_share))

    def windows(part: torch.Tensor, name: str) -> ArraySource:
        count = (len(part) - 1) // length
        if count < 1:
            raise UsageError(f"{source}: its {name} part has {len(part)} characters, too few for data.length {length}")
        inputs, targets = part[: count * length], part[1 : count * length + 1]
        return ArraySource(inputs.view(count, length), targets.view(count, length), characters, Path(source).stem)

    return windows(tokens[:cut], "training"), windows(tokens[cut:], "test")


# ------------------------------------------------------------------------------------------------ MNIST and its kin

_UINT8 = 0x08
_LARGEST_IDX = 3 * 2**28  # bytes that a compressed file may expand to
_FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def mnist(
    root: str | Path, classes: Sequence[str] = tuple("0123456789"), name: str = "mnist"
) -> tuple[ArraySource, ArraySource]:
    """Return the training and test part of MNIST, uint8 (60,000 and 10,000, 1, 28, 28), or of a dataset in its form.

    Args:
        root: the folder of the four files, such as `train-images-idx3-ubyte` or `train-images-idx3-ubyte.gz`; or that
            for which torchvision downloaded them.
        classes: names of the classes.
        name: the source's name.

    Raises:
        RelayError: a file is missing or damaged; the text names it.
    """

    def part(prefix: str) -> ArraySource:
        images = read_idx(_find(root, f"{prefix}-images-idx3-ubyte"))
        labels = read_idx(_find(root, f"{prefix}-labels-idx1-ubyte"))
        return arrays(images[:, None], labels.long(), classes, name)

    return part("train"), part("t10k")


def fashion_mnist(root: str | Path) -> tuple[ArraySource, ArraySource]:
    """Return the training and test part of Fashion-MNIST (Xiao et al., 2017); see `mnist`."""
    return mnist(root, _FASHION, "fashion-mnist")


def read_idx(path: Path) -> Tensor:
    """Return the content of an idx file of bytes as uint8.

    Raises:
        RelayError: the file isn't one.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            sizes = file.read(4 * head[3]) if len(head) == 4 else b""
            shape = np.frombuffer(sizes, dtype=">u4").tolist() if sizes and len(sizes) == 4 * head[3] else []
            if path.suffix == ".gz" and prod(shape) > _LARGEST_IDX:
                raise RelayError(f"{path} expands to more than {_LARGEST_IDX // 2**20} MiB: decompress it, by gunzip")
            content = bytearray()  # which grows by what there is, whatever the head says
            while len(content) <= prod(shape) and (chunk := file.read(2**20)):
                content += chunk
    except (EOFError, OSError, zlib.error) as error:
        raise RelayError(f"{path} can't be read: {error}; copy it again") from None
    if head[:3] != bytes((0, 0, _UINT8)) or not shape or len(content) != prod(shape) or not content:
        raise RelayError(f"{path} isn't an idx file of bytes, or it is cut off: copy it again")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)


def _find(root: str | Path, name: str) -> Path:
    folder = Path(root).expanduser()
    for place in (folder, *sorted(folder.glob("*/raw"))):
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise RelayError(f"there is no {name} and no {name}.gz in {root}: set data.root to the folder of the four files")
