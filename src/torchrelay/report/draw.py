"""The process that draws a run's plots: `python -m torchrelay.report.draw FOLDER PARENT HEADLINE [--confusion]`."""

import contextlib
import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from torchrelay.report.confusion import confusion_matrix
from torchrelay.report.plots import curves
from torchrelay.report.style import save
from torchrelay.run.metrics import Headline

# The lowest priority: training threads wait for each other, so one that is held up briefly holds up all of them.
_NICENESS = 19
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def draw(folder: Path, headline: Headline, *, confusion: bool) -> None:
    """Draw curves.png and, if asked to, confusion.png."""
    curves(folder, headline)
    if confusion:
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        matrix = np.array(evaluation["confusion_matrix"], np.int64)
        names = list(evaluation.get("accuracy_by_class", {}))
        when = f"after epoch {evaluation['epoch']}" if "epoch" in evaluation else ""
        save(confusion_matrix(matrix, names, when), folder / "confusion.png")


def _exit_with(parent: int) -> None:
    """Exit when the training process does: a resumed run may draw into the same files."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # without prctl the plots are done within seconds
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != parent:
        sys.exit()


def main() -> None:
    """Draw what the command line asks for."""
    folder, parent, headline, *confusion = sys.argv[1:]
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    _exit_with(int(parent))
    draw(Path(folder), Headline(**json.loads(headline)), confusion=bool(confusion))


if __name__ == "__main__":
    main()
