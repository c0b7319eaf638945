"""Step 1: what a run's folder records of its start: the recipe in recipe.toml, and the files of its data."""

import gzip
import json
import tomllib
from pathlib import Path
from typing import Any

from torchrelay.errors import explained, intact

_LARGEST = 4 * 2**20  # bytes of recipe.toml, which may hold the options of a large recipe
_RATIO = 200  # to which a list of files may expand: theirs is below 20, and a bomb's is 1,000


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a run's recipe.toml.

    Raises:
        RelayError: the file can't be read, or is damaged.
    """
    path = folder / "recipe.toml"
    with (
        explained(f"read {path}"),
        intact(path, "restore it from a copy, or correct it to what the run was started with"),
    ):
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too long")  # a parser would take minutes
        record = tomllib.loads(path.read_text(encoding="utf-8"))
        if wrong := [name for name, section in record.items() if not isinstance(section, dict)]:
            raise ValueError(f"'{wrong[0]}' isn't a section")
        if "run" not in record:  # an empty file would train another run
            raise ValueError("it has no section [run]")
    return record


def read_files(folder: Path) -> dict[str, str]:
    """Return what tells the content of each file of a run's data apart, by name; empty if there are no files.

    Raises:
        RelayError: the list can't be read, or is damaged.
    """
    path = folder / "files.json.gz"
    if not path.exists():
        return {}
    most = _RATIO * path.stat().st_size
    with explained(f"read {path}"), intact(path, "remove it to resume without the names of changed files"):
        with gzip.open(path) as file:
            content = file.read(most + 1)
        marks = json.loads(content)
        if len(content) > most or not isinstance(marks, dict):
            raise ValueError("it isn't a list of files")
    return marks
