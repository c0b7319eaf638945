"""Step 1: the lines of a run's metrics.jsonl, from which all that is shown of a run is read, and the best of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrelay.errors import RelayError

Line = dict[str, Any]  # one line of metrics.jsonl: step, epoch, split, and metrics by name
SPLITS = ("train", "validation", "test")
ASKED = "asked"  # true in the line of an evaluation that a person asked for: there is no checkpoint of it
_NOT_METRICS = {"step", "epoch", "split", "time", "seconds", "lr", "samples_per_second", "loss", ASKED}
# Words in the names of metrics that are shown as percentages.
_SHARES = ("accuracy", "f1", "precision", "recall", "auroc", "iou", "dice")


@dataclass(frozen=True)
class Headline:
    """The metric by which a run is judged."""

    name: str
    percent: bool
    higher_is_better: bool

    @property
    def words(self) -> str:
        """The name with spaces, for people."""
        return self.name.replace("_", " ")


def read_metrics(folder: Path) -> list[Line]:
    """Return the lines of a run's metrics.jsonl, without a last line that a killed process left half-written.

    Raises:
        RelayError: there is no such file, or a line before the last is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise RelayError(f"{folder} has no metrics.jsonl: give the folder of a run")
    texts = path.read_bytes().splitlines()
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("it isn't a table")  # noqa: TRY004, TRY301 - a damaged line like the others
            lines.append(line)
        except (ValueError, RecursionError) as error:
            if number < len(texts):
                raise RelayError(f"line {number} of {path} is damaged: remove it to read the rest") from error
    return lines


def headline_of(lines: Sequence[Line]) -> Headline:
    """Guess the metric by which a run is judged: accuracy, else the first besides the loss, else the loss."""
    names = [name for line in lines if line["split"] in SPLITS for name in line if name not in _NOT_METRICS]
    return headline_named("accuracy" if "accuracy" in names else next(iter(names), "loss"))


def headline_named(name: str) -> Headline:
    """Return a metric by its name, which tells whether it is a share, of which more is better."""
    is_share = any(word in name for word in _SHARES)
    return Headline(name, percent=is_share, higher_is_better=is_share)


def best_line(lines: Sequence[Line], headline: Headline) -> Line | None:
    """Return the line of the best evaluation (the first of equal ones), by validation data where there are any.

    Returns:
        None if nothing was evaluated.
    """
    for split in ("validation", "test"):
        regular = [line for line in lines if line["split"] == split and not line.get(ASKED)]
        evaluated = [line for line in regular if math.isfinite(value(line, headline.name))]
        if evaluated:
            sign = -1.0 if headline.higher_is_better else 1.0
            return min(evaluated, key=lambda line: sign * value(line, headline.name))
    return None


def value(line: Mapping[str, Any], name: str) -> float:
    """Return a metric of a line, or NaN if it is missing or null."""
    number = line.get(name)
    return math.nan if number is None else float(number)
