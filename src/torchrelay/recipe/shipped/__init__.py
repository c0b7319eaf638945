"""The recipes that ship with torchrelay, one TOML file each. Reading them needs no torch."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def headers() -> dict[str, str]:
    """Return each shipped recipe's name with the first line of its header, sorted by name."""
    files = sorted(_FOLDER.glob("*.toml"), key=lambda path: path.stem)
    return {path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for path in files}


def path(name: str) -> Path | None:
    """Return the file of a shipped recipe, or None where none has that name."""
    return next((file for file in _FOLDER.glob("*.toml") if file.stem == name), None)
