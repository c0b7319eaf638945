"""Step 2: decode an image folder once, into an array that all processes and all later runs map into memory.

A cache is a folder that appears whole or not at all. Its name has two parts: the source (which image folder, decoded to
which size) and a key of the folder's present state. When the folder changes it is decoded again and its previous cache
is removed, which is safe while another run has it mapped. Processes that start together build a cache once: the others
wait for the lock. All caches may be deleted at any time.
"""

import hashlib
import json
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
Fill = Callable[[Images], list[int]]  # decodes into the array; returns the positions that it had to leave black
_FORMAT = 2  # incremented when the content or its layout changes for the same key
_FEWEST, _EACH = 1024, 24  # bytes of a cache's facts, and of each missing image's position in them
# Linux's value; Python names it from 3.13 on. Without it the kernel refuses to map more than fits into memory.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class Decoded:
    """Decoded images."""

    images: Images
    missing: list[int]  # positions of those that could not be decoded; they are black
    marks: tuple[str, ...]  # each image's checksum

    @property
    def content(self) -> str:
        """A hash of all images."""
        return key_of([self.images.shape, self.marks])


def default_folder() -> Path:
    """Return the folder of all caches: `$XDG_CACHE_HOME/torchrelay`, or `~/.cache/torchrelay`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchrelay"


def key_of(facts: Any) -> str:
    """Return the hash of a JSON value, which names what the value describes."""
    return hashlib.blake2b(json.dumps([_FORMAT, facts]).encode(), digest_size=16).hexdigest()


def in_memory(shape: tuple[int, ...], fill: Fill) -> Decoded:
    """Decode without a cache; arguments as of `cached`."""
    images = np.zeros(shape, dtype=np.uint8)
    missing = fill(images)
    return Decoded(images, missing, _marks(images))


def cached(folder: Path, source: str, key: str, shape: tuple[int, ...], fill: Fill) -> Decoded:
    """Return the images of a cache, and build the cache if it doesn't exist.

    Args:
        folder: the folder of all caches.
        source: identifies what is decoded; it has one cache at a time.
        key: identifies the source's present state.
        shape: (images, channels, height, width).
        fill: decodes into an array of this shape.

    Raises:
        RelayError: the disk is full, or the folder can't be written.
    """
    target = folder / f"{source}-{key}"
    decoded = _open(target, shape)
    if decoded is not None:  # without writing anything: the disk may be read-only
        return decoded
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{source}.lock").open("w") as file:
            lock(file, wait=True)  # until the file is closed or the process dies
            decoded = _open(target, shape)
            if decoded is None:
                _build(target, shape, fill)
                _remove_others(folder, source, target)
                decoded = _open(target, shape)
    except OSError as error:
        raise RelayError(
            f"can't write the image cache {target}: {error.strerror or error}; it needs {prod(shape):,} bytes and "
            f"{_free(folder):,} are free: make room, set data.cache_dir to another disk, or data.cache=false to decode "
            "into memory"
        ) from error
    if decoded is None:
        raise RelayError(f"the image cache {target} can't be read back just after it was written: check the disk")
    return decoded


def _open(target: Path, shape: tuple[int, ...]) -> Decoded | None:
    """Map a cache into memory; return None if it doesn't exist, is truncated or has another shape.

    This checks the facts by their checksum and the images by their size only: reading them would cost a run as much
    as another epoch. Their hash was computed when they were written.
    """
    try:
        if (target / "facts.json").stat().st_size > _FEWEST + _EACH * shape[0]:
            return None  # ours aren't so long, and a parser would take minutes
        facts = json.loads((target / "facts.json").read_text())
        if facts.pop("checksum") != key_of(facts) or facts["shape"] != list(shape):
            return None
        marks = (target / "marks.txt").read_text().split()
        if len(marks) != shape[0] or not set(facts["missing"]) <= set(range(shape[0])):
            return None
        return Decoded(_mapped(target / "images.bin", shape), facts["missing"], tuple(marks))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _mapped(path: Path, shape: tuple[int, ...]) -> Images:
    """Map a file copy-on-write: processes share its pages, and nothing is written back to it."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != prod(shape):
            raise ValueError(f"{path} doesn't have the size of {shape}")
        if sys.platform == "win32":
            content = mmap.mmap(file.fileno(), prod(shape), access=mmap.ACCESS_COPY)
        else:
            flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            content = mmap.mmap(file.fileno(), prod(shape), flags=flags, prot=access)
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _build(target: Path, shape: tuple[int, ...], fill: Fill) -> None:
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        path = staging / "images.bin"
        with path.open("wb") as file:
            # Allocating the space first makes a full disk an error here, not a bus error in a write to the mapping.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, prod(shape))
            file.truncate(prod(shape))
        images = np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
        missing = fill(images)
        images.flush()
        (staging / "marks.txt").write_text("\n".join(_marks(images)))
        del images  # Windows doesn't rename a folder with a mapped file
        facts = {"shape": shape, "missing": missing}
        (staging / "facts.json").write_text(json.dumps({**facts, "checksum": key_of(facts)}))
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_others(folder: Path, source: str, target: Path) -> None:
    """Remove a source's previous caches, and the partial ones that killed processes left behind."""
    for pattern in (f"{source}-*", f".{source}-*.partial"):
        for path in folder.glob(pattern):
            if path != target:
                shutil.rmtree(path, ignore_errors=True)


def _marks(images: Images) -> tuple[str, ...]:
    """Return each image's checksum, computed in parallel: hashing releases the interpreter's lock."""

    def marks(part: Images) -> list[str]:
        return [hashlib.blake2b(image.data, digest_size=8).hexdigest() for image in part]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(chain.from_iterable(pool.map(marks, np.array_split(images, os.cpu_count() or 1))))


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free
