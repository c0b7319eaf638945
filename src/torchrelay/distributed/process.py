"""Step 4: a process's place among those that were started together, by our launcher, by torchrun or by SLURM."""

import ctypes
import json
import os
import signal
import socket
import sys
from pathlib import Path

from torchrelay.distributed.slurm import from_slurm
from torchrelay.errors import RelayError

PARENT = "TORCHRELAY_LAUNCHER"  # in a process that our launcher started: the launcher's id
LOGS = "TORCHRELAY_LOGS"  # and the folder for what it writes, unless it is rank 0
ERROR = "TORCHELASTIC_ERROR_FILE"  # torch's name: the file that says why a process failed


def rank() -> int:
    """Return this process's number among those that train together; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def started_by_launcher() -> bool:
    """Return whether our launcher has started this very process; its own children inherit the environment, too."""
    return os.environ.get(PARENT) == str(os.getppid())


def attach() -> None:
    """Take this process's place among those that were started together, if there are others.

    A process of ours dies with its launcher, so that none is left behind, and rank 0 alone has the terminal.
    """
    os.environ.update(from_slurm(os.environ))
    if not started_by_launcher():
        return
    _die_with(os.getppid())
    Path(os.environ[ERROR]).with_name("pid").write_text(str(os.getpid()))
    if rank() == 0:
        return
    log = os.open(Path(os.environ[LOGS]) / f"rank-{rank()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


# ------------------------------------------------------------------------------------- a run that is started again


def is_restart(folder: Path) -> bool:
    """Return whether a folder holds the run of this very launch, whose processes were started again.

    torchrun starts the same `train` again after a failure, and when hosts come and go; SLURM does when it requeues a
    job. Only rank 0's answer counts: the others may look when rank 0 has written already.
    """
    own = _launch()
    if own is None or not (folder / "recipe.toml").is_file():
        return False
    try:
        return bool(json.loads((folder / "elastic.json").read_text(encoding="utf-8")) == own)
    except (OSError, ValueError):
        return False


def record_launch(folder: Path) -> None:
    """Write down, on rank 0 and before a folder holds a run, which launch it belongs to.

    Raises:
        RelayError: it can't be written.
    """
    own = _launch(started=True)
    if own is None or rank() != 0 or (folder / "recipe.toml").exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = folder / "elastic.json.partial"
        staging.write_text(json.dumps(own) + "\n", encoding="utf-8")
        staging.rename(folder / "elastic.json")
    except OSError as error:
        raise RelayError(
            f"can't write in the run folder {folder}: {error.strerror or error}; choose another by --run"
        ) from error


def _launch(started: bool = False) -> dict[str, str] | None:
    """Return what names this launch, the same in each of its attempts; None if nothing does.

    torchrun's run id is `none` unless one is given. Then the agent, which stays the same process, is part of the name,
    and the first attempt goes on with nothing. A job of SLURM keeps its number when it is requeued.

    Args:
        started: whether it is asked by who writes the name down, and not by who compares it.
    """
    if (run_id := os.environ.get("TORCHELASTIC_RUN_ID")) is not None:
        if run_id != "none":
            return {"run_id": run_id}
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        agent = f"process {os.getppid()} on {socket.gethostname()}"
        return {"run_id": run_id, "agent": agent} if again or started else None
    if (job := os.environ.get("SLURM_JOB_ID")) is not None:
        again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        return {"slurm_job_id": job} if again or started else None
    return None
