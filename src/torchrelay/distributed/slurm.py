"""Step 4: SLURM's environment variables, translated into torch's."""

import re
from collections.abc import Iterator, Mapping


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
