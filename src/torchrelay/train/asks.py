"""Step 7: what one process asks of all of them: a stop, a checkpoint, an evaluation, a line of metrics.

A signal asks, or rank 0's clock, or a person by `torchrelay ask`. All processes learn it at the same step.
"""

import os
import signal
from pathlib import Path

from torchrelay.checkpoint.checkpointer import Checkpointer
from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.run.requests import Requests
from torchrelay.train.progress import Progress
from torchrelay.train.signals import StopSignal

_STOP, _SAVE, _EVALUATE, _LOG = 1, 2, 4, 8
_PERSONS = {"stop": 16, "save": 32, "evaluate": 64}


class Asks:
    """What any process asks of all.

    Args:
        progress: learns that the run is interrupted, and that a line is due.
        group: the processes.
        checkpoints: which may be due by the clock.
        folder: the run's, where people ask.

    Attributes:
        signal: the context that catches signals.
        wanted: what people have asked for and isn't done, as all processes know.
    """

    def __init__(
        self, progress: Progress, group: ProcessGroup, checkpoints: Checkpointer | None, folder: Path | None
    ) -> None:
        self._progress, self._group, self._checkpoints = progress, group, checkpoints
        self._requests = Requests(folder if group.main else None)
        self._due = self._due_for_all = False  # whether an evaluation is, by the clock
        self.signal, self.wanted = StopSignal(), set[str]()

    def learn(self) -> bool:
        """Learn what is asked, and return whether a checkpoint is due by the clock; set `progress.interrupted`.

        Several processes learn it a step later, and all at the same step.
        """
        asks, progress = _STOP * (self.signal.received is not None) | _EVALUATE * self._due, self._progress
        if self._group.main:
            asks |= _SAVE * (self._checkpoints is not None and self._checkpoints.due_by_clock())
            asks |= _LOG * (progress.lines.by_clock and progress.lines.ask())
            for request in self._requests.look():
                asks |= _PERSONS[request] * (request != "stop" or not _stopped_by_agent())
        asked = self._group.agree(asks)
        progress.lines.asked |= bool(asked & _LOG)
        self._due, self._due_for_all = False, self._due_for_all or bool(asked & _EVALUATE)
        if asked > _LOG:
            self.wanted.update(request for request, bit in _PERSONS.items() if asked & bit)
        progress.interrupted = bool(asked & _STOP) or "stop" in self.wanted
        return bool(asked & _SAVE)

    def agree_on(self, due: bool) -> bool:
        """Return whether rank 0 says that something is due; all processes learn it a step later, at the same step."""
        self._due |= due and self._group.main
        asked = self._due_for_all
        self._due_for_all = False
        return asked

    def is_interrupted(self) -> bool:
        """Return whether the run is to stop, and set `progress.interrupted`: between the batches of an evaluation."""
        self.learn()
        return self._progress.interrupted

    def done(self, request: str) -> None:
        """Forget what a person asked for; the request may stay in the folder, until `tell`."""
        self.wanted.discard(request)

    def tell(self, request: str) -> None:
        """Remove a request from the folder; from any thread."""
        self._requests.done(request)

    def clear(self) -> None:
        """Forget and remove all that people have asked for: the run begins, or ends."""
        self.wanted.clear()
        self._requests.clear()

    @property
    def stopped_by(self) -> str:
        """Who has stopped the run."""
        if self.signal.received is not None:
            return self.signal.received.name
        return "torchrelay ask" if "stop" in self.wanted else "a signal"


def _stopped_by_agent() -> bool:
    """Tell torch's elastic agent to stop all processes, if it would otherwise restart them; return whether it does."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts:
        os.kill(os.getppid(), signal.SIGTERM)
    return restarts > 0
