"""What a loss of power leaves of a folder: data that wasn't flushed is lost, and so may be names.

The log and the backups are those of `preload.c`. After ALICE (Pillai et al., OSDI 2014) and CrashMonkey (Mohan et al.,
OSDI 2018): a file's data is safe from its `fsync` on, a name from its folder's. Of the many states that a disk may be
left in, these are the extreme ones.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOSSES = ("data dropped", "data zeroed", "names and data dropped")


@dataclass(frozen=True)
class Call:
    """A call that touched the folder.

    Attributes:
        number: from 1.
        name: of the function.
        path: within the folder.
        detail: the old path of a rename, the size of a flush.
    """

    number: int
    name: str
    path: str
    detail: str


def read_log(log: Path) -> list[Call]:
    """Return the calls of a log."""
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    return [Call(int(number), name, path, detail) for number, name, path, detail in lines]


def lose(folder: Path, calls: Sequence[Call], backup: Path, loss: str) -> None:
    """Change a folder to what may be left of it after a loss of power.

    Args:
        folder: as it is after the calls.
        calls: all that were done since it was made.
        backup: holds what was deleted and replaced, by the number of the call.
        loss: one of `LOSSES`.
    """
    for path, size in unflushed(calls).items():
        file = folder / path.lstrip("/")
        if not file.is_file():
            continue
        length = file.stat().st_size
        os.truncate(file, min(size, length))
        if loss == "data zeroed":
            os.truncate(file, length)
    if loss == "names and data dropped":
        _undo_names(folder, calls, backup)


def unflushed(calls: Sequence[Call]) -> dict[str, int]:
    """Return the files that were written since they were last flushed, with the length that is safe."""
    safe, dirty = dict[str, int](), set[str]()
    for call in calls:
        if call.name in ("write", "pwrite64", "ftruncate64", "truncate64"):
            dirty.add(call.path)
        elif call.name in ("fsync", "fdatasync"):
            safe[call.path] = int(call.detail or 0)
            dirty.discard(call.path)
        elif call.name == "rename":
            for known in (safe, dirty):
                _move(known, call.detail, call.path)
    return {path: safe.get(path, 0) for path in dirty}


def _move(known: dict[str, int] | set[str], old: str, new: str) -> None:
    """Give a path, and all paths below it, their new names."""
    for path in [path for path in known if path == old or path.startswith(old + "/")]:
        if isinstance(known, dict):
            known[new + path[len(old) :]] = known.pop(path)
        else:
            known.remove(path)
            known.add(new + path[len(old) :])


def _undo_names(folder: Path, calls: Sequence[Call], backup: Path) -> None:
    """Undo what was renamed and deleted since its folder was last flushed, the latest first."""
    flushed = {call.path: call.number for call in calls if call.name in ("fsync", "fdatasync")}
    for call in reversed(calls):
        path, old = folder / call.path.lstrip("/"), folder / call.detail.lstrip("/")
        if call.number < flushed.get(call.path.rpartition("/")[0], 0):
            continue
        kept = backup / str(call.number)
        if call.name == "rename" and path.exists() and old.parent.is_dir():
            path.rename(old)
        if (call.name.startswith("unlink") or call.name == "rename") and kept.exists() and path.parent.is_dir():
            shutil.copyfile(kept, path)
