"""`torchrelay new NAME`: a folder to begin with, in which everything runs."""

import argparse
from pathlib import Path

from torchrelay.errors import UsageError, explained
from torchrelay.recipe import shipped

HELP = "make a folder with data, a network, a task, a recipe, a test and a notebook of your own, all running"
_TEMPLATE = Path(shipped.__file__).parents[1] / "template"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("name", type=Path, metavar="NAME", help="the new folder")


def run(options: argparse.Namespace) -> None:
    """Write the files."""
    folder: Path = options.name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already: choose a new name, or an empty folder")
    name = folder.resolve().name
    with explained(f"write {folder}", "choose another place"):
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(path for path in _TEMPLATE.iterdir() if path.is_file()):
            text = source.read_text(encoding="utf-8").replace("PROJECT", _plain(name))
            # Code has a suffix more in the package, where tools would take it for a part of it.
            (folder / source.name.removesuffix(".txt")).write_text(text, encoding="utf-8")
    print(f"{folder} is ready; its README.md says what is what. To begin:")
    print(f"  cd {folder}\n  torchrelay train recipe.toml --code project.py")


def _plain(name: str) -> str:
    """Return a name without what would end a string or a comment of the files."""
    return "".join(letter if letter.isprintable() and letter not in '"\\' else "_" for letter in name)
