"""Step 1: the lines of a run's metrics.jsonl, from which everything that is shown of a run is read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrelay.errors import RelayError

Line = dict[str, Any]  # one line of metrics.jsonl: step, epoch, split, and metrics by name


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
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise RelayError(f"line {number} of {path} is damaged: remove it to read the rest") from error
    return lines
