"""An export's folder: it appears as a whole, and `SHA256SUMS` names a damaged file."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrelay.errors import RelayError, UsageError, explained, intact
from torchrelay.run import disk

FACTS, SUMS, SIGNATURE = "export.json", "SHA256SUMS", "model.sig"
_FORMAT = 1
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")  # as `sha256sum` writes it


def check_target(target: Path, force: bool) -> None:
    """Refuse a target that is something else, or an export that nobody said may be replaced.

    Raises:
        UsageError: it is.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not (target / FACTS).is_file():
        raise UsageError(f"{target} exists and is no export: choose another folder by --out")
    if not force:
        raise UsageError(f"{target} holds an export already: choose another folder by --out, or replace it by --force")


@contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """Give a folder beside the target to write in, which takes the target's name at the end.

    Args:
        target: the folder that appears.
        force: whether it may take the place of another export.

    Raises:
        UsageError: there is something else at the target, or an export and no `force`.
    """
    check_target(target, force)
    staging, before = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "before"))
    with explained(f"write the export {target}", "make room or repair the disk, then export again"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            for path in staging.iterdir():
                path.chmod(0o666 & ~_umask(staging))  # safetensors lets only the owner read
                disk.flush(path)
            disk.flush_folder(staging)
            if target.exists():
                shutil.rmtree(before, ignore_errors=True)
                target.rename(before)
            staging.rename(target)
            disk.flush_folder(target.parent)
            shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _umask(folder: Path) -> int:
    """Return the bits that the umask takes from a new folder's permissions."""
    return ~folder.stat().st_mode & 0o777


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write what the export is, as JSON."""
    text = json.dumps({"format": _FORMAT, **facts}, indent=1, ensure_ascii=False)
    (folder / FACTS).write_text(text + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what `write_facts` wrote.

    Raises:
        UsageError: the folder is no export, or one of a later release.
        RelayError: the file is damaged.
    """
    path = folder / FACTS
    if not path.is_file():
        raise UsageError(f"{folder} isn't an export: it has no {FACTS}; give a folder that 'torchrelay export' made")
    with explained(f"read {path}", "copy the export again"), intact(path, "copy the export again"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts["format"], int):
            raise TypeError("its format isn't a number")
    if facts["format"] > _FORMAT:
        raise UsageError(f"{folder} was exported by a later release: update torchrelay")
    return dict(facts)


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of each file, in the form that `sha256sum -c` reads."""
    lines = [f"{_sum(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.name not in (SUMS, SIGNATURE)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> list[str]:
    """Check each file against its SHA-256, and return the names of files that have none.

    Raises:
        RelayError: a file is missing or has changed; the text names them.
    """
    path = folder / SUMS
    with explained(f"read {path}", "copy the export again"), intact(path, "copy the export again"):
        found = [_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
        sums = {match[2]: match[1] for match in found if match is not None}
        if None in found or not sums or any(Path(name).name != name for name in sums):
            raise ValueError("it isn't a list of files")
    with explained(f"read the files of {folder}", "copy the export again"):
        missing = [name for name in sums if not (folder / name).is_file()]
        changed = [name for name in sums if name not in missing and _sum(folder / name) != sums[name]]
        known = {*sums, SUMS, SIGNATURE}
        unknown = sorted(each.name for each in folder.iterdir() if each.name not in known)
    if missing or changed:
        faults = [f"{name} is missing" for name in missing] + [f"{name} has changed" for name in changed]
        raise RelayError(f"{folder} isn't what its {SUMS} says: {', '.join(faults)}: copy the export again")
    return unknown


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
