"""What a run's folder says of the run, read without torch. A run that has just begun lacks most of its files."""

import io
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from torchrelay.errors import RelayError, UsageError
from torchrelay.run.metrics import Headline, Line, headline_of, read_metrics
from torchrelay.run.record import read_record

Column = npt.NDArray[Any]
_FIRST_BATCH = "pictures/first batch"
_MOST_RECORD = 64 * 2**20  # bytes of a record of TensorBoard's that is read


@dataclass(frozen=True)
class Facts:
    """What is known of a run."""

    folder: Path
    record: dict[str, dict[str, Any]]  # the sections of recipe.toml
    lines: list[Line]  # of metrics.jsonl
    headline: Headline
    evaluation: dict[str, Any] = field(default_factory=dict)  # evaluation.json
    samples: Mapping[str, Column] = field(default_factory=dict)  # the columns of samples.safetensors
    about: dict[str, Any] = field(default_factory=dict)  # which evaluation those are of
    first_batch: bytes = b""  # a PNG file
    cost: str = ""  # what a sample costs, in the words of the log
    notes: list[str] = field(default_factory=list)  # what couldn't be read, and why

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def classes(self) -> list[str]:
        """The names of the classes; empty if there are none."""
        return [*next((each for each in self.evaluation.values() if isinstance(each, dict)), ())]

    @property
    def from_python(self) -> bool:
        """Whether a script started the run, and not a recipe."""
        return self.record.get("environment", {}).get("started_from") == "python"


def read_facts(folder: Path) -> Facts:
    """Read a run's folder.

    Raises:
        UsageError: it isn't a run.
        RelayError: its recipe or its metrics are damaged.
    """
    if not (folder / "recipe.toml").is_file():
        raise UsageError(f"{folder} isn't a run: it has no recipe.toml; give the folder of a run")
    record = read_record(folder)
    lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    lines = [line for line in lines if {"step", "epoch", "split"} <= line.keys()]
    notes = list[str]()
    evaluation = _evaluation(folder, notes)
    samples, about = _samples(folder, notes)
    if samples and about.get("step") != evaluation.get("step"):
        notes.append("samples.safetensors is of another evaluation than evaluation.json, and left out.")
        samples = {}
    batch, cost = _first_batch(folder, notes), _cost(folder)
    headline = about.get("headline") or headline_of(lines)
    return Facts(folder, record, lines, headline, evaluation, samples, about, batch, cost, notes)


def _evaluation(folder: Path, notes: list[str]) -> dict[str, Any]:
    path = folder / "evaluation.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        notes.append(f"evaluation.json can't be read: {error}.")
        return {}
    return found if isinstance(found, dict) else {}


def _samples(folder: Path, notes: list[str]) -> tuple[dict[str, Column], dict[str, Any]]:
    path = folder / "samples.safetensors"
    if not path.exists():
        return {}, {}
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {})["about"])
            about["headline"] = Headline(**about["headline"])
            return {name: file.get_tensor(name) for name in about["columns"]}, about
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        notes.append(f"samples.safetensors can't be read: {error}.")
        return {}, {}


def _first_batch(folder: Path, notes: list[str]) -> bytes:
    """Return the picture of the first batch as the network saw it."""
    try:
        for path in sorted((folder / "tensorboard").glob("*.media")):
            for record in _records(path):
                if _FIRST_BATCH.encode() in record:
                    from tensorboard.compat.proto.event_pb2 import Event

                    for value in Event.FromString(record).summary.value:
                        if value.tag == _FIRST_BATCH:
                            return bytes(value.image.encoded_image_string)
    except Exception as error:  # noqa: BLE001 - of a damaged file, whatever protobuf says; the picture is no need
        notes.append(f"TensorBoard's files can't be read: {error}.")
    return b""


def _records(path: Path) -> Iterator[bytes]:
    """Yield the records of an event file: a length, its checksum, the record, its checksum."""
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (size,) = struct.unpack("<Q", header[:8])
            if size <= _MOST_RECORD:
                yield file.read(size)
            else:
                file.seek(size, io.SEEK_CUR)
            file.seek(4, io.SEEK_CUR)


def _cost(folder: Path) -> str:
    try:
        with (folder / "log.txt").open(encoding="utf-8", errors="replace") as log:
            found = next((line for line in log if " a sample takes " in line[:40]), "")
    except OSError:
        return ""
    return found[20:].split(" (layers in")[0].strip()


def nearest_recipe(facts: Facts) -> tuple[str, dict[str, tuple[Any, Any]]] | None:
    """Return the shipped recipe that the run is closest to, and what differs: by key, its value and the run's.

    Returns:
        None for a run from Python, or where no recipe has the run's data.
    """
    from torchrelay.recipe import recipe, shipped

    if facts.from_python:
        return None
    try:
        own = _flat(recipe.load(str(facts.folder / "recipe.toml")).model_dump(mode="json", exclude_none=True))
    except (RelayError, OSError):
        own = _flat({name: each for name, each in facts.record.items() if name != "environment"})
    found = []
    for name in shipped.headers():
        theirs = _flat(recipe.load(name).model_dump(mode="json", exclude_none=True))
        if theirs.get("data.name") == own.get("data.name"):
            keys = dict.fromkeys([*theirs, *own])
            pairs = {
                key: (theirs.get(key), own.get(key)) for key in keys if _differs(key, theirs.get(key), own.get(key))
            }
            found.append((name, pairs))
    return min(found, key=lambda each: len(each[1]), default=None)


def _differs(key: str, theirs: Any, own: Any) -> bool:
    """Return whether a run was given another value; what it decided itself at its start isn't one."""
    decided = (theirs == "auto" and key != "device.name") or (theirs is None and key == "parallel.replicas")
    return theirs != own and not decided


def _flat(record: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    flat = dict[str, Any]()
    for key, value in record.items():
        flat |= _flat(value, f"{start}{key}.") if isinstance(value, Mapping) else {f"{start}{key}": value}
    return flat
