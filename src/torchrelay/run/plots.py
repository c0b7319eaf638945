"""Step 1: plots of a run's folder, drawn from its files by a short-lived process of their own.

Importing matplotlib takes half a second and 30 MB that a process keeps until it ends. So the training process never
imports it: it starts `torchrelay.report.plots` and trains on. That process has imported all when it is asked to draw,
if it was started early enough, so a short run's end doesn't wait for it.
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
PATIENCE = 15.0  # seconds for which a process waits for a request: then it ends, so that a long run keeps no memory
UNASKED = 76  # the exit code of one that did


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
        self._request = ""  # what it was asked for; "" while it only waits
        self._warned: set[str] = set()

    def prepare(self) -> None:
        """Start a process that imports what it needs, and waits to be asked; nothing is said if there can be none."""
        if not self.busy and not self._request:
            self._discard()
            self._launch(quiet=True)

    def start(self, headline: Headline, *, confusion: bool = False, report: bool = False) -> None:
        """Start drawing curves.png and, from evaluation.json, confusion.png; first wait for an earlier drawing.

        Args:
            headline: the metric that the curves show.
            confusion: whether there is a confusion matrix.
            report: whether report.html is written as well.
        """
        self.finish()
        asked = {"headline": asdict(headline), "confusion": confusion, "report": report}
        self._request = json.dumps(asked) + "\n"
        if self._process is None or not self._ask():
            self._discard()
            self._launch()
            self._ask()

    @property
    def busy(self) -> bool:
        """Whether a process is drawing, or waits to be asked."""
        return self._process is not None and self._process.poll() is None

    @property
    def drawing(self) -> bool:
        """Whether a process is drawing."""
        return self.busy and bool(self._request)

    def finish(self) -> bool:
        """Wait for the drawing, if there is one, and say what went wrong; return whether all was drawn."""
        if not self._request or self._process is None:
            self._request = ""
            return False
        code, errors = self._wait(self._process)
        if code == UNASKED:  # it was about to end when it was asked
            self._launch()
            if self._process is None or not self._ask():
                self._request = ""
                return False
            code, errors = self._wait(self._process)
        self._request, self._process = "", None
        if code:
            cause = (errors.strip().splitlines() or [f"the process exited with code {code}"])[-1]
            self._say(f"the plots can't be drawn: {cause}")
        # They are drawn again and again, but a warning of theirs is said once.
        for line in errors.splitlines():
            if line.startswith("warning: ") and line not in self._warned:
                self._warned.add(line)
                self._say(line)
        return not code

    def close(self) -> None:
        """Finish the drawing, and end a process that only waits."""
        self.finish()
        self._discard()

    def _launch(self, *, quiet: bool = False) -> None:
        self._process = None
        command = [sys.executable, "-P", "-m", _MODULE, str(self.folder), str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        try:  # in a new session, so that Ctrl-C doesn't reach it
            self._process = subprocess.Popen(  # noqa: S603 - the command is our own module
                command,
                env=environment,
                text=True,
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            if not quiet:
                self._say(f"the plots can't be drawn: {error}")

    def _ask(self) -> bool:
        """Hand the request over; return whether there is a process that takes it."""
        process = self._process
        if process is None or process.stdin is None or process.poll() is not None:
            return False
        try:
            process.stdin.write(self._request)
            process.stdin.flush()
        except OSError:
            return False
        return True

    def _wait(self, process: "subprocess.Popen[str]") -> tuple[int, str]:
        """Wait until a process ends; return its exit code and what it wrote to standard error."""
        try:
            _, errors = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors = f"drawing took more than {_TIMEOUT:.0f} s"
        return process.returncode, errors

    def _discard(self) -> None:
        """End a process that wasn't asked for anything."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
