"""Step 1: what must be on the disk, and not only in the system's memory, before anything relies on it."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Flush a file's data to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush a folder's entries to disk; Windows can neither open a folder nor needs to."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, staging: Path) -> None:
    """Put a staged file in another's place, such that after a loss of power one of the two is there as a whole."""
    flush(staging)
    staging.replace(path)
    flush_folder(path.parent)


def write(path: Path, text: str) -> None:
    """Write a text file that appears, or replaces another, as a whole."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, encoding="utf-8")
    replace(path, staging)
