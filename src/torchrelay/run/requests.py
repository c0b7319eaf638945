"""Step 1: what people ask of a run that goes on: a file in its folder for each request, until it is done."""

import time
from collections.abc import Sequence
from pathlib import Path

from torchrelay.errors import explained

REQUESTS = {
    "stop": "save and end, as at SIGTERM",
    "save": "save a checkpoint, which goes when the next regular one is saved",
    "evaluate": "evaluate, which changes nothing that is trained",
}
_SECONDS = 1.0  # between two looks at the folder: a step costs a look at the clock


def file_of(folder: Path, request: str) -> Path:
    """Return the file by which a run is asked."""
    return folder / f"asked-{request}"


class Requests:
    """Finds the requests in a run's folder.

    Args:
        folder: the run's; None: there are never any.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files = {} if folder is None else {request: file_of(folder, request) for request in REQUESTS}
        self._found: set[str] = set()
        self._next = 0.0

    def look(self) -> Sequence[str]:
        """Return the requests that have come since the last look, which is at least a second ago."""
        now = time.monotonic()
        if now < self._next:
            return ()
        self._next = now + _SECONDS
        new = [request for request, file in self._files.items() if request not in self._found and file.exists()]
        self._found.update(new)
        return new

    def done(self, request: str) -> None:
        """Remove a request; from any thread.

        Raises:
            RelayError: the file can't be removed.
        """
        if self._files:
            with explained(f"remove {self._files[request]}"):
                self._files[request].unlink(missing_ok=True)
            self._found.discard(request)

    def clear(self) -> None:
        """Remove all requests, as nobody is there to do them."""
        for request in self._files:
            self.done(request)
