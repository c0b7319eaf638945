"""Step 2: data sets that have a name: digits, CIFAR-10 and CIFAR-100, and texts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrelay.data.sources import ArraySource, arrays, split
from torchrelay.errors import RelayError, UsageError

# As the reference normalises (the deviations are means over images of each image's, and smaller than the pixels').
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_GREY_LEVELS = 16  # of scikit-learn's digits: 0 to 16


def digits(test_share: float = 0.2, seed: int = 0) -> tuple[ArraySource, ArraySource]:
    """Return scikit-learn's 1,797 handwritten digits, uint8 (samples, 1, 8, 8), as training and test part.

    Args:
        test_share: of each class.
        seed: from which the choice follows.

    Raises:
        RelayError: scikit-learn isn't installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RelayError(
            "the digits come with scikit-learn, which isn't installed: pip install 'torchrelay[digits]'"
        ) from None
    found = load_digits()
    images = np.round(found.images * (255 / _GREY_LEVELS)).astype(np.uint8)[:, None]
    whole = arrays(images, found.target, tuple("0123456789"), "digits")
    rest, part = split(whole, test_share, seed)
    assert isinstance(rest, ArraySource)  # noqa: S101 - a part of arrays is arrays
    assert isinstance(part, ArraySource)  # noqa: S101
    return rest, part


def cifar10(root: str | Path, download: bool = False) -> tuple[ArraySource, ArraySource]:
    """Return CIFAR-10, uint8 (50,000 and 10,000, 3, 32, 32), as training and test part.

    Args:
        root: the folder in which torchvision keeps `cifar-10-batches-py`.
        download: fetch it if it isn't there.

    Raises:
        RelayError: it isn't there, or its files don't have the published checksums.
    """
    return _cifar("CIFAR10", "cifar10", root, download)


def cifar100(root: str | Path, download: bool = False) -> tuple[ArraySource, ArraySource]:
    """Return CIFAR-100, as `cifar10` does."""
    return _cifar("CIFAR100", "cifar100", root, download)


def _cifar(kind: str, name: str, root: str | Path, download: bool) -> tuple[ArraySource, ArraySource]:
    import torchvision

    def read(train: bool) -> ArraySource:
        try:
            found: Any = getattr(torchvision.datasets, kind)(Path(root).expanduser(), train=train, download=download)
        except RuntimeError as error:
            remedy = "check the connection" if download else "set data.download=true, or data.root to where it is"
            raise RelayError(f"{kind} isn't in {root}, or its files are damaged: {remedy}") from error
        except OSError as error:
            raise RelayError(
                f"{kind} can't be fetched to {root}: {error}; put torchvision's files there by hand"
            ) from None
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        stamp = f"{name}/{'train' if train else 'test'}"  # torchvision has compared the files' checksums
        return ArraySource(
            images, torch.tensor(found.targets), tuple(found.classes), name, CIFAR_MEAN, CIFAR_STD, stamp=stamp
        )

    return read(True), read(False)


def text(source: str | Path, length: int = 64, test_share: float = 0.1) -> tuple[ArraySource, ArraySource]:
    """Return a text for a character language model: windows of characters, and the same moved on by one.

    Args:
        source: the path of a text file.
        length: characters of a window; the windows don't overlap.
        test_share: of the text, its end.

    Returns:
        Training and test part: int64 inputs and targets (windows, length); `classes` are the characters.

    Raises:
        UsageError: there is no such file, or it is too short.
    """
    try:
        content = Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data.root {source} can't be read as a text: {error}") from None
    characters = tuple(sorted(set(content)))
    number = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in content])
    cut = round(len(tokens) * (1 - test_share))

    def windows(part: torch.Tensor, name: str) -> ArraySource:
        count = (len(part) - 1) // length
        if count < 1:
            raise UsageError(f"{source}: its {name} part has {len(part)} characters, too few for data.length {length}")
        inputs, targets = part[: count * length], part[1 : count * length + 1]
        return ArraySource(inputs.view(count, length), targets.view(count, length), characters, Path(source).stem)

    return windows(tokens[:cut], "training"), windows(tokens[cut:], "test")
