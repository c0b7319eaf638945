"""Step 2: decode an image folder once, into an array that all processes and all later runs map into memory.

A cache is a folder that appears whole or not at all. Its name says what it is of (a place) and what that was like (a
key). When the place has changed it is decoded anew, and the cache of what it was like before is removed, which is safe
while another run has it mapped. Processes that start together build it once: the others wait for the lock. All caches
may be deleted at any time.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrelay.errors import RelayError
from torchrelay.run.lock import lock

Images = npt.NDArray[np.uint8]  # (images, channels, height, width)
_FORMAT = 2  # raised when the content or its layout changes for the same key
# Linux's number; Python has no name for it before 3.13. Without it the kernel refuses what is larger than the memory.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)


@dataclass(frozen=True)
class Decoded:
    """Images as they were decoded."""

    images: Images
    missing: list[int]  # places of those that could not be decoded; they are black
    marks: tuple[str, ...]  # a checksum of each image

    @property
    def content(self) -> str:
        """A hash of all images."""
        return key_of([self.images.shape, self.marks])


def default_folder() -> Path:
    """Return where caches are kept: `$XDG_CACHE_HOME/torchrelay`, or `~/.cache/torchrelay`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchrelay"


def key_of(facts: Any) -> str:
    """Return a name for what `facts`, a JSON value, describes."""
    return hashlib.blake2b(json.dumps([_FORMAT, facts]).encode(), digest_size=16).hexdigest()


def in_memory(shape: tuple[int, ...], fill: Callable[[Images], list[int]]) -> Decoded:
    """Return the decoded images, which nothing keeps: `cached` without a cache."""
    images = np.zeros(shape, dtype=np.uint8)
    missing = fill(images)
    return Decoded(images, missing, _marks(images))


def cached(folder: Path, place: str, key: str, shape: tuple[int, ...], fill: Callable[[Images], list[int]]) -> Decoded:
    """Return the cached images of a key; build them if they aren't there.

    Args:
        folder: where caches are kept.
        place: what they are of; it has one cache at a time.
        key: what that is like.
        shape: (images, channels, height, width).
        fill: decodes into an array of this shape and returns the places that it had to leave empty.

    Raises:
        RelayError: the disk is full, or the folder can't be written.
    """
    target = folder / f"{place}-{key}"
    found = _open(target, shape)
    if found is not None:  # nothing is written then: the caches may lie on a disk that only others write to
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{place}.lock"):
            found = _open(target, shape)
            if found is None:
                _build(target, shape, fill)
                _remove_others(folder, place, target)
                found = _open(target, shape)
    except OSError as error:
        raise RelayError(
            f"can't write the image cache {target}: {error.strerror or error}; it needs {prod(shape):,} bytes and "
            f"{_free(folder):,} are free: make room, set data.cache_dir to another disk, or data.cache=false to decode "
            "into memory"
        ) from error
    if found is None:
        raise RelayError(f"the image cache {target} can't be read back just after it was written: check the disk")
    return found


def _open(target: Path, shape: tuple[int, ...]) -> Decoded | None:
    """Map a cache into memory; None if it isn't there, is cut short, or is another's.

    Checked are the facts, by their checksum, and the size of the images, which are not read: that would cost a run
    as much as reading them once more. Their hash was taken when they were written.
    """
    try:
        facts = json.loads((target / "facts.json").read_text())
        if facts.pop("checksum") != key_of(facts) or facts["shape"] != list(shape):
            return None
        marks = (target / "marks.txt").read_text().split()
        if len(marks) != shape[0]:
            return None
        return Decoded(_mapped(target / "images.bin", shape), facts["missing"], tuple(marks))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _mapped(path: Path, shape: tuple[int, ...]) -> Images:
    """Map a file: the pages are shared between processes, and what is written to them stays in memory."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != prod(shape):
            raise ValueError(f"{path} doesn't have the size of {shape}")
        flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        content = mmap.mmap(file.fileno(), prod(shape), flags=flags, prot=access)
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _build(target: Path, shape: tuple[int, ...], fill: Callable[[Images], list[int]]) -> None:
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        path = staging / "images.bin"
        with path.open("wb") as file:
            # Taking the space first turns a full disk into an error; through the mapping it would be a bus error.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, prod(shape))
            file.truncate(prod(shape))
        images = np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
        missing = fill(images)
        images.flush()
        (staging / "marks.txt").write_text("\n".join(_marks(images)))
        facts = {"shape": shape, "missing": missing}
        (staging / "facts.json").write_text(json.dumps({**facts, "checksum": key_of(facts)}))
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_others(folder: Path, place: str, target: Path) -> None:
    """Remove what else there is of a place: what it was like before, and what a killed process left behind."""
    for pattern in (f"{place}-*", f".{place}-*.partial"):
        for path in folder.glob(pattern):
            if path != target:
                shutil.rmtree(path, ignore_errors=True)


def _marks(images: Images) -> tuple[str, ...]:
    """Return a checksum of each image; a processor's units share them, as hashing lets other threads run meanwhile."""

    def marks(part: Images) -> list[str]:
        return [hashlib.blake2b(image.data, digest_size=8).hexdigest() for image in part]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(chain.from_iterable(pool.map(marks, np.array_split(images, os.cpu_count() or 1))))


def _free(folder: Path) -> int:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends."""
    with path.open("w") as file:
        lock(file, wait=True)
        yield
