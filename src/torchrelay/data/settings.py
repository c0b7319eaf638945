"""Step 2: what a recipe says of the data, and loading it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, model_validator

from torchrelay.data.augment.pipeline import Augment, Prepare
from torchrelay.data.builtin import cifar10, cifar100, digits, text
from torchrelay.data.folder import image_folder
from torchrelay.data.sources import ArraySource, Source, as_source, split
from torchrelay.errors import UsageError, nearest
from torchrelay.settings import Settings

Log = Callable[[str], None]


class DataSettings(Settings):
    """Which samples, in which batches, how augmented."""

    name: str = "digits"
    """digits, cifar10, cifar100, image-folder, text, or a function in --code that returns (train, test)."""
    root: str | None = None
    """The folder (or the text file) where the data is."""
    download: bool = False
    """Fetch what isn't there (cifar10, cifar100)."""
    batch_size: int = Field(default=256, ge=1)
    """Samples of a global batch, whatever the number of devices."""
    workers: int = Field(default=0, ge=0)
    """Processes that read a torch Dataset sample by sample; arrays are read in batches and need none."""
    sampling: Literal["shuffle", "balanced", "sequential"] = "shuffle"
    """shuffle: each sample once an epoch; balanced: each class as often; sequential: as they stand."""
    drop_last: bool = False
    """Leave out an epoch's last batch where it is smaller."""
    test_share: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share of the samples that is the test part, where the data has none (digits, image-folder, text)."""
    validation: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training samples set apart, by which "best" and early stopping go; 0: by the test part."""
    size: int | None = Field(default=None, ge=1)
    """Pixels a side to which an image folder is decoded; unset: its images have one size."""
    channels: Literal[1, 3] = 3
    """Colour (3) or grey (1) of an image folder."""
    length: int = Field(default=64, ge=1)
    """Characters of a window of a text."""
    prepare: list[Prepare] = Field(default_factory=list)
    """What training and test images alike go through first, such as [{name = "resize", size = 112}]."""
    augment: list[Augment] = Field(default_factory=list)
    """What training images go through, such as ["flip", {name = "crop", padding = 4}]."""
    normalize: bool = True
    """Shift and scale each channel by its mean and deviation."""
    mean: list[float] | None = None
    """The channels' means, of images in [0, 1]; unset: those published, or those of the training data."""
    std: list[float] | None = None
    """The channels' deviations, likewise."""
    cache: bool = True
    """Keep a decoded image folder on the disk, for all later runs; one cache a folder, size and number of channels."""
    cache_dir: str | None = None
    """Where to keep it; unset: ~/.cache/torchrelay."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about an image that can't be read."""
    max_errors: int = Field(default=100, ge=0)
    """How many images may be skipped."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of a function in --code."""

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        if (self.mean is None) != (self.std is None):
            raise ValueError("data.mean and data.std go together: set both or none")
        return self


@dataclass(frozen=True)
class Parts:
    """The data of a run."""

    train: Source
    test: Source | None
    validation: Source | None = None


def load(settings: DataSettings, seed: int, code: ModuleType | None = None, log: Log = print) -> Parts:
    """Load the data of a recipe.

    Args:
        settings: what the recipe says of it.
        seed: the run's, from which follows what is set apart.
        code: the user's own file, in which the name is looked up first.
        log: is told what was decoded and left out.

    Raises:
        UsageError: there is no such data, or it needs a root.
        RelayError: it is damaged; the text says where.
    """
    train, test = _load(settings, seed, code, log)
    if settings.mean is not None and settings.std is not None:
        if not isinstance(train, ArraySource):
            raise UsageError(f"data.mean is for images in arrays, and {train.name} is read one by one: normalize in it")
        train = replace(train, mean=tuple(settings.mean), std=tuple(settings.std))
    validation = None
    if settings.validation:
        train, validation = split(train, settings.validation, seed)
    return Parts(train, test, validation)


def _load(settings: DataSettings, seed: int, code: ModuleType | None, log: Log) -> tuple[Source, Source | None]:
    own = getattr(code, settings.name, None)
    if code is not None and inspect.isfunction(own) and own.__module__ == code.__name__:  # not what the file imports
        try:
            inspect.signature(own).bind(**settings.options)
        except TypeError as error:
            raise UsageError(f"data.options don't fit '{settings.name}' in --code: {error}") from None
        found = own(**settings.options)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise UsageError(f"data.name '{settings.name}': the function in --code must return a pair (train, test)")
        return as_source(found[0]), None if found[1] is None else as_source(found[1])
    match settings.name:
        case "digits":
            return digits(settings.test_share, seed)
        case "cifar10":
            return cifar10(_root(settings), settings.download)
        case "cifar100":
            return cifar100(_root(settings), settings.download)
        case "text":
            return text(_root(settings), settings.length, settings.test_share)
        case "image-folder":
            return image_folder(
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
    known = ("digits", "cifar10", "cifar100", "image-folder", "text")
    raise UsageError(
        f"data.name '{settings.name}' is unknown{nearest(settings.name, known) or '; known: ' + ', '.join(known)}"
    )


def _root(settings: DataSettings) -> Path:
    if settings.root is None:
        raise UsageError(f"data.root isn't set: say where {settings.name} is, such as --set data.root=data")
    return Path(settings.root)
