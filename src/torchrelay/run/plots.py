"""Step 1: the pictures of a run's folder, drawn from its files by a short process of their own.

matplotlib takes a second to come and then stays with its process, some 30 MB until that ends. So a training doesn't
import it: what draws ends with the drawing, and the training goes on meanwhile.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from torchrelay.report.curves import Headline, confusion_matrix, curves, save

_PATIENCE = 60.0  # seconds that a drawing may take on a machine with much to do
_LAST = 19  # a training's threads wait for each other: one that is held up for a moment holds up all of them for long
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class Drawing:
    """Draws a run's pictures beside the training, one process at a time.

    Args:
        folder: the run's.
        say: told what could not be drawn; no picture is worth the run.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self._say = say
        self._process: subprocess.Popen[str] | None = None

    def start(self, headline: Headline, *, confusion: bool = False) -> None:
        """Begin to draw curves.png, and confusion.png from evaluation.json; an earlier drawing is awaited."""
        self.finish()
        command = [sys.executable, "-P", "-m", __name__, str(self.folder), str(os.getpid())]
        command += [json.dumps(asdict(headline)), *["--confusion"] * confusion]
        places = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:  # in a session of its own, which Ctrl-C doesn't reach
            self._process = subprocess.Popen(  # noqa: S603 - it is this module
                command,
                env=places,
                text=True,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            self._say(f"the pictures can't be drawn: {error}")

    @property
    def busy(self) -> bool:
        """Whether a drawing is under way."""
        return self._process is not None and self._process.poll() is None

    def finish(self) -> bool:
        """Wait for the running drawing, if there is one, and say what went wrong; return whether all was drawn."""
        process, self._process = self._process, None
        if process is None:
            return False
        try:
            _, said = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            said = f"it took more than {_PATIENCE:.0f} s"
        if process.returncode:
            cause = (said.strip().splitlines() or [f"its process ended with {process.returncode}"])[-1]
            self._say(f"the pictures can't be drawn: {cause}")
        return not process.returncode


def draw(folder: Path, headline: Headline, *, confusion: bool) -> None:
    """Draw what `Drawing.start` asks for."""
    curves(folder, headline)
    if confusion:
        found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        matrix, names = np.array(found["confusion_matrix"], np.int64), list(found.get("accuracy_by_class", {}))
        save(confusion_matrix(matrix, names), folder / "confusion.png")


def _end_with(parent: int) -> None:
    """Let nothing be drawn any more once the training is gone: a resumed one may draw into the same files."""
    with contextlib.suppress(AttributeError, OSError):  # where there is no prctl, the drawing ends after a second
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def main() -> None:
    """Draw what the command line asks for."""
    folder, parent, headline, *confusion = sys.argv[1:]
    os.nice(_LAST)
    _end_with(int(parent))
    draw(Path(folder), Headline(**json.loads(headline)), confusion=bool(confusion))


if __name__ == "__main__":
    main()
