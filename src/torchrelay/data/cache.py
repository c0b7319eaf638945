"""Step 2: decode an image folder once, into an array that all processes and all later runs map into memory.

A cache is a folder that appears whole or not at all; its name is a hash of all that its content depends on, so a folder
that changed gets another one. Processes that start together build it once: the others wait for the lock.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrelay.errors import RelayError

Images = npt.NDArray[np.uint8]  # (images, channels, height, width)
_FORMAT = 1  # raised when the content or its layout changes for the same key


def default_folder() -> Path:
    """Return where caches are kept: `$XDG_CACHE_HOME/torchrelay`, or `~/.cache/torchrelay`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchrelay"


def key_of(facts: Any) -> str:
    """Return the name of the cache of what `facts`, a JSON value, describes."""
    return hashlib.blake2b(json.dumps([_FORMAT, facts]).encode(), digest_size=16).hexdigest()


def cached(
    folder: Path, key: str, shape: tuple[int, ...], fill: Callable[[Images], list[int]]
) -> tuple[Images, list[int]]:
    """Return the cached images of a key, and which of them could not be decoded; build them if they aren't there.

    Args:
        folder: where caches are kept.
        key: what `key_of` returned.
        shape: (images, channels, height, width).
        fill: decodes into an array of this shape and returns the places that it had to leave empty.

    Raises:
        RelayError: the disk is full, or the folder can't be written.
    """
    target = folder / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock"):
            found = _open(target, shape)
            if found is None:
                _build(target, shape, fill)
                found = _open(target, shape)
    except OSError as error:
        needed, free = int(np.prod(shape)), shutil.disk_usage(folder if folder.exists() else "/").free
        raise RelayError(
            f"can't write the image cache {target}: {error.strerror or error}; it needs {needed:,} bytes and {free:,} are "
            "free: make room, or set data.cache_dir to another disk, or data.cache=false to decode into memory"
        ) from error
    if found is None:
        raise RelayError(f"the image cache {target} can't be read back just after it was written: check the disk")
    return found


def _open(target: Path, shape: tuple[int, ...]) -> tuple[Images, list[int]] | None:
    """Map a cache into memory; None if it isn't there, is cut short, or is another's."""
    try:
        facts = json.loads((target / "facts.json").read_text())
        # "c": pages are shared between processes and never written back, and PyTorch may wrap them.
        images = np.load(target / "images.npy", mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict) or images.shape != shape or images.dtype != np.uint8:
        return None
    return images, list(facts.get("missing", []))


def _build(target: Path, shape: tuple[int, ...], fill: Callable[[Images], list[int]]) -> None:
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        # Taking the space first turns a full disk into an error; through the mapping it would be a bus error.
        with (staging / "images.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            os.posix_fallocate(file.fileno(), 0, file.tell() + int(np.prod(shape)))
        images = np.load(staging / "images.npy", mmap_mode="r+")
        missing = fill(images)
        images.flush()
        (staging / "facts.json").write_text(json.dumps({"missing": missing}))
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
