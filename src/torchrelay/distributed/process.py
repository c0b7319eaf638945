"""Step 4: this process's place in a launch, by our launcher, torchrun or SLURM; and whether the launch is a restart.

It imports no torch: the command line asks it before anything else.
"""

import ctypes
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from torchrelay.errors import RelayError

PARENT = "TORCHRELAY_LAUNCHER"  # the process id of our launcher, in the processes that it starts
LOGS = "TORCHRELAY_LOGS"  # the folder for the output of ranks other than 0
ERROR = "TORCHELASTIC_ERROR_FILE"  # torch's name: the file in which a process reports why it failed

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def rank() -> int:
    """Return this process's rank; 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def started_by_launcher() -> bool:
    """Return whether our launcher started this very process; this process's children inherit the environment, too."""
    return os.environ.get(PARENT) == str(os.getppid())


def attach() -> None:
    """Take this process's place in the launch, if there is one.

    A process that our launcher started ends with the launcher, and only rank 0 writes to the terminal.
    """
    os.environ.update(from_slurm(os.environ))
    if not started_by_launcher():
        return
    end_with(os.getppid())
    Path(os.environ[ERROR]).with_name("pid").write_text(str(os.getpid()))
    if rank() == 0:
        return
    log = os.open(Path(os.environ[LOGS]) / f"rank-{rank()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, for whatever reason; only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != parent:
        os._exit(1)


# ------------------------------------------------------------------------------------------------ restarts


def is_restart(folder: Path) -> bool:
    """Return whether a folder holds the run of this launch, whose processes were restarted.

    torchrun restarts the same `train` command after a failure, and when hosts come and go; SLURM does so when it
    requeues a job. Only rank 0's answer counts: when the others look, rank 0 may have written already.
    """
    launch = _launch()
    if launch is None or not (folder / "recipe.toml").is_file():
        return False
    try:
        return bool(json.loads((folder / "elastic.json").read_text(encoding="utf-8")) == launch)
    except (OSError, ValueError):
        return False


def record_launch(folder: Path) -> None:
    """Write, on rank 0 and before a folder holds a run, which launch the run belongs to.

    Raises:
        RelayError: it can't be written.
    """
    launch = _launch(recorded=True)
    if launch is None or rank() != 0 or (folder / "recipe.toml").exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = folder / "elastic.json.partial"
        staging.write_text(json.dumps(launch) + "\n", encoding="utf-8")
        staging.replace(folder / "elastic.json")
    except OSError as error:
        raise RelayError(
            f"can't write in the run folder {folder}: {error.strerror or error}; choose another by --run"
        ) from error


def _launch(recorded: bool = False) -> dict[str, str] | None:
    """Return what identifies this launch in each of its attempts; None if nothing does.

    torchrun's run id is `none` unless one is given. Then the id of its agent, the same process in all attempts, is part
    of the identity, and a first attempt is never a restart. SLURM keeps a job's number when it requeues the job.

    Args:
        recorded: whether the identity is to be written, and not to be compared.
    """
    if (run_id := os.environ.get("TORCHELASTIC_RUN_ID")) is not None:
        if run_id != "none":
            return {"run_id": run_id}
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        agent = f"process {os.getppid()} on {socket.gethostname()}"
        return {"run_id": run_id, "agent": agent} if restarted or recorded else None
    if (job := os.environ.get("SLURM_JOB_ID")) is not None:
        restarted = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        return {"slurm_job_id": job} if restarted or recorded else None
    return None


# ------------------------------------------------------------------------------------------------ SLURM


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that torchrun would set in a process that `srun` started.

    Empty if there is a single task, if they are set already, or in the batch script, which looks like task 0 but isn't.
    """
    needed = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")
    in_step = "SLURM_STEP_ID" in environment or environment.get("ENVIRONMENT") != "BATCH"
    if "RANK" in environment or not in_step or any(name not in environment for name in needed):
        return {}
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"]))
    if tasks < 2:
        return {}
    hosts = expand_hosts(environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"]))
    number = 31 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", hosts[0]),
        "MASTER_PORT": environment.get("MASTER_PORT", str(10_000 + number % 20_000)),  # below the ephemeral ports
    }
    per_host = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_host) for _ in range(int(times or 1))]
    host = int(environment.get("SLURM_NODEID", "0"))
    if host < len(counts):
        variables["LOCAL_WORLD_SIZE"] = str(counts[host])
    return variables


def expand_hosts(text: str) -> list[str]:
    """Expand SLURM's host list: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7 and login."""
    hosts = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            names = [name + middle for name in names for middle in ([plain] if plain else _numbers(ranges))]
        hosts += names
    return hosts


def _numbers(ranges: str) -> Iterator[str]:
    """Yield the numbers of `01-04,7`, padded as they are written."""
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        yield from (f"{n:0{len(first)}}" for n in range(int(first), int(last or first) + 1))
