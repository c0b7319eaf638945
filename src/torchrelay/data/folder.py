"""Step 2: folders of images, a folder a class."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from torchrelay.data.cache import Images, cached, default_folder, key_of
from torchrelay.data.sources import ArraySource, DatasetSource, Source, split
from torchrelay.errors import RelayError, UsageError

Log = Callable[[str], None]
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_TESTS = ("test", "val", "validation", "valid")
_CHUNK = 256  # images that one thread decodes before it takes the next


def is_image(path: Path) -> bool:
    """Return whether a path looks like an image that is not hidden."""
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def image_folder(
    root: str | Path,
    *,
    size: int | None = None,
    channels: Literal[1, 3] = 3,
    test_share: float = 0.2,
    seed: int = 0,
    transform: Callable[[Any], Tensor] | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    max_errors: int = 100,
    log: Log = print,
) -> tuple[Source, Source]:
    """Return the training and the test part of a folder of images.

    Either `root/train/CLASS/…` and `root/test/CLASS/…` (or `val`), or `root/CLASS/…`, of which a share is set apart.
    Images are decoded once, all to the same size, into an array in `cache_dir` that later runs map into memory.

    Args:
        root: the folder.
        size: pixels a side: the shorter side is resized to it and the middle cut out. Unset: all have one size already.
        channels: 3 for colour, 1 for grey; what is stored otherwise is converted.
        test_share: which share of each class is the test part, where the folder has none.
        seed: from which that choice follows.
        transform: a transform of your own from a PIL image to a tensor; then images are read one by one, by workers.
        cache: whether to keep the decoded images on the disk; otherwise in memory.
        cache_dir: where to; `~/.cache/torchrelay` if not given.
        on_error: what to do about an image that can't be read: stop, or leave it out.
        max_errors: how many may be left out.
        log: is told what was decoded and left out.

    Raises:
        UsageError: there is no such folder.
        RelayError: no images, an empty class, classes that differ, an image that can't be read; the text names it.
    """
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UsageError(f"data.root {root}: there is no such folder")

    def read(folder: Path, classes: tuple[str, ...] | None = None) -> Source:
        paths, labels, names = _scan(folder, classes)
        if transform is not None:
            return DatasetSource(_Files(paths, labels, transform), names, base.name)
        facts = [(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        shape = _common_shape(paths, size, channels)
        key = key_of([facts, shape, size, on_error])
        decode = partial(_fill, paths=paths, size=size, on_error=on_error, max_errors=max_errors, log=log)
        where = Path(cache_dir).expanduser() if cache_dir is not None else default_folder()
        images, missing = cached(where, key, shape, decode) if cache else _in_memory(shape, decode)
        if missing:
            log(f"{folder}: {len(missing)} images that can't be read are left out, the first is {paths[missing[0]]}")
        source = ArraySource(
            torch.from_numpy(images), torch.tensor(labels), names, base.name, paths=tuple(map(str, paths)), stamp=key
        )
        kept = torch.from_numpy(np.setdiff1d(np.arange(len(paths)), missing))
        return source.take(kept) if missing else source

    if not (base / "train").is_dir():
        whole = read(base)
        return (
            (split(whole, test_share, seed))
            if isinstance(whole, ArraySource)
            else _split_files(whole, test_share, seed)
        )
    test_folder = next((base / name for name in _TESTS if (base / name).is_dir()), None)
    if test_folder is None:
        raise RelayError(
            f"{base} has a folder 'train' but none named {', '.join(_TESTS)}: add one with the same classes"
        )
    train = read(base / "train")
    return train, read(test_folder, train.classes)


def decode_images(paths: Sequence[Path], shape: Sequence[int]) -> Tensor:
    """Return images as uint8 (images, channels, height, width) of a given (channels, height, width)."""
    channels, height, width = shape
    images = np.empty((len(paths), channels, height, width), dtype=np.uint8)
    for place, path in enumerate(paths):
        picture = _open(path)
        same = picture.size == (width, height)
        images[place] = _pixels(
            picture if same else ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR), channels
        )
    return torch.from_numpy(images)


def _scan(folder: Path, classes: tuple[str, ...] | None) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Return the images below a folder, their labels and the classes, in an order that only the names decide."""
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise RelayError(f"{folder} has no class folders in it: put each class's images into a folder of its own")
    if classes is not None and set(found) != set(classes):
        odd = sorted(set(found) ^ set(classes))[0]
        raise RelayError(
            f"{folder}: class '{odd}' is in only one of the training and the test part: both need the same classes"
        )
    paths, labels = [], []
    for label, name in enumerate(found):
        members = sorted((p for p in (folder / name).rglob("*") if is_image(p)), key=lambda p: p.as_posix())
        if not members:
            raise RelayError(f"{folder / name} has no images in it: add some, or remove the folder")
        paths += members
        labels += [label] * len(members)
    return paths, labels, tuple(found)


def _split_files(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Divide a source of files as `split` divides arrays."""
    files = source.dataset if isinstance(source, DatasetSource) else None
    assert isinstance(files, _Files)  # noqa: S101 - made by `image_folder`
    places = ArraySource(torch.arange(len(files)), torch.tensor(files.labels), source.classes, source.name)
    parts = [part.inputs.tolist() for part in split(places, share, seed) if isinstance(part, ArraySource)]
    rest, part = (
        DatasetSource(
            _Files([files.paths[i] for i in chosen], [files.labels[i] for i in chosen], files.transform),
            source.classes,
            source.name,
        )
        for chosen in parts
    )
    return rest, part


class _Files(Dataset[tuple[Tensor, int]]):
    """Images read one by one, for a transform of the user's."""

    def __init__(self, paths: list[Path], labels: list[int], transform: Callable[[Any], Tensor]) -> None:
        self.paths = paths
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(_open(self.paths[index]).convert("RGB")), self.labels[index]


# ------------------------------------------------------------------------------------------------ decoding


def _open(path: Path) -> Image.Image:
    """Return a picture, upright.

    Raises:
        RelayError: it can't be read; the text names it.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise RelayError(
            f"{path} can't be read as an image: {error}; repair or remove it, or set data.on_error=skip"
        ) from error


def _pixels(picture: Image.Image, channels: int) -> Images:
    """Return (channels, height, width) of a picture of any kind."""
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 or 32 bits a pixel
        values = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray((values / max(values.max(), 1) * 255).astype(np.uint8))
    if picture.mode in ("P", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":  # what is transparent is shown on white
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    array = np.asarray(picture.convert("RGB" if channels == 3 else "L"))
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _resized(picture: Image.Image, size: int | None) -> Image.Image:
    """Return a picture with its shorter side resized to `size` and the middle cut out."""
    if size is None or picture.size == (size, size):
        return picture
    return ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)


def _common_shape(paths: Sequence[Path], size: int | None, channels: int) -> tuple[int, int, int, int]:
    if size is not None:
        return (len(paths), channels, size, size)
    for path in paths:
        try:
            width, height = _open(path).size
        except RelayError:
            continue  # an image that can't be read has no size; decoding names it or leaves it out
        return (len(paths), channels, height, width)
    raise RelayError(f"none of the {len(paths)} images can be read, beginning with {paths[0]}")


def _fill(
    images: Images, *, paths: Sequence[Path], size: int | None, on_error: str, max_errors: int, log: Log
) -> list[int]:
    """Decode all files into `images`; return the places of those that can't be read."""
    log(f"decoding {len(paths):,} images, once")

    def decode(places: Iterable[int]) -> list[int]:
        missing = []
        for place in places:
            try:
                _decode_into(images[place], paths[place], paths[0], size)
            except RelayError as error:
                if on_error == "stop" or isinstance(error, UsageError):
                    raise
                missing.append(place)
        return missing

    chunks = [range(start, min(start + _CHUNK, len(paths))) for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL lets other threads run while it decodes
        missing = [place for part in pool.map(decode, chunks) for place in part]
    if len(missing) > max_errors:
        raise RelayError(
            f"{len(missing)} images can't be read, more than the {max_errors} allowed, beginning with {paths[missing[0]]}"
        )
    return missing


def _decode_into(image: Images, path: Path, first: Path, size: int | None) -> None:
    pixels = _pixels(_resized(_open(path), size), image.shape[0])
    if pixels.shape != image.shape:
        raise UsageError(
            f"{path} has {pixels.shape[2]}x{pixels.shape[1]} pixels, {first} has {image.shape[2]}x{image.shape[1]}: "
            "set data.size to the pixels a side that all shall have"
        )
    image[...] = pixels


def _in_memory(shape: tuple[int, ...], fill: Callable[[Images], list[int]]) -> tuple[Images, list[int]]:
    images = np.zeros(shape, dtype=np.uint8)
    return images, fill(images)
