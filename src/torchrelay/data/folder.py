"""Step 2: folders of images, a folder a class."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchrelay.data.cache import Images, cached, default_folder, in_memory, key_of
from torchrelay.data.files import Files
from torchrelay.data.image_files import (
    FITTING,
    UnreadableImageError,
    channels_first,
    fitted,
    open_image,
    out_of_reach,
    read_pixels,
)
from torchrelay.data.sources import ArraySource, DatasetSource, Source, split
from torchrelay.errors import RelayError, UsageError

Log = Callable[[str], None]
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_TESTS = ("test", "val", "validation", "valid")
_CHUNK = 64  # images that one thread decodes before it takes the next
_SAY_EVERY = 10.0  # seconds between two lines on how far decoding is
_SMALL = 4096  # bytes; threads lose more by taking turns in Python than they gain by decoding such files at once


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
    transform: Callable[[Any], Any] | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    max_errors: int = 100,
    log: Log = print,
) -> tuple[Source, Source]:
    """Return the training and the test part of a folder of images.

    Either `root/train/CLASS/…` and `root/test/CLASS/…` (or `val`), or `root/CLASS/…`, of which a share is set apart and
    then held in memory. Hidden files and folders are left out, links are followed. Images are decoded once, all to the
    same size, into an array in `cache_dir` that later runs map into memory.

    Args:
        root: the folder.
        size: pixels a side: the shorter side is resized to it and the middle cut out. Unset: all have one size already.
        channels: 3 for colour, 1 for grey; what is stored otherwise is converted.
        test_share: which share of each class is the test part, where the folder has none.
        seed: from which that choice follows.
        transform: a transform of your own from a PIL image to a tensor, which also sets the size; then images are read
            one by one, by workers.
        cache: whether to keep the decoded images on the disk; otherwise in memory.
        cache_dir: where to; `~/.cache/torchrelay` if not given.
        on_error: what to do about an image that can't be read: stop, or leave it out.
        max_errors: how many may be left out of a part.
        log: is told what was decoded and left out.

    Raises:
        UsageError: there is no such folder, or its images have several sizes.
        RelayError: no images, an empty class, classes that differ, an image that can't be read; the text names it.
    """
    base = Path(root).expanduser()
    train, test = _listings(base)
    if transform is not None:
        if on_error == "skip":
            raise UsageError(
                "on_error='skip' needs decoded images, and a transform reads them later: repair or remove them"
            )
        if test is None:
            train, test = _split(train, test_share, seed)
        return _read_singly(train, transform, channels), _read_singly(test, transform, channels)
    where = (Path(cache_dir).expanduser() if cache_dir is not None else default_folder()) if cache else None
    allowed = max_errors if on_error == "skip" else 0
    read = partial(_decoded, size=size, channels=channels, cache=where, allowed=allowed, log=log)
    if test is None:
        return split(read(train), test_share, seed)
    return _alike(read(train), read(test))


def decode_images(paths: Sequence[Path], shape: Sequence[int]) -> Tensor:
    """Return images as uint8 (images, channels, height, width) of a given (channels, height, width)."""
    channels, height, width = shape
    images = np.empty((len(paths), channels, height, width), dtype=np.uint8)
    for image, path in zip(images, paths, strict=True):
        image[...] = channels_first(fitted(read_pixels(str(path), channels), width, height))
    return torch.from_numpy(images)


# ------------------------------------------------------------------------------------------------ listing


@dataclass(frozen=True)
class _Listing:
    """The images below a folder, in an order that only their names decide."""

    name: str
    folder: Path
    classes: tuple[str, ...]
    labels: list[int]
    files: list[tuple[str, int, int]]  # path relative to the folder, bytes, time of the last change in ns

    @property
    def paths(self) -> list[str]:
        return [f"{self.folder}/{file}" for file, _, _ in self.files]


def _listings(base: Path) -> tuple[_Listing, _Listing | None]:
    """Return the images for training and for the test; none where the test part is yet to be set apart."""
    if not base.is_dir():
        raise UsageError(f"data.root {base}: there is no such folder")
    if not (base / "train").is_dir():
        return _scan(base, base.name), None
    tests = [base / name for name in _TESTS if (base / name).is_dir()]
    if not tests:
        raise RelayError(
            f"{base} has a folder 'train' but none named {', '.join(_TESTS)}: add one with the same classes"
        )
    train, test = _scan(base / "train", base.name), _scan(tests[0], base.name)
    for there, missing in ((train, test), (test, train)):
        for name in there.classes:
            if name not in missing.classes:
                raise RelayError(
                    f"{missing.folder} has no class '{name}', which {there.folder} has: both need the same classes"
                )
    return train, test


def _scan(folder: Path, name: str) -> _Listing:
    try:
        with os.scandir(folder) as entries:
            classes = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
        found = [sorted(_images(f"{folder}/{class_name}", class_name, frozenset())) for class_name in classes]
    except OSError as error:  # no permission, or a link that leads to itself or to nothing
        raise out_of_reach(str(error.filename), error) from error
    if not classes:
        raise RelayError(f"{folder} has no class folders in it: put each class's images into a folder of its own")
    files, labels = [], []
    for label, there in enumerate(found):
        if not there:
            raise RelayError(f"{folder / classes[label]} has no images in it: add some, or remove the folder")
        files += there
        labels += [label] * len(there)
    return _Listing(name, folder, tuple(classes), labels, files)


def _images(folder: str, name: str, above: frozenset[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (path relative to the listing, bytes, time) of the images in a folder and below.

    Each file is asked for its facts once, which takes most of the time of opening a folder that is decoded already.
    """
    real = os.path.realpath(folder)
    if real in above:
        return  # a link back to where we came from
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _images(entry.path, f"{name}/{entry.name}", above | {real})
            elif os.path.splitext(entry.name)[1].lower() in _SUFFIXES:  # noqa: PTH122 - a Path takes ten times as long
                facts = entry.stat()
                if stat.S_ISREG(facts.st_mode):  # a pipe would be waited for without end
                    yield f"{name}/{entry.name}", facts.st_size, facts.st_mtime_ns


def _split(whole: _Listing, share: float, seed: int) -> tuple[_Listing, _Listing]:
    """Divide a listing as `split` divides the arrays of its images."""

    def part(source: Source) -> _Listing:
        assert isinstance(source, ArraySource)  # noqa: S101 - a part of arrays is arrays
        places = source.inputs.tolist()
        labels, files = [whole.labels[i] for i in places], [whole.files[i] for i in places]
        return _Listing(whole.name, whole.folder, whole.classes, labels, files)

    numbers = ArraySource(torch.arange(len(whole.files)), torch.tensor(whole.labels), whole.classes, whole.name)
    rest, set_apart = split(numbers, share, seed)
    return part(rest), part(set_apart)


# ------------------------------------------------------------------------------------------------ one by one


class _Files(Dataset[tuple[Any, int]]):
    """Images that are read one by one, for a transform of the user's."""

    def __init__(self, listing: _Listing, transform: Callable[[Any], Any], channels: int) -> None:
        self.paths = listing.paths
        self.labels = listing.labels
        self.facts = listing.files
        marks = (f"{size} bytes at {time}" for _, size, time in listing.files)
        self.files = Files(str(listing.folder), tuple(name for name, _, _ in listing.files), tuple(marks))
        self.transform = transform
        self.channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(open_image(self.paths[index], self.channels)), self.labels[index]

    def fingerprint(self) -> str:
        return key_of(self.facts)


def _read_singly(listing: _Listing, transform: Callable[[Any], Any], channels: int) -> DatasetSource:
    return DatasetSource(_Files(listing, transform, channels), listing.classes, listing.name)


# ------------------------------------------------------------------------------------------------ decoding


def _decoded(
    listing: _Listing, *, size: int | None, channels: int, cache: Path | None, allowed: int, log: Log
) -> ArraySource:
    """Return all images of a listing as one array, of which up to `allowed` may be left out."""
    paths = listing.paths
    small = sum(size for _, size, _ in listing.files) < _SMALL * len(paths)
    first, width, height = (None, size, size) if size is not None else _size_of_first(paths, channels)
    shape = (len(paths), channels, height, width)

    def fill(images: Images) -> list[int]:
        log(f"decoding {len(paths):,} images, once")
        return _fill(images, paths, first, allowed, threads=1 if small else os.cpu_count(), log=log)

    if cache is None:
        found = in_memory(shape, fill)
    else:
        place = key_of([os.path.realpath(listing.folder), shape[1:]])
        found = cached(cache, place, key_of([listing.files, shape, FITTING]), shape, fill)
    _check(found.missing, paths, allowed)  # a cache may come from a run that allowed more
    source = ArraySource(
        torch.from_numpy(found.images),
        torch.tensor(listing.labels),
        listing.classes,
        listing.name,
        files=Files(str(listing.folder), tuple(name for name, _, _ in listing.files), found.marks),
        stamp=key_of([found.content, [file for file, _, _ in listing.files]]),
    )
    if not found.missing:
        return source
    log(f"{listing.folder}: {len(found.missing)} unreadable images left out, the first is {paths[found.missing[0]]}")
    return source.take(torch.from_numpy(np.setdiff1d(np.arange(len(paths)), found.missing)))


def _fill(
    images: Images, paths: Sequence[str], first: str | None, allowed: int, *, threads: int | None, log: Log
) -> list[int]:
    """Decode all files into `images`; return the places of those that can't be read, `allowed` at most.

    Where `first` is named, all have to have its size; otherwise they are brought to the size of `images`.
    """
    _, channels, height, width = images.shape

    def decode(places: range) -> list[int]:
        missing = []
        for place in places:
            try:
                pixels = read_pixels(paths[place], channels)
            except UnreadableImageError:
                if not allowed:
                    raise
                missing.append(place)
                continue
            if first is not None and pixels.shape[:2] != (height, width):
                raise _different(paths[place], (pixels.shape[1], pixels.shape[0]), first, (width, height))
            images[place] = channels_first(fitted(pixels, width, height))
        return missing

    chunks = [range(start, min(start + _CHUNK, len(paths))) for start in range(0, len(paths), _CHUNK)]
    missing: list[int] = []
    told = monotonic()
    with ThreadPoolExecutor(threads) as pool:  # both decoders let other threads run meanwhile
        for chunk, found in zip(chunks, pool.map(decode, chunks), strict=True):
            missing += found
            _check(missing, paths, allowed)
            if monotonic() - told > _SAY_EVERY:
                told = monotonic()
                log(f"decoded {chunk.stop:,} of {len(paths):,} images")
    return missing


def _check(missing: list[int], paths: Sequence[str], allowed: int) -> None:
    if len(missing) > allowed:
        raise RelayError(
            f"{len(missing)} images can't be read where {allowed} may be left out, beginning with {paths[missing[0]]}: "
            "repair or remove them, or set data.on_error=skip and a higher data.max_errors"
        )


def _size_of_first(paths: Sequence[str], channels: int) -> tuple[str, int, int]:
    """Return the path, the width and the height of the first image that can be read."""
    for path in paths:
        try:
            return (path, *open_image(path, channels).size)
        except UnreadableImageError:
            continue  # it has no size; decoding names it or leaves it out
    raise RelayError(f"none of the {len(paths)} images can be read, beginning with {paths[0]}")


def _alike(train: ArraySource, test: ArraySource) -> tuple[ArraySource, ArraySource]:
    """Return both, if their images have one size."""
    sizes = [(source.inputs.shape[3], source.inputs.shape[2]) for source in (train, test)]
    if sizes[0] != sizes[1]:
        first, other = (source.files.paths[0] if source.files else "" for source in (train, test))
        raise _different(other, sizes[1], first, sizes[0])
    return train, test


def _different(path: str, size: tuple[int, int], first: str, first_size: tuple[int, int]) -> UsageError:
    (width, height), (first_width, first_height) = size, first_size
    return UsageError(
        f"{path} has {width}x{height} pixels, {first} has {first_width}x{first_height}: "
        "set data.size to the pixels a side that all shall have"
    )
