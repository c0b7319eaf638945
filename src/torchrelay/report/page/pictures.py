"""The samples themselves, read through the run's recipe: thumbnails of some, and how bright and large each image is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchrelay.data.sources import ArraySource, DatasetSource, Source
from torchrelay.data.stream import StreamSource
from torchrelay.errors import RelayError, UsageError
from torchrelay.recipe import recipe as recipes
from torchrelay.recipe.build import load_data
from torchrelay.report.page.facts import Column, Facts
from torchrelay.report.page.jpeg import address

_SMALLEST, _LARGEST = 72, 160  # pixels of a thumbnail's longer side
_MOST_FILES = 20_000  # whose size is read
_CHUNK = 1024


@dataclass(frozen=True)
class Pictures:
    """What the data adds to a page."""

    thumbnails: dict[int, str] = field(default_factory=dict)  # by the sample's index; addresses that hold the picture
    traits: dict[str, Column] = field(default_factory=dict)  # by name, a number of each sample
    missing: str = ""  # why the data can't be read


def read_pictures(facts: Facts, wanted: Sequence[int], code: ModuleType | None = None) -> Pictures:
    """Read the data of the run's last evaluation, as the recipe says.

    Args:
        facts: of the run, with samples.
        wanted: the indices of the samples whose thumbnails are made.
        code: a module of the user's own, in which the recipe's names are looked up first.
    """
    if facts.from_python:
        return Pictures(missing="the run was started from Python, so its data isn't known here")
    if "code" in facts.record.get("environment", {}) and code is None:
        return Pictures(missing="the run was started with a file of code: give it by --code")
    try:
        recipe = recipes.load(str(facts.folder / "recipe.toml"))
        source: Source | None = getattr(load_data(recipe, code, False, lambda _: None), facts.about["split"], None)
        if source is None or isinstance(source, StreamSource):
            return Pictures(missing="a stream's samples can't be read alone" if source else "the data isn't the run's")
        if len(source) <= int(facts.samples["index"].max()):
            return Pictures(missing="there is less data than the run had")
        made = {index: thumbnail(image) for index in wanted if (image := _image(source, index)) is not None}
        return Pictures(made, _traits(source, facts.samples["index"]))
    except (RelayError, UsageError, OSError, ImportError) as error:
        return Pictures(missing=f"the data can't be read: {error}")


def _image(source: Source, index: int) -> Tensor | None:
    """Return a sample's image (channels, height, width); None if it is none."""
    image: Any = None
    if isinstance(source, ArraySource):
        image = source.inputs[index]
    elif isinstance(source, DatasetSource):
        sample = source.dataset[index]
        image = sample[0] if isinstance(sample, list | tuple) else None
    is_image = isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] in (1, 3)
    return image if is_image else None


def _traits(source: Source, index: Column) -> dict[str, Column]:
    found = dict[str, Column]()
    if isinstance(source, ArraySource) and source.inputs.ndim == 4 and source.inputs.dtype == torch.uint8:
        parts = torch.split(torch.from_numpy(index), _CHUNK)
        found["brightness"] = torch.cat([source.inputs[each].float().mean((1, 2, 3)) / 255 for each in parts]).numpy()
    files = getattr(source, "files", None)
    if files is not None and len(index) <= _MOST_FILES:
        sides = []
        for path in (files.paths[i] for i in index.tolist()):
            with Image.open(path) as image:  # which reads its header
                sides.append(max(image.size))
        found["longer side in pixels"] = np.array(sides)
    return found


def thumbnail(image: Tensor) -> str:
    """Return a small JPEG of an image as an address; few pixels are enlarged without smoothing."""
    values = image.detach().float()
    if image.dtype != torch.uint8:
        low, high = values.min(), values.max()
        inside = low >= 0 and high <= 1
        values = 255 * (values if inside else (values - low) / (high - low).clamp(min=1e-12))
    pixels = values.round().clamp(0, 255).to(torch.uint8).movedim(0, -1).squeeze(-1).numpy()
    picture, longer = Image.fromarray(pixels), max(pixels.shape[:2])
    if longer < _SMALLEST:
        times = -(-_SMALLEST // longer)
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    picture.thumbnail((_LARGEST, _LARGEST))
    return address(picture)
