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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from torchrelay.errors import RelayError

FORMAT = 1  # raised when an older release could no longer read what we write
CHECKPOINT_NAME = re.compile(r"\.?step-(\d{8,})(\.before)?")  # with a dot and an end: moved aside
_NEEDED = {"model.safetensors", "state.safetensors", "state.json"}
_LARGEST_JSON = 64 * 2**20  # bytes; a state of a million numbers is below it, a bomb isn't


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
    if manifest.step != step_of(path) or not manifest.files.keys() >= _NEEDED:
        raise RelayError(f"{path}/manifest.json is that of another folder")
    return manifest


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, or -1 if it is no checkpoint's."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


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
    """Flush a folder's entries to disk; Windows can neither open a folder nor needs to."""
    if os.name == "nt":
        return
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
