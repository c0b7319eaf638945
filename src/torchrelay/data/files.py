"""Step 2: which files samples come from, so that a resume can name what has changed among them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Marks = Mapping[str, str]  # by a file's name, what tells its content from another
_SHOWN = 3  # changes that a message names


@dataclass(frozen=True)
class Files:
    """The file of each sample."""

    folder: str
    names: tuple[str, ...]  # relative to the folder
    marks: tuple[str, ...]  # of each a checksum of its content, or its size and time

    @property
    def paths(self) -> tuple[str, ...]:
        """The files' paths."""
        return tuple(f"{self.folder}/{name}" for name in self.names)

    def take(self, places: npt.NDArray[np.int64]) -> "Files":
        """Return the files at these places."""
        return Files(self.folder, tuple(self.names[i] for i in places), tuple(self.marks[i] for i in places))


def together(parts: Iterable[Files]) -> Marks:
    """Return the marks of all files of several parts, by names that don't say where the data lies."""
    found = list(parts)
    if not found:
        return {}
    common = os.path.commonpath([part.folder for part in found])
    inside = [os.path.relpath(part.folder, common) for part in found]
    return {
        os.path.normpath(f"{folder}/{name}"): mark
        for folder, part in zip(inside, found, strict=True)
        for name, mark in zip(part.names, part.marks, strict=True)
    }


def differences(before: Marks, now: Marks) -> str:
    """Return what was done to the files, such as "cat/3.png was edited, dog/7.png was removed"; "" if nothing was."""
    found = [f"{name} was edited" for name in before if name in now and now[name] != before[name]]
    found += [f"{name} was removed" for name in before if name not in now]
    found += [f"{name} was added" for name in now if name not in before]
    more = f" and {len(found) - _SHOWN:,} more changes" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
