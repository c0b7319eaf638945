"""Step 1: the trackers that `run.trackers` names; each writes on a thread of its own, and none stops a run."""

import functools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchrelay.errors import UsageError, nearest
from torchrelay.run.metrics import Line
from torchrelay.run.trackers import Tracker

TENSORBOARD, GROUP = "tensorboard", "torchrelay.trackers"
# By name: the package and the class.
_OURS = {"wandb": "WandB", "mlflow": "MLflow", "trackio": "Trackio"}
_PATIENCE = 60.0  # seconds for which the end of a run waits for a tracker

Factory = Callable[[Path, Mapping[str, Any]], Tracker]


def factories(names: Sequence[str]) -> dict[str, Factory]:
    """Return what makes the trackers of these names, TensorBoard aside: a function of the run's folder and settings.

    Raises:
        UsageError: there is no such tracker, or its package isn't installed.
    """
    found: dict[str, Factory] = {}
    if not {*names} - {TENSORBOARD}:  # to read all packages' entry points takes tens of milliseconds
        return found
    others = {each.name: each for each in entry_points(group=GROUP)}
    for name in names:
        if name in _OURS and find_spec(name) is None:
            raise UsageError(
                f"run.trackers has '{name}', which isn't installed: pip install 'torchrelay[{name}]', or leave it out"
            )
        if name not in (TENSORBOARD, *_OURS, *others):
            known = [TENSORBOARD, *_OURS, *others]
            raise UsageError(
                f"run.trackers: there is no '{name}': choose from {', '.join(known)}{nearest(name, known)}"
            )
        if name != TENSORBOARD:
            found[name] = functools.partial(_make, name, others.get(name))
    return found


def _make(name: str, entry: EntryPoint | None, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    from torchrelay.run import backends

    factory = entry.load() if entry is not None else getattr(backends, _OURS[name])
    tracker: Tracker = factory(folder, settings)
    return tracker


class Named:
    """A tracker that can't hold up or stop a run: what goes wrong with it is one warning.

    Args:
        name: in the recipe.
        make: returns the tracker, without what it had of the run.
        say: called with the warning, on the thread that trains.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self._name, self._make, self._say = name, make, say
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._warned = False

    def write(self, line: Line) -> None:
        """Hand over a line."""
        self._warn()
        if self._thread is not None and self._failure is None:
            self._lines.put(line)

    def rewrite(self, lines: Sequence[Line]) -> None:
        """Make the tracker anew, and hand over these lines: the run begins, or returns to a checkpoint."""
        self.close()
        self._failure = None
        try:
            tracker = self._make()
        except Exception as error:  # noqa: BLE001 - any package may raise anything, and no chart is worth a run
            self._failure = error
            self._warn()
            return
        self._lines = queue.SimpleQueue()
        for line in lines:
            self._lines.put(line)
        self._thread = threading.Thread(target=self._work, args=(tracker, self._lines), name=self._name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until all is written."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._lines.put(None)
            thread.join(_PATIENCE)
            if thread.is_alive():
                self._failure = TimeoutError(f"it had not finished after {_PATIENCE:g} s")
        self._warn()

    def _work(self, tracker: Tracker, lines: "queue.SimpleQueue[Line | None]") -> None:
        """Write lines until there are no more; after a failure, none."""
        try:
            while (line := lines.get()) is not None:
                tracker.write(line)
        except Exception as error:  # noqa: BLE001 - likewise
            self._failure = error
        try:
            tracker.close()
        except Exception as error:  # noqa: BLE001 - likewise
            self._failure = self._failure or error

    def _warn(self) -> None:
        if self._failure is not None and not self._warned:
            self._warned = True
            cause = f"{type(self._failure).__name__}: {self._failure}".partition("\n")[0]
            self._say(f"warning: the tracker {self._name} failed ({cause}): the next resume writes its charts anew")
