"""Step 3: checkpoints, folders that appear whole or not at all.

`checkpoints/step-00001234/` holds `model.safetensors` (the raw weights, for anyone to load), `ema.safetensors` if
weights are averaged, `state.safetensors` and `state.json` (everything else that the run needs to go on) and
`manifest.json` (the size and SHA-256 of each). Nothing is pickled: loading a checkpoint runs no code. This module
knows tensors and folders, not trainers.

Writing: files beside the target, each flushed; the manifest; the folder flushed; renamed; the parent flushed. A crash
in between leaves a folder with a dot before its name that no reader counts, but for a checkpoint that was moved aside
for another of the same step.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, Field, ValidationError, field_validator
from torch import Tensor

from torchrelay.duration import Duration
from torchrelay.errors import RelayError, UsageError
from torchrelay.settings import Settings

FORMAT = 1  # raised when an older release could no longer read what we write
_NAME = re.compile(r"\.?step-(\d{8,})(\.before)?")  # with a dot and an end: moved aside
_NEEDED = {"model.safetensors", "state.safetensors", "state.json"}
_LARGEST_JSON = 64 * 2**20  # bytes; a state of a million numbers is below it, a bomb isn't


class CheckpointSettings(Settings):
    """When checkpoints are saved and which are kept."""

    every: Duration = Duration("1 epoch")
    """How often to save: "1 epoch", "500 steps" or "10 min". The end of the run is always saved."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest to keep."""
    keep_best: int = Field(default=1, ge=0)
    """How many of the best, by the task's headline metric, to keep beside them."""

    @field_validator("every")
    @classmethod
    def _check(cls, every: Duration) -> Duration:
        if not every.amount:
            raise ValueError(f"'{every}' is no interval: write '1 epoch', '500 steps' or '10 min'")
        return every


class LaterReleaseError(RelayError):
    """A checkpoint of a release that knows more than this one: no damage, and no reason to go back to one before it."""


class File(BaseModel, extra="forbid"):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


class Manifest(BaseModel, extra="forbid"):
    """What a checkpoint says of itself."""

    format: int
    step: int
    score: float | None
    metrics: dict[str, float | None]  # None: not finite, which JSON can't say
    files: dict[str, File]
    checksum: str = ""  # of all above

    def own_checksum(self) -> str:
        """Return the checksum that this manifest should have."""
        return hashlib.sha256(self.model_dump_json(exclude={"checksum"}).encode()).hexdigest()


@dataclass(frozen=True)
class Contents:
    """What one checkpoint holds."""

    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]  # a tree of dicts, lists, tuples, tensors, numbers, strings
    ema: dict[str, Tensor] | None = None
    score: float | None = None  # the headline metric, higher is better; None where nothing was evaluated
    metrics: dict[str, float] = field(default_factory=dict)
    weights: tuple[str, ...] = ()  # names in `model` that only an optimizer's step changes
    trained: tuple[str, ...] = ()  # those that it does change, and that must be finite; a mask may hold -inf

    def check_finite(self) -> None:
        """Look for numbers that aren't finite.

        Raises:
            RelayError: a trained weight has one; the text names it.
        """
        for name in self.trained:
            if not bool(torch.isfinite(self.model[name]).all()):
                raise RelayError(
                    f"the weights '{name}' are not finite after step {self.step}, so they are not saved: resume from "
                    "the checkpoint before, with a lower optimizer.lr or optimizer.clip_norm=1"
                )


# ------------------------------------------------------------------------------------------------ trees as JSON


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of a tree: return what is left as JSON can hold it, and the tensors by their path.

    Raises:
        TypeError: for anything but dicts, lists, tuples, tensors, numbers, strings and None, which we won't pickle.
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node
            return {"$tensor": path}
        if isinstance(node, dict):
            if all(isinstance(key, str) for key in node):
                return {key: visit(value, f"{path}.{key}".lstrip(".")) for key, value in node.items()}
            return {"$items": [[key, visit(value, f"{path}.{key}".lstrip("."))] for key, value in node.items()]}
        if isinstance(node, tuple):
            return {"$tuple": [visit(value, f"{path}.{i}".lstrip(".")) for i, value in enumerate(node)]}
        if isinstance(node, list):
            return [visit(value, f"{path}.{i}".lstrip(".")) for i, value in enumerate(node)]
        if isinstance(node, float) and not math.isfinite(node):
            return {"$float": repr(node)}  # JSON has no infinity
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"a checkpoint can't hold {type(node).__name__} at '{path}': use tensors, numbers and strings")

    return visit(tree, ""), tensors


def unpack(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors back into what `pack` left."""
    if isinstance(skeleton, list):
        return [unpack(value, tensors) for value in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    match skeleton:
        case {"$tensor": path}:
            return tensors[path]
        case {"$float": text}:
            return float(text)
        case {"$tuple": values}:
            return tuple(unpack(value, tensors) for value in values)
        case {"$items": items}:
            return {key: unpack(value, tensors) for key, value in items}
    return {key: unpack(value, tensors) for key, value in skeleton.items()}


# ------------------------------------------------------------------------------------------------ write and read


def write(folder: Path, contents: Contents) -> Path:
    """Write a checkpoint below `folder`, whole or not at all.

    Raises:
        RelayError: the disk is full or can't be written; what was there before is untouched.
    """
    target = folder / f"step-{contents.step:08d}"
    staging = folder / f".{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        skeleton, tensors = pack(contents.state)
        _write_tensors(staging / "model.safetensors", contents.model)
        if contents.ema is not None:
            _write_tensors(staging / "ema.safetensors", contents.ema)
        _write_tensors(staging / "state.safetensors", tensors)
        _write_flushed(staging / "state.json", json.dumps(skeleton, allow_nan=False).encode())
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(staging.iterdir())}
        manifest = Manifest(
            format=FORMAT,
            step=contents.step,
            score=_finite(contents.score),
            metrics={name: _finite(value) for name, value in contents.metrics.items()},
            files=files,
        )
        manifest.checksum = manifest.own_checksum()
        _write_flushed(staging / "manifest.json", manifest.model_dump_json(indent=1).encode())
        _flush_folder(staging)
        before = folder / f".{target.name}.before"
        if target.exists():  # of the same step before a resume: rename can't replace a full folder
            shutil.rmtree(before, ignore_errors=True)
            target.rename(before)
        staging.rename(target)
        _flush_folder(folder)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        needed = sum(t.nbytes for t in (*contents.model.values(), *pack(contents.state)[1].values()))
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        cause = getattr(error, "strerror", None) or error
        raise RelayError(
            f"can't save {target}: {cause}; it needs {needed:,} bytes and {free:,} are free: "
            "make room, then resume the run"
        ) from error
    return target


def read(path: Path) -> Contents:
    """Read a checkpoint and compare every checksum.

    Raises:
        RelayError: the checkpoint is damaged, or of a later release; the text names the file.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        if file.is_symlink() or Path(name).name != name:
            raise RelayError(f"{path}/manifest.json names '{name}', which isn't a plain file beside it")
        if not file.is_file():
            raise RelayError(f"{file} is missing")
        if file.stat().st_size != entry.bytes:
            raise RelayError(f"{file} has {file.stat().st_size:,} bytes instead of {entry.bytes:,}")
        if _sha256(file) != entry.sha256:
            raise RelayError(f"{file} doesn't match its checksum")
    skeleton = _read_json(path / "state.json")
    state = unpack(skeleton, _read_tensors(path / "state.safetensors"))
    ema = _read_tensors(path / "ema.safetensors") if "ema.safetensors" in manifest.files else None
    model = _read_tensors(path / "model.safetensors")
    metrics = {name: math.nan if value is None else value for name, value in manifest.metrics.items()}
    return Contents(manifest.step, model, state, ema, manifest.score, metrics)


def read_manifest(path: Path) -> Manifest:
    """Read and check a checkpoint's manifest, without its tensors.

    Raises:
        RelayError: there is none, or it isn't one of ours, or it is damaged.
        LaterReleaseError: it is of a later release.
    """
    found = _read_json(path / "manifest.json")
    if isinstance(found, dict) and isinstance(number := found.get("format"), int) and number > FORMAT:
        raise LaterReleaseError(f"{path} was written by a later release (format {number}): upgrade torchrelay")
    try:
        manifest = Manifest.model_validate(found)
    except ValidationError as error:
        raise RelayError(f"{path}/manifest.json isn't a checkpoint's manifest") from error
    if manifest.checksum != manifest.own_checksum():
        raise RelayError(f"{path}/manifest.json doesn't match its checksum")
    if manifest.step != _step(path) or not manifest.files.keys() >= _NEEDED:
        raise RelayError(f"{path}/manifest.json is that of another folder")
    return manifest


def whole(folder: Path) -> list[Path]:
    """Return the checkpoints below `folder` that have a manifest, by step, the newest last."""
    if not folder.is_dir():
        return []
    found = {p.name: p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / "manifest.json").is_file()}
    moved = [name for name in found if name.startswith(".") and name[1:].removesuffix(".before") in found]
    return sorted((path for name, path in found.items() if name not in moved), key=_step)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def newest(folder: Path, warn: Callable[[str], None], before: int | None = None) -> Contents | None:
    """Read the newest whole checkpoint; a damaged one is named through `warn`, and the one before it is used.

    Args:
        folder: where the checkpoints are.
        warn: told of a damaged one.
        before: only of fewer steps than this.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        RelayError: there are checkpoints, and all are damaged: never a silent fresh start.
        LaterReleaseError: the newest is of a later release, whose work would be lost.
    """
    damage = []
    for path in reversed(whole(folder)):
        if before is not None and _step(path) >= before:
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
    """Return the checkpoint with the highest score (of equal ones the earliest), or None if none was scored."""
    ranked = _ranked(whole(folder))
    return ranked[0] if ranked else None


def _ranked(paths: Sequence[Path]) -> list[Path]:
    """Return the scored ones of these, the best first; one whose manifest is damaged has no score."""
    scores: dict[Path, float] = {}
    for path in paths:
        with suppress(RelayError):
            score = read_manifest(path).score
            if score is not None:
                scores[path] = score
    return sorted(scores, key=lambda path: scores[path], reverse=True)


def find(folder: Path, which: str) -> Path:
    """Return a checkpoint by what a person calls it: "best" (the last where none was scored), "last", or a step.

    Raises:
        UsageError: there is no such checkpoint; the text lists those there are.
    """
    paths = [path for path in whole(folder) if _has_manifest(path)]
    by_step = {str(_step(path)): path for path in paths}
    if not paths:
        raise UsageError(f"{folder} has no checkpoint yet")
    if which == "best":
        return best(folder) or paths[-1]
    if which == "last":
        return paths[-1]
    if which not in by_step:
        raise UsageError(f"{folder} has no checkpoint '{which}': there are best, last, {', '.join(by_step)}")
    return by_step[which]


def prune(folder: Path, keep: int, keep_best: int) -> None:
    """Delete all checkpoints but the newest `keep` and the best `keep_best`; the newest one always stays.

    One whose manifest is damaged counts as neither, and stays for a person to look at.
    """
    paths = [path for path in whole(folder) if _has_manifest(path)]
    kept = {*paths[-max(keep, 1) :], *_ranked(paths)[:keep_best]}
    for path in paths:
        if path not in kept:
            _remove(path)


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of more steps than this, the newest first: what is left goes on without a gap."""
    for path in reversed(whole(folder)):
        if _step(path) > step:
            _remove(path)


def clean(folder: Path) -> None:
    """Delete what a killed process left behind; nobody else may be writing here."""
    for pattern in (".step-*.partial", ".step-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _has_manifest(path: Path) -> bool:
    try:
        read_manifest(path)
    except LaterReleaseError:
        return True
    except RelayError:
        return False
    return True


def _remove(path: Path) -> None:
    removed = path.with_name(f".{path.name.strip('.')}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)  # first: a half-deleted folder must not count
    shutil.rmtree(removed)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    safetensors.torch.save_file(ordered, path, metadata={"format": "pt"})
    _flush(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise RelayError(f"{path} can't be read: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise RelayError(f"{path} has {path.stat().st_size:,} bytes, more than any checkpoint's")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RelayError(f"{path} can't be read: {error}") from error


def _write_flushed(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _flush(path)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
