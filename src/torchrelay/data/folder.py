"""Step 2: image folders, with one folder per class."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    read_pixels,
)
from torchrelay.data.listing import Listing, find
from torchrelay.data.sources import ArraySource, DatasetSource, Parts, Source, split
from torchrelay.errors import RelayError, UsageError

Log = Callable[[str], None]
_CHUNK = 64  # images that a thread decodes in one task
_LOG_SECONDS = 10.0  # between two lines about the progress of decoding
_SMALL = 4096  # bytes; for smaller files, threads lose more to Python's lock than they gain


def image_folder(root: str | Path, *, log: Log = print, **options: Any) -> tuple[Source, Source]:
    """Return the training and test part of an image folder; arguments, further options and errors of `image_parts`."""
    parts = image_parts(root, log=log, **options)
    assert parts.test is not None  # noqa: S101 - a folder has one, or it is split off
    if parts.validation is not None:
        log("left out: the validation part, which image_parts() returns as well")
    return parts.train, parts.test


def image_parts(
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
) -> Parts:
    """Return the training, validation and test part of an image folder.

    The folder contains either `train/CLASS/…`, `test/CLASS/…` and perhaps `val/CLASS/…`, or `CLASS/…`; then the test
    part is split off, and both parts are copied into memory. With `val` but without `test`, `val` is the test part.
    Hidden files and folders are skipped, links are followed. Images are decoded once, all to the same size, into an
    array in `cache_dir` that later runs map into memory.

    Args:
        root: the folder.
        size: height and width in pixels: the shorter side is resized to it and the center is cropped. None: all images
            already have one size.
        channels: 3 for color, 1 for grayscale; other images are converted.
        test_share: the test part's share of each class, if the folder has no test part.
        seed: determines the test samples, if the folder has no test part.
        transform: your own transform from a PIL image to a tensor, which also sets the size; then workers read the
            images one by one.
        cache: whether to keep the decoded images on disk; otherwise they are kept in memory.
        cache_dir: the folder of the caches; None: `~/.cache/torchrelay`.
        on_error: what to do with an image that can't be read: "stop", or "skip" to leave it out.
        max_errors: the number of images that each part may leave out.
        log: called with the lines about what was found, decoded and left out.

    Raises:
        UsageError: the folder doesn't exist, or its images have different sizes.
        RelayError: there are no images or only one class, a class is empty, the parts' classes differ, or an image
            can't be read; the text names it.
    """
    found = find(Path(root).expanduser())
    train, validation, test = found.for_training()
    for line in found.report():
        log(line)
    if test is None:
        log(f"test data: a share of {test_share:g} of each class, as the folder isn't divided")
    if transform is not None:
        if on_error == "skip":
            raise UsageError(
                "on_error='skip' needs decoded images, but with a transform they are read later: repair or remove the "
                "images that can't be read"
            )
        if test is None:
            train, test = _split(train, test_share, seed)
        listings = [train, test] if validation is None else [train, test, validation]
        return Parts(*(_dataset(listing, transform, channels) for listing in listings))
    decode = decoder(None if size is None else (size, size), channels, cache, cache_dir, on_error, max_errors, log)
    decoded = decode(train)
    if test is None:
        return Parts(*split(decoded, test_share, seed))
    rest = None if validation is None else _check_sizes(decoded, decode(validation))
    return Parts(decoded, _check_sizes(decoded, decode(test)), rest)


def decode_images(paths: Sequence[Path], shape: Sequence[int]) -> Tensor:
    """Return image files as uint8 (images, channels, height, width) in a given shape (channels, height, width)."""
    channels, height, width = shape
    images = np.empty((len(paths), channels, height, width), dtype=np.uint8)
    for image, path in zip(images, paths, strict=True):
        image[...] = channels_first(fitted(read_pixels(str(path), channels), width, height))
    return torch.from_numpy(images)


def _split(whole: Listing, share: float, seed: int) -> tuple[Listing, Listing]:
    """Split a listing as `split` would split the decoded images."""

    def part(source: ArraySource) -> Listing:
        return whole.take(source.inputs.tolist())

    indices = ArraySource(torch.arange(len(whole.files)), torch.tensor(whole.labels), whole.classes, whole.name)
    rest, test = split(indices, share, seed)
    return part(rest), part(test)


# ------------------------------------------------------------------------------------------------ one by one


class _Files(Dataset[tuple[Any, int]]):
    """Images that are read one by one, for the user's own transform."""

    def __init__(self, listing: Listing, transform: Callable[[Any], Any], channels: int) -> None:
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


def _dataset(listing: Listing, transform: Callable[[Any], Any], channels: int) -> DatasetSource:
    return DatasetSource(_Files(listing, transform, channels), listing.classes, listing.name)


# ------------------------------------------------------------------------------------------------ decoding


def decoder(
    size: tuple[int, int] | None,
    channels: int,
    cache: bool,
    cache_dir: str | Path | None,
    on_error: str,
    max_errors: int,
    log: Log,
) -> Callable[[Listing], ArraySource]:
    """Return what decodes a listing into a source; arguments as of `image_parts`, with a size of (height, width)."""
    caches = (Path(cache_dir).expanduser() if cache_dir is not None else default_folder()) if cache else None
    allowed = max_errors if on_error == "skip" else 0
    return partial(_decoded, size=size, channels=channels, caches=caches, allowed=allowed, log=log)


def _decoded(
    listing: Listing, *, size: tuple[int, int] | None, channels: int, caches: Path | None, allowed: int, log: Log
) -> ArraySource:
    """Return the images of a listing as one array, without those that can't be read, `allowed` at most."""
    paths = listing.paths
    small = sum(size for _, size, _ in listing.files) < _SMALL * len(paths)
    first, width, height = (None, size[1], size[0]) if size is not None else _size_of_first(paths, channels)
    shape = (len(paths), channels, height, width)

    def fill(images: Images) -> list[int]:
        log(f"decoding {len(paths):,} images, once")
        return _fill(images, paths, first, allowed, threads=1 if small else os.cpu_count(), log=log)

    if caches is None:
        decoded = in_memory(shape, fill)
    else:
        folder = key_of([os.path.realpath(listing.folder), shape[1:]])
        decoded = cached(caches, folder, key_of([listing.files, shape, FITTING]), shape, fill)
    _check_missing(decoded.missing, paths, allowed)  # the run that made the cache may have allowed more
    source = ArraySource(
        torch.from_numpy(decoded.images),
        torch.tensor(listing.labels),
        listing.classes,
        listing.name,
        files=Files(str(listing.folder), tuple(name for name, _, _ in listing.files), decoded.marks),
        stamp=key_of([decoded.content, [file for file, _, _ in listing.files]]),
    )
    missing = decoded.missing
    if not missing:
        return source
    log(f"{listing.folder}: {len(missing)} unreadable images left out, the first is {paths[missing[0]]}")
    return source.take(torch.from_numpy(np.setdiff1d(np.arange(len(paths)), missing)))


def _fill(
    images: Images, paths: Sequence[str], first: str | None, allowed: int, *, threads: int | None, log: Log
) -> list[int]:
    """Decode all files into `images`; return the positions of those that can't be read, `allowed` at most.

    If the path `first` is given, all images must have its size; otherwise they are resized to that of `images`.
    """
    _, channels, height, width = images.shape

    def decode(positions: range) -> list[int]:
        missing = []
        for position in positions:
            try:
                pixels = read_pixels(paths[position], channels)
            except UnreadableImageError:
                if not allowed:
                    raise
                missing.append(position)
                continue
            if first is not None and pixels.shape[:2] != (height, width):
                raise _size_error(paths[position], (pixels.shape[1], pixels.shape[0]), first, (width, height))
            images[position] = channels_first(fitted(pixels, width, height))
        return missing

    chunks = [range(start, min(start + _CHUNK, len(paths))) for start in range(0, len(paths), _CHUNK)]
    missing: list[int] = []
    last_log = monotonic()
    with ThreadPoolExecutor(threads) as pool:  # both decoders release Python's lock
        for chunk, unreadable in zip(chunks, pool.map(decode, chunks), strict=True):
            missing += unreadable
            _check_missing(missing, paths, allowed)
            if monotonic() - last_log > _LOG_SECONDS:
                last_log = monotonic()
                log(f"decoded {chunk.stop:,} of {len(paths):,} images")
    return missing


def _check_missing(missing: list[int], paths: Sequence[str], allowed: int) -> None:
    if len(missing) > allowed:
        raise RelayError(
            f"{len(missing)} images can't be read and {allowed} may be left out; the first is {paths[missing[0]]}: "
            "repair or remove them, or set data.on_error=skip and a higher data.max_errors"
        )


def _size_of_first(paths: Sequence[str], channels: int) -> tuple[str, int, int]:
    """Return the path, width and height of the first image that can be read."""
    for path in paths:
        try:
            return (path, *open_image(path, channels).size)
        except UnreadableImageError:
            continue  # decoding will name it or leave it out
    raise RelayError(f"none of the {len(paths)} images can be read; the first is {paths[0]}: repair or replace them")


def _check_sizes(train: ArraySource, other: ArraySource) -> ArraySource:
    """Return the other part if its images have the size of the training images."""
    sizes = [(source.inputs.shape[3], source.inputs.shape[2]) for source in (train, other)]
    if sizes[0] != sizes[1]:
        first, second = (source.files.paths[0] if source.files else "" for source in (train, other))
        raise _size_error(second, sizes[1], first, sizes[0])
    return other


def _size_error(path: str, size: tuple[int, int], first: str, first_size: tuple[int, int]) -> UsageError:
    (width, height), (first_width, first_height) = size, first_size
    return UsageError(
        f"{path} has {width}x{height} pixels, {first} has {first_width}x{first_height}: "
        "set data.size to the height and width that all images should get"
    )
