"""Step 1: plots of a run's folder, drawn from its files by a short-lived process of their own.

Importing matplotlib takes a second and 30 MB that a process keeps until it ends. So the training process never imports
it: it starts `torchrelay.report.plots` and trains on.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torchrelay.run.metrics import Headline

_TIMEOUT = 60.0  # seconds; generous, for a machine under load
_MODULE = "torchrelay.report.plots"  # by name: this folder imports nothing of report/


class PlotProcess:
    """Draws a run's plots in a child process, one at a time, while training continues.

    Args:
        folder: the run's folder.
        say: called with a message when drawing fails; a plot is never worth stopping the run for.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self._say = say
        self._process: subprocess.Popen[str] | None = None
        self._warned: set[str] = set()

    def start(self, headline: Headline, *, confusion: bool = False) -> None:
        """Start drawing curves.png and, from evaluation.json, confusion.png; first wait for an earlier process."""
        self.finish()
        command = [sys.executable, "-P", "-m", _MODULE, str(self.folder), str(os.getpid())]
        command += [json.dumps(asdict(headline)), *["--confusion"] * confusion]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:  # in a new session, so that Ctrl-C doesn't reach it
            self._process = subprocess.Popen(  # noqa: S603 - the command is our own module
                command,
                env=environment,
                text=True,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            self._say(f"the plots can't be drawn: {error}")

    @property
    def busy(self) -> bool:
        """Whether a process is drawing."""
        return self._process is not None and self._process.poll() is None

    def finish(self) -> bool:
        """Wait for the drawing process, if any, and say what went wrong; return whether all was drawn."""
        process, self._process = self._process, None
        if process is None:
            return False
        try:
            _, errors = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors = f"drawing took more than {_TIMEOUT:.0f} s"
        if process.returncode:
            cause = (errors.strip().splitlines() or [f"the process exited with code {process.returncode}"])[-1]
            self._say(f"the plots can't be drawn: {cause}")
        # They are drawn again and again, but a warning of theirs is said once.
        warnings = [line for line in errors.splitlines() if line.startswith("warning: ") and line not in self._warned]
        for line in warnings:
            self._say(line)
        self._warned.update(warnings)
        return not process.returncode
