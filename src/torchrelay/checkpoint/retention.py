"""Step 3: which checkpoints a folder has, which of them to load, and which to delete."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torchrelay.checkpoint.format import (
    CHECKPOINT_NAME,
    Contents,
    LaterReleaseError,
    Manifest,
    read,
    read_manifest,
    step_of,
)
from torchrelay.errors import RelayError, UsageError, explained


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder` that have a manifest, sorted by step."""
    with explained(f"list {folder}"):
        entries = list(folder.iterdir()) if folder.is_dir() else []
        paths = {p.name: p for p in entries if CHECKPOINT_NAME.fullmatch(p.name) and (p / "manifest.json").is_file()}
    replaced = [name for name in paths if name.startswith(".") and name[1:].removesuffix(".before") in paths]
    return sorted((path for name, path in paths.items() if name not in replaced), key=step_of)


def newest(folder: Path, warn: Callable[[str], None], before: int | None = None) -> Contents | None:
    """Read the newest intact checkpoint, skipping damaged ones with a warning.

    Args:
        folder: the folder of checkpoints.
        warn: called with a message about each damaged checkpoint.
        before: consider only checkpoints of fewer steps than this.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        RelayError: there are checkpoints, but all are damaged: a run never silently starts afresh.
        LaterReleaseError: the newest was written by a later release, and its progress would be lost.
    """
    damage = []
    for path in reversed(complete(folder)):
        if before is not None and step_of(path) >= before:
            continue
        try:
            return read(path)
        except LaterReleaseError:
            raise
        except RelayError as error:
            damage.append(str(error))
            warn(f"skipped a damaged checkpoint: {error}")
    if damage:
        raise RelayError(f"no checkpoint in {folder} can be used: " + "; ".join(damage))
    return None


def best(folder: Path) -> Path | None:
    """Return the checkpoint with the highest score (the earliest of equal ones), or None if none has a score."""
    ranked = _by_score(complete(folder))
    return ranked[0] if ranked else None


def find(folder: Path, which: str) -> Path:
    """Return the checkpoint called "best", "last" or by its step; without scores, "best" is the last.

    Raises:
        UsageError: there is no such checkpoint; the message lists those available.
    """
    paths = [path for path in complete(folder) if not _is_damaged(path)]
    by_step = {str(step_of(path)): path for path in paths}
    if not paths:
        raise UsageError(f"{folder} has no checkpoint yet")
    if which == "best":
        return best(folder) or paths[-1]
    if which == "last":
        return paths[-1]
    if which not in by_step:
        raise UsageError(f"{folder} has no checkpoint '{which}': choose best, last, {', '.join(by_step)}")
    return by_step[which]


def prune(folder: Path, keep: int, keep_best: int) -> list[str]:
    """Delete all checkpoints but the newest `keep` (at least one) and the best `keep_best`.

    One that a signal caused counts as neither: only the newest of them stays, until there is a later checkpoint that
    would exist without the signal. One with a damaged manifest counts as neither and is left for a person to inspect.

    Returns:
        What couldn't be deleted, a message each; the next call tries it again.
    """
    manifests = {path: manifest for path in complete(folder) if (manifest := _manifest(path)) is not None}
    regular = [path for path, manifest in manifests.items() if not manifest.is_interim]
    kept = {*regular[-max(keep, 1) :], *_by_score(regular)[:keep_best], *list(manifests)[-1:]}
    failures = []
    for path in manifests:
        if path not in kept:
            try:
                _remove(path)
            except OSError as error:
                failures.append(
                    f"the old checkpoint {path} can't be deleted ({error.strerror or error}): the next save tries again"
                )
    return failures


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of more steps than this, newest first: a crash midway leaves no gap in the middle."""
    for path in reversed(complete(folder)):
        if step_of(path) > step:
            with explained(f"delete {path}, which is of later steps than the run has"):
                _remove(path)


def clean(folder: Path) -> None:
    """Delete what a killed process left half-written or half-deleted; no other process may be writing here."""
    for pattern in (".step-*.partial", ".step-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _by_score(paths: Sequence[Path]) -> list[Path]:
    """Return those that have a score, best first; a checkpoint with a damaged manifest has none."""
    manifests = {path: manifest for path in paths if (manifest := _manifest(path)) is not None}
    scores = {path: manifest.score for path, manifest in manifests.items() if manifest.score is not None}
    return sorted(scores, key=lambda path: scores[path], reverse=True)


def _manifest(path: Path) -> Manifest | None:
    """Return a checkpoint's manifest, or None if it is damaged or was written by a later release."""
    try:
        return read_manifest(path)
    except RelayError:
        return None


def _is_damaged(path: Path) -> bool:
    """Return whether a checkpoint's manifest is damaged; that of a later release isn't."""
    try:
        read_manifest(path)
    except LaterReleaseError:
        return False
    except RelayError:
        return True
    return False


def _remove(path: Path) -> None:
    removed = path.with_name(f".{path.name.strip('.')}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    # Rename first: a half-deleted folder must not count as a checkpoint.
    path.rename(removed)
    shutil.rmtree(removed)
