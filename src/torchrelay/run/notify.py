"""Step 1: a command of the user's that learns how a run has ended; its failure is a warning."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping

TIMEOUT = 60.0  # seconds
# By these, a process knows that it is one of several: the command is none of them.
_LAUNCH = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
)
_OURS = "TORCHRELAY_"


def notify(command: str, facts: Mapping[str, object], say: Callable[[str], None]) -> None:
    """Run a command in a shell, and wait for it; say in one line what went wrong.

    Args:
        command: as a shell reads it.
        facts: what it finds in its environment; each variable is `TORCHRELAY_NAME`.
        say: called with a warning.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith((*_LAUNCH, _OURS))}
    environment = inherited | {f"{_OURS}{name}": str(value) for name, value in facts.items()}
    # A file: what the command starts in the background may keep its end of a pipe open for ever.
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(  # noqa: S602 - the shell is what the user writes the command for
                command,
                shell=True,
                env=environment,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            code = process.wait(TIMEOUT)
        except OSError as error:
            say(f"warning: run.notify can't be run: {error.strerror or error}")
            return
        except subprocess.TimeoutExpired:
            _kill(process)
            say(f"warning: run.notify was killed after {TIMEOUT:g} s")
            return
        if code:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            say(f"warning: run.notify ended with code {code}" + (f": {last}" if last else ""))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a shell and what it has started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
