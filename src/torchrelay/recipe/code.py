"""The user's own Python file (`--code`), and the versions that a run records."""

import hashlib
import importlib.util
import platform
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch

from torchrelay import __version__
from torchrelay.errors import RelayError, UsageError

_LARGEST = 10 * 2**20  # bytes of a file of code


def load_code(path: str | Path) -> ModuleType:
    """Run a Python file and return it as a module.

    Args:
        path: the file, as given by `--code`.

    Raises:
        UsageError: the file doesn't exist, or isn't a Python file.
        RelayError: the file raised an error; the text quotes it and its line.
    """
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"--code {path} is a folder: give a Python file, such as my_net.py")
    if not file.is_file():
        raise UsageError(f"--code {path}: there is no such file")
    if file.stat().st_size > _LARGEST:
        raise UsageError(f"--code {path} has {file.stat().st_size:,} bytes, too many for code: give a Python file")
    spec = importlib.util.spec_from_file_location(f"torchrelay_code_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--code {path}: this isn't a Python file: give one, such as my_net.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up by name.
    sys.modules[spec.name] = module
    # The file can import its neighbors, as a script can.
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f" (line {lines[-1]})" if lines else ""
        raise RelayError(f"--code {path} fails: {type(error).__name__}: {error}{where}") from error
    return module


def environment(code: ModuleType | None = None) -> dict[str, str]:
    """Return what a run records beside its recipe: versions, the user's file, the git commit of the current folder."""
    record = {"torchrelay": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if code is not None and code.__file__ is not None:
        record["code"] = code.__file__
        record["code_sha256"] = hashlib.sha256(Path(code.__file__).read_bytes()).hexdigest()
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(describe, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return record
    return record | ({"git": git.stdout.strip()} if git.returncode == 0 else {})
