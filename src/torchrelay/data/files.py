"""Step 2: the files that samples come from, so that a resume can name the ones that have changed."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Marks = Mapping[str, str]  # from a file's name to a mark of its content, such as a checksum
_NAMED = 3  # changes that a message lists


@dataclass(frozen=True)
class Files:
    """The file of each sample."""

    folder: str
    names: tuple[str, ...]  # relative to the folder
    marks: tuple[str, ...]  # each file's checksum, or its size and modification time

    @property
    def paths(self) -> tuple[str, ...]:
        """The files' paths."""
        return tuple(f"{self.folder}/{name}" for name in self.names)

    def take(self, indices: npt.NDArray[np.int64]) -> "Files":
        """Return the files of these samples."""
        return Files(self.folder, tuple(self.names[i] for i in indices), tuple(self.marks[i] for i in indices))


def together(parts: Iterable[Files]) -> Marks:
    """Return the marks of all parts' files, by names relative to the parts' common folder."""
    parts = list(parts)
    if not parts:
        return {}
    common = os.path.commonpath([part.folder for part in parts])
    folders = [os.path.relpath(part.folder, common) for part in parts]
    return {
        os.path.normpath(f"{folder}/{name}"): mark
        for folder, part in zip(folders, parts, strict=True)
        for name, mark in zip(part.names, part.marks, strict=True)
    }


def differences(before: Marks, now: Marks) -> str:
    """Return the changes of the files, such as "cat/3.png was edited, dog/7.png was removed"; "" if there are none."""
    changes = [f"{name} was edited" for name in before if name in now and now[name] != before[name]]
    changes += [f"{name} was removed" for name in before if name not in now]
    changes += [f"{name} was added" for name in now if name not in before]
    more = f" and {len(changes) - _NAMED:,} more changes" if len(changes) > _NAMED else ""
    return ", ".join(changes[:_NAMED]) + more
