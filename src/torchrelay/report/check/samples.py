"""The data of a recipe as arrays, also where a training would stop at it: then the error is a finding."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from torchrelay.data.folder import decoder
from torchrelay.data.listing import Found, find
from torchrelay.data.settings import DataSettings, load
from torchrelay.data.sources import ArraySource, DatasetSource, Parts, Source, split
from torchrelay.errors import RelayError
from torchrelay.recipe.recipe import Recipe

_SIZE = 64  # pixels to which images are decoded that a training wouldn't decode
_MOST = 2**32  # bytes that the samples of a dataset may take


@dataclass(frozen=True)
class Samples:
    """The data of a recipe.

    Args:
        parts: by name, the training part first.
        stops: the error with which a training would stop; "" if it wouldn't.
        unreadable: the image files that can't be decoded.
    """

    parts: dict[str, ArraySource]
    stops: str = ""
    unreadable: tuple[str, ...] = ()


def read(recipe: Recipe, code: ModuleType | None, say: Callable[[str], None]) -> Samples:
    """Read the data of a recipe.

    Args:
        recipe: all parameters.
        code: the user's own file.
        say: called with the lines that a training says of its data.

    Raises:
        RelayError: there is nothing to look at.
    """
    is_folder = recipe.data.name == "image-folder" and recipe.data.root is not None
    try:
        parts, stops = _named(load(recipe.data, recipe.run.seed, code, say)), ""
    except RelayError as error:
        if not is_folder:
            raise
        parts, stops = _despite(error, recipe.data, recipe.run.seed, say), str(error)
    if not is_folder:
        return Samples(parts)
    there = {path for listing in _found(recipe.data).parts.values() for path in listing.paths}
    kept = {path for part in parts.values() for path in (part.files.paths if part.files else ())}
    return Samples(parts, stops, tuple(sorted(there - kept)))


def _named(parts: Parts) -> dict[str, ArraySource]:
    named = {"train": parts.train, "validation": parts.validation, "test": parts.test}
    return {name: in_memory(source) for name, source in named.items() if source is not None}


def _found(settings: DataSettings) -> Found:
    return find(Path(settings.root or "").expanduser())


def _despite(
    error: RelayError, settings: DataSettings, seed: int, say: Callable[[str], None]
) -> dict[str, ArraySource]:
    """Decode what can be decoded of an image folder, in memory: the caches stay as a training would leave them."""
    found = _found(settings)
    if "train" not in found.parts and "all" not in found.parts:
        raise error
    classes = sorted({name for listing in found.parts.values() for name in listing.classes})
    size, files = settings.size or _SIZE, sum(len(listing.files) for listing in found.parts.values())
    decode = decoder((size, size), settings.channels, False, None, "skip", files, say)
    decoded = {name: decode(listing.of(classes)) for name, listing in found.parts.items()}
    if "all" in decoded:
        train, test = split(decoded["all"], settings.test_share, seed)
        return {"train": train, "test": test}
    return {name: decoded[name] for name in ("train", "validation", "test") if name in decoded}


def in_memory(source: Source) -> ArraySource:
    """Return a source's samples as arrays.

    Raises:
        RelayError: they are a stream, have several forms, or take too much memory.
    """
    if isinstance(source, ArraySource):
        return source
    if not isinstance(source, DatasetSource):
        raise RelayError(f"{source.name} is a stream, whose samples come once: check the files that it is made of")
    inputs, targets = [], []
    for index in range(len(source)):
        sample = source.dataset[index]
        pair = sample if isinstance(sample, tuple | list) and len(sample) == 2 else (None, None)
        if not isinstance(pair[0], torch.Tensor) or not isinstance(pair[1], torch.Tensor | int | float):
            raise RelayError(f"{source.name}: sample {index} isn't a tensor with a target: check its parts as arrays")
        inputs.append(pair[0])
        targets.append(torch.as_tensor(pair[1]))
        if inputs[0].shape != inputs[-1].shape or targets[0].shape != targets[-1].shape:
            raise RelayError(f"{source.name}: sample {index} has another shape than sample 0, and only one is compared")
        if inputs[0].nbytes * len(inputs) > _MOST:
            raise RelayError(f"{source.name} takes more than {_MOST // 2**30} GiB of memory: check a part of it")
    return ArraySource(torch.stack(inputs), torch.stack(targets), source.classes, source.name, files=source.files)
