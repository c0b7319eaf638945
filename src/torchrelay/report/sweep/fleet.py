"""Several workers of a sweep on one machine: processes that share its folder, and its devices or cores."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchrelay.errors import STOPPED
from torchrelay.train.signals import StopSignal

_LOOK = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True)
class Ended:
    """How workers have ended.

    Attributes:
        codes: their exit codes; negative: killed by that signal.
        signal: the name of the signal that has stopped them, or "".
    """

    codes: tuple[int, ...]
    signal: str

    @property
    def failed(self) -> int:
        """How many have failed; the time may be over (75), or a signal have come."""
        return sum(code not in (0, STOPPED) for code in self.codes)


def run(arguments: Sequence[str], environments: Sequence[Mapping[str, str]], say: Callable[[str], None]) -> Ended:
    """Run a worker for each environment, and wait for all.

    A signal is handed on once, and the workers save what they train. They have sessions of their own, so that Ctrl-C
    in a terminal doesn't reach them twice.

    Args:
        arguments: of torchrelay.
        environments: what differs from this process's environment.
        say: called with what people should know.
    """
    command = [sys.executable, "-P", "-m", "torchrelay", *arguments]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with StopSignal() as signals:
        workers = [
            subprocess.Popen(  # noqa: S603 - the command is our own
                command, env={**os.environ, **path, **own}, start_new_session=True, stdin=subprocess.DEVNULL
            )
            for own in environments
        ]
        told, stopped = set[int](), ""
        while any(worker.poll() is None for worker in workers):
            if signals.received is not None and not stopped:
                stopped = signals.received.name
                for worker in workers:
                    worker.terminate()
            for number, worker in enumerate(workers, 1):
                code = worker.poll()
                if code is not None and code < 0 and number not in told:
                    told.add(number)
                    say(f"warning: worker {number} was killed (signal {-code}); another one takes over its trial")
            time.sleep(_LOOK)
    return Ended(tuple(worker.returncode for worker in workers), stopped)


def environments(workers: int, visible: str | None, devices: int) -> list[dict[str, str]]:
    """Return what each worker's environment has: of several CUDA devices each gets one, in turn.

    Args:
        workers: how many.
        visible: CUDA_VISIBLE_DEVICES, if it is set.
        devices: how many CUDA devices there are.
    """
    if devices < 2:
        return [{} for _ in range(workers)]
    names = visible.split(",") if visible else [str(number) for number in range(devices)]
    return [{"CUDA_VISIBLE_DEVICES": names[number % devices]} for number in range(workers)]
