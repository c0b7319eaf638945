"""What a run's folder says of the run at a glance."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torchrelay.errors import RelayError, UsageError
from torchrelay.run.lock import is_locked
from torchrelay.run.metrics import ASKED, Headline, Line, headline_of, read_metrics, value
from torchrelay.run.record import read_record

# Keys that tell runs of one recipe apart, and those that say how a run is watched: they make no other recipe.
SEED = "run.seed"
_WATCHING = (
    "run.log_every",
    "run.receipt_every",
    "run.notify",
    "run.trackers",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_best",
)


@dataclass(frozen=True)
class Facts:
    """A run.

    Attributes:
        folder: its own.
        name: that people see.
        settings: the recipe's values by dotted names, without unset ones.
        versions: of packages and code.
        lines: of its metrics.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    lines: Sequence[Line]

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.settings.get(SEED, 0))

    @property
    def recipe(self) -> dict[str, Any]:
        """What makes the recipe: the settings without the seed, and without those by which nothing is computed."""
        return {key: each for key, each in self.settings.items() if key != SEED and key not in _WATCHING}

    @cached_property
    def headline(self) -> Headline:
        """The metric by which the run is judged."""
        return headline_of(self.lines)

    @property
    def split(self) -> str:
        """The part of the data on which it is judged: test, else validation, else train."""
        found = {line["split"] for line in self.lines}
        return next((split for split in ("test", "validation") if split in found), "train")

    def at_end(self, metric: str) -> float:
        """Return a metric of the last evaluation; NaN if there is none."""
        evaluated = [value(line, metric) for line in self.lines if line["split"] == self.split]
        return evaluated[-1] if evaluated else math.nan

    def at_best(self, headline: Headline) -> float:
        """Return the best of a metric's values; NaN if there is none."""
        regular = [line for line in self.lines if line["split"] == self.split and not line.get(ASKED)]
        evaluated = [value(line, headline.name) for line in regular]
        known = [each for each in evaluated if math.isfinite(each)]
        return (max if headline.higher_is_better else min)(known, default=math.nan)

    @property
    def epoch(self) -> int:
        """The epoch that it has reached."""
        return max((line["epoch"] for line in self.lines), default=0)

    @property
    def seconds(self) -> float:
        """For how long it was trained; its start, evaluations and checkpoints aside."""
        return math.fsum(line.get("seconds") or 0.0 for line in self.lines if line["split"] == "train")

    @cached_property
    def status(self) -> str:
        """Whether it is running, done, or stopped before its end."""
        if is_locked(self.folder / "lock"):
            return "running"
        evaluation = self.folder / "evaluation.json"
        try:
            ended = json.loads(evaluation.read_text(encoding="utf-8")).get("step") if evaluation.exists() else None
        except (OSError, ValueError):
            ended = None
        last = max((line["step"] for line in self.lines), default=-1)
        epochs = self.settings.get("run.epochs")
        is_whole = self.split == "train" and epochs is not None and self.epoch >= epochs
        return "done" if ended == last or is_whole else "stopped"


def read_facts(folder: Path, name: str = "") -> Facts:
    """Read a run.

    Raises:
        UsageError: the folder isn't a run.
        RelayError: a file of it is damaged.
    """
    if not is_run(folder):
        raise UsageError(
            f"{folder} isn't a run: it lacks recipe.toml or metrics.jsonl; give a folder that 'torchrelay train' made"
        )
    record = read_record(folder)
    versions = record.pop("environment", {})
    settings = {f"{section}.{key}": each for section, values in record.items() for key, each in values.items()}
    lines = [line for line in read_metrics(folder) if {"split", "step", "epoch"} <= line.keys()]
    return Facts(folder, name or str(folder), settings, versions, lines)


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's."""
    return (folder / "recipe.toml").is_file() and (folder / "metrics.jsonl").is_file()


def find_runs(root: Path) -> Iterator[Path]:
    """Yield the runs in a folder and in the folders below it, sorted.

    Raises:
        UsageError: there is no such folder.
    """
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}: give one that holds runs")
    for path, folders, _ in os.walk(root):
        folders.sort()
        if is_run(Path(path)):
            folders.clear()  # a run holds no other
            yield Path(path)


def read_all(root: Path) -> tuple[list[Facts], list[str]]:
    """Return the runs below a folder, and a line for each that can't be read."""
    found, damaged = [], []
    for path in find_runs(root):
        try:
            found.append(read_facts(path, str(path.relative_to(root)) if path != root else path.name))
        except RelayError as error:
            damaged.append(str(error))
    return found, damaged


def varied(runs: Sequence[Facts]) -> list[str]:
    """Return the recipe keys in which runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({_key(run.settings.get(key)) for run in runs}) > 1]


def shown(setting: Any) -> str:
    """Return a setting as a person writes it."""
    if setting is None:
        return "unset"
    return setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)


def _key(setting: Any) -> str:
    return json.dumps(setting, sort_keys=True, default=str)
