"""Step 2: the recipe's settings of the data, and loading the data that they name."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, model_validator

from torchrelay.data.accept import as_source
from torchrelay.data.augment.pipeline import Augment, Prepare
from torchrelay.data.builtin import breast_cancer, cifar10, cifar100, digits, fashion_mnist, mnist, text, wine
from torchrelay.data.folder import image_parts
from torchrelay.data.sources import ArraySource, Parts, split
from torchrelay.errors import UsageError, nearest
from torchrelay.settings import Settings

Log = Callable[[str], None]


# The data that comes in one part.
_SPLIT = {"digits": digits, "breast-cancer": breast_cancer, "wine": wine}
# The keys that only some data uses; a function in --code uses its options alone.
_USED = {
    **{key: {"test_share"} for key in _SPLIT},
    "mnist": {"root"},
    "fashion-mnist": {"root"},
    "cifar10": {"root", "download"},
    "cifar100": {"root", "download"},
    "text": {"root", "length", "test_share"},
    "image-folder": {"root", "test_share", "size", "channels", "cache", "cache_dir", "on_error", "max_errors"},
}


class DataSettings(Settings):
    """The samples, their batches and their augmentation."""

    name: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100, image-folder, text, breast-cancer, wine; or one in --code."""
    root: str | None = None
    """The folder (or the text file) that contains the data."""
    download: bool = False
    """Download the dataset if the folder doesn't contain it (cifar10, cifar100)."""
    batch_size: int = Field(default=256, ge=1)
    """Samples in a global batch, whatever the number of devices."""
    workers: int = Field(default=0, ge=0)
    """Processes that read a torch Dataset sample by sample; arrays are read in batches and need none."""
    sampling: Literal["shuffle", "balanced", "sequential"] = "shuffle"
    """shuffle: each sample once per epoch; balanced: each class equally often; sequential: in the data's order."""
    drop_last: bool = False
    """Leave out the last batch of an epoch if it is smaller."""
    test_share: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The test part's share of the samples, if the data has no test part: digits, tables, image-folder, text."""
    validation: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training samples that select "best" and stop early; 0: an image folder's `val`, or the test part."""
    size: int | None = Field(default=None, ge=1)
    """Height and width to which an image folder is decoded, in pixels; unset: its images already have one size."""
    channels: Literal[1, 3] = 3
    """Channels of an image folder: color (3) or grayscale (1)."""
    length: int = Field(default=64, ge=1)
    """Characters in a window of a text."""
    prepare: list[Prepare] = Field(default_factory=list)
    """Transforms of training and test images, such as [{name = "resize", size = 112}]; they come first."""
    augment: list[Augment] = Field(default_factory=list)
    """Transforms of training images, such as ["flip", {name = "crop", padding = 4}]."""
    normalize: bool = True
    """Normalize each channel by its mean and standard deviation."""
    mean: list[float] | None = None
    """The channels' means, of images in [0, 1]; unset: the published ones, or those of the training data."""
    std: list[float] | None = None
    """The channels' standard deviations, likewise."""
    cache: bool = True
    """Keep a decoded image folder on disk for later runs; one cache for each folder, size and number of channels."""
    cache_dir: str | None = None
    """The folder of the caches; unset: ~/.cache/torchrelay."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with an image that can't be read."""
    max_errors: int = Field(default=100, ge=0)
    """The number of images that may be skipped."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a function in --code."""

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std go together: set both or none")
        return self

    def without_effect(self) -> list[str]:
        """Return the keys that were set and that this data doesn't use, such as "data.size" of the digits."""
        used = _USED.get(self.name, {"options"})
        fields = type(self).model_fields
        return [
            f"data.{key}"
            for key in sorted(set().union({"options"}, *_USED.values()) - used)
            if getattr(self, key) != fields[key].get_default(call_default_factory=True)
        ]


def load(settings: DataSettings, seed: int, code: ModuleType | None = None, log: Log = print) -> Parts:
    """Load the data of a recipe.

    Args:
        settings: the recipe's settings of the data.
        seed: the run's seed, which determines the validation and test samples.
        code: the user's own file, in which the name is looked up first.
        log: called with a line about the images that were decoded or left out.

    Raises:
        UsageError: the name is unknown, or it needs a root.
        RelayError: the data is damaged; the text says where.
    """
    parts = _load(settings, seed, code, log)
    train, test, validation = parts.train, parts.test, parts.validation
    if settings.mean is not None and settings.std is not None:
        if not isinstance(train, ArraySource):
            raise UsageError(
                f"data.mean is for images in arrays, and {train.name} is read sample by sample: normalize there"
            )
        train = replace(train, mean=tuple(settings.mean), std=tuple(settings.std))
    if settings.validation:
        if validation is not None:
            raise UsageError(
                f"data.validation={settings.validation:g} divides the training data, but {settings.root} has a folder "
                "for validation: leave out data.validation"
            )
        train, validation = split(train, settings.validation, seed)
    return Parts(train, test, validation)


def _load(settings: DataSettings, seed: int, code: ModuleType | None, log: Log) -> Parts:
    function: Any = getattr(code, settings.name, None)
    if code is not None and _is_own(function, code):
        return _call(function, settings)
    if (shuffled := _SPLIT.get(settings.name)) is not None:
        return Parts(*shuffled(settings.test_share, seed))
    match settings.name:
        case "mnist" | "fashion-mnist" as name:
            return Parts(*(mnist if name == "mnist" else fashion_mnist)(_root(settings)))
        case "cifar10" | "cifar100" as name:
            return Parts(*(cifar10 if name == "cifar10" else cifar100)(_root(settings), settings.download))
        case "text":
            return Parts(*text(_root(settings), settings.length, settings.test_share))
        case "image-folder":
            return image_parts(
                _root(settings),
                size=settings.size,
                channels=settings.channels,
                test_share=settings.test_share,
                seed=seed,
                cache=settings.cache,
                cache_dir=settings.cache_dir,
                on_error=settings.on_error,
                max_errors=settings.max_errors,
                log=log,
            )
    own = [key for key, value in vars(code).items() if _is_own(value, code)] if code else []
    known = (*own, *_USED)
    raise UsageError(
        f"data.name '{settings.name}' is unknown{nearest(settings.name, known) or '; known: ' + ', '.join(known)}"
    )


def _is_own(value: Any, code: ModuleType) -> bool:
    """Return whether the user's file defines this function; one that it only imports isn't meant."""
    return inspect.isfunction(value) and value.__module__ == code.__name__


def _call(function: Callable[..., Any], settings: DataSettings) -> Parts:
    """Return what a function in --code returns, as sources."""
    try:
        inspect.signature(function).bind(**settings.options)
    except TypeError as error:
        raise UsageError(f"data.options don't match '{settings.name}' in --code: {error}") from None
    parts = function(**settings.options)
    if not isinstance(parts, tuple | list) or len(parts) != 2:
        raise UsageError(f"data.name '{settings.name}': the function in --code must return a pair (train, test)")
    train, test = parts
    return Parts(as_source(train), None if test is None else as_source(test))


def _root(settings: DataSettings) -> Path:
    if settings.root is None:
        what = {"text": "a text file, such as --set data.root=book.txt"}.get(
            settings.name, f"the folder of {settings.name}, such as --set data.root=data"
        )
        raise UsageError(f"data.root isn't set: set it to {what}")
    if "://" in settings.root:
        raise UsageError(f"data.root {settings.root} is an address: download the data, and set data.root to its path")
    return Path(settings.root)
