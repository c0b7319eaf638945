"""Step 3: the format of checkpoints, which appear atomically.

`checkpoints/step-00001234/` holds `model.safetensors` (the raw weights, which any program can load), `ema.safetensors`
if weights are averaged, `state.safetensors` and `state.json` (everything else that a resume needs) and `manifest.json`
(size and SHA-256 of each file). Nothing is pickled: loading a checkpoint runs no code.

Writing: files into a folder beside the target, each flushed; the manifest; the folder flushed; renamed; the parent
flushed. A crash in between leaves a folder whose name starts with a dot, which readers ignore, except for a checkpoint
that was moved aside to be replaced by another of the same step.
"""

import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel
from torch import Tensor

from torchrelay.errors import RelayError, explained, intact
from torchrelay.run.disk import flush, flush_folder

FORMAT = 1  # raised whenever an older release can no longer read what we write
CHECKPOINT_NAME = re.compile(r"\.?step-(\d{8,})(\.before)?")  # with a dot and a suffix: moved aside
WEIGHTS = "model.safetensors"
_NEEDED = {WEIGHTS, "state.safetensors", "state.json"}
_METADATA = {"format": "pt"}  # of each file of tensors
_INTERIM = "interim.txt"  # a file and not an entry of the manifest, whose fields earlier releases know
# Bytes, and values that have a name or hold others; enough for a state of a million numbers, too few for a bomb.
_LARGEST_JSON, _MOST_NESTED = 64 * 2**20, 2 * 10**6


class LaterReleaseError(RelayError):
    """The checkpoint was written by a later release: it isn't damaged, so an earlier one must not replace it."""


class File(BaseModel, extra="forbid"):
    """A file's entry in the manifest."""

    bytes: int
    sha256: str


class Manifest(BaseModel, extra="forbid"):
    """A checkpoint's manifest."""

    format: int
    step: int
    score: float | None
    metrics: dict[str, float | None]  # None: not finite, which JSON can't represent
    files: dict[str, File]
    checksum: str = ""  # of all fields above

    @property
    def is_interim(self) -> bool:
        """Whether the checkpoint was saved because a signal stopped the run."""
        return _INTERIM in self.files

    def own_checksum(self) -> str:
        """Compute the checksum that this manifest should have."""
        return hashlib.sha256(self.model_dump_json(exclude={"checksum"}).encode()).hexdigest()


@dataclass(frozen=True)
class Contents:
    """The contents of one checkpoint."""

    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]  # nested dicts, lists, tuples, tensors, numbers, strings
    ema: dict[str, Tensor] | None = None
    score: float | None = None  # the headline metric, higher is better; None if not evaluated
    metrics: dict[str, float] = field(default_factory=dict)
    weights: tuple[str, ...] = ()  # names in `model` that only an optimizer step changes
    trained: tuple[str, ...] = ()  # those that it does change and that must be finite; a mask may hold -inf
    interim: bool = False  # saved because a signal stopped the run: an undisturbed run has no such checkpoint

    def check_finite(self) -> None:
        """Check that trained weights are finite.

        Raises:
            RelayError: one isn't; the message names it.
        """
        for name in self.trained:
            if not bool(torch.isfinite(self.model[name]).all()):
                raise RelayError(
                    f"the weights '{name}' are not finite after step {self.step}, so they are not saved: resume from "
                    "the checkpoint before, with a lower optimizer.lr or optimizer.clip_norm=1"
                )


# ------------------------------------------------------------------------------------------------ trees as JSON


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into a skeleton that JSON can hold and its tensors by path.

    Raises:
        TypeError: the tree holds anything but dicts, lists, tuples, tensors, numbers, strings and None.
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
    """Put the tensors back into a skeleton from `pack`."""
    if not skeleton or not isinstance(skeleton, list | dict):
        return skeleton
    if isinstance(skeleton, list):
        return [unpack(value, tensors) for value in skeleton]
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
    """Write a checkpoint into `folder`, atomically, and return its path.

    Raises:
        RelayError: the disk is full or can't be written; existing checkpoints are untouched.
    """
    target = folder / f"step-{contents.step:08d}"
    staging = folder / f".{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        skeleton, tensors = pack(contents.state)
        _write_tensors(staging / WEIGHTS, contents.model)
        if contents.ema is not None:
            _write_tensors(staging / "ema.safetensors", contents.ema)
        _write_tensors(staging / "state.safetensors", tensors)
        _write_flushed(staging / "state.json", _state_json(skeleton))
        if contents.interim:
            _write_flushed(staging / _INTERIM, b"Saved as a signal stopped the run; the next checkpoint replaces it.\n")
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
        flush_folder(staging)
        before = folder / f".{target.name}.before"
        # A checkpoint of the same step, from before a resume: rename can't replace a folder that isn't empty.
        if target.exists():
            shutil.rmtree(before, ignore_errors=True)
            target.rename(before)
        staging.rename(target)
        flush_folder(folder)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        needed = sum(t.nbytes for t in (*contents.model.values(), *pack(contents.state)[1].values()))
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        cause = getattr(error, "strerror", None) or error
        raise RelayError(
            f"can't save {target}: {cause}; it needs {needed:,} bytes and {free:,} are free: "
            "make room or repair the disk, then resume the run"
        ) from error
    return target


def read(path: Path) -> Contents:
    """Read a checkpoint and verify every checksum.

    Raises:
        RelayError: the checkpoint is damaged, or of a later release; the message names the file.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        with explained(f"read {file}"):
            if file.is_symlink() or Path(name).name != name:
                raise RelayError(f"{path}/manifest.json names '{name}', which isn't a plain file beside it")
            if not file.is_file():
                raise RelayError(f"{file} is missing")
            if file.stat().st_size != entry.bytes:
                raise RelayError(f"{file} has {file.stat().st_size:,} bytes instead of {entry.bytes:,}")
            if _sha256(file) != entry.sha256:
                raise RelayError(f"{file} doesn't match its checksum")
    skeleton, tensors = _read_json(path / "state.json"), _read_tensors(path / "state.safetensors")
    with intact(path / "state.json", "remove this checkpoint to resume from the one before"):
        state = unpack(skeleton, tensors)
        if not isinstance(state, dict):
            raise TypeError("it isn't a table")
    ema = _read_tensors(path / "ema.safetensors") if "ema.safetensors" in manifest.files else None
    model = _read_tensors(path / WEIGHTS)
    metrics = {name: math.nan if value is None else value for name, value in manifest.metrics.items()}
    return Contents(manifest.step, model, state, ema, manifest.score, metrics, interim=manifest.is_interim)


def read_manifest(path: Path) -> Manifest:
    """Read and verify a checkpoint's manifest, without its tensors.

    Raises:
        RelayError: it is missing, damaged or not one of ours.
        LaterReleaseError: it was written by a later release.
    """
    content = _read_json(path / "manifest.json")
    if isinstance(content, dict) and isinstance(number := content.get("format"), int) and number > FORMAT:
        raise LaterReleaseError(f"{path} was written by a later release (format {number}): upgrade torchrelay")
    try:
        manifest = Manifest.model_validate(content)
        checksum = manifest.own_checksum()
    except ValueError as error:  # pydantic's, also of text that isn't Unicode
        raise RelayError(f"{path}/manifest.json isn't a checkpoint's manifest") from error
    if manifest.checksum != checksum:
        raise RelayError(f"{path}/manifest.json doesn't match its checksum")
    if manifest.step != step_of(path) or not manifest.files.keys() >= _NEEDED:
        raise RelayError(f"{path}/manifest.json is that of another folder")
    return manifest


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, or -1 if it is no checkpoint's."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def weights_hash(weights: dict[str, Tensor]) -> str:
    """Return the SHA-256 that the file of these weights has in a checkpoint."""
    return hashlib.sha256(safetensors.torch.save(_ordered(weights), metadata=_METADATA)).hexdigest()


def _ordered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(_ordered(tensors), path, metadata=_METADATA)
    flush(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise RelayError(f"{path} can't be read: {error}") from error


def _state_json(skeleton: Any) -> bytes:
    """Return a state as JSON that `read` will take."""
    content = json.dumps(skeleton, allow_nan=False).encode()
    if _is_too_large(content):
        raise RelayError(
            f"the run's state has {len(content):,} bytes beside its tensors, too many for a checkpoint: return less "
            "from the state_dict() of callbacks and datasets, or tensors in place of lists"
        )
    return content


def _read_json(path: Path) -> Any:
    try:
        content = path.read_bytes() if path.stat().st_size <= _LARGEST_JSON else None
        if content is None or _is_too_large(content):
            raise RelayError(f"{path} has {path.stat().st_size:,} bytes, more than any checkpoint's")
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise RelayError(f"{path} can't be read: {error}") from error


def _is_too_large(content: bytes) -> bool:
    return len(content) > _LARGEST_JSON or sum(content.count(each) for each in (b"[", b"{", b":")) > _MOST_NESTED


def _write_flushed(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    flush(path)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
