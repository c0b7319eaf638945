"""Step 1: what recipe.toml records of a run that has started."""

import tomllib
from pathlib import Path
from typing import Any

from torchrelay.errors import explained, intact


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
        record = tomllib.loads(path.read_text(encoding="utf-8"))
        if wrong := [name for name, section in record.items() if not isinstance(section, dict)]:
            raise ValueError(f"'{wrong[0]}' isn't a section")
        if "run" not in record:  # an empty file would train another run
            raise ValueError("it has no section [run]")
    return record
