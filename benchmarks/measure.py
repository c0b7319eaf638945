"""What the benchmarks share: timing several cases in turns, and a description of the machine."""

import gc
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median


def side_by_side(cases: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Return the seconds of each case. The cases take turns, so that other load slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()  # warm
    for _ in range(rounds):
        for name, case in cases.items():
            gc.collect()
            began = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - began)
    return times


def shown(times: list[float], unit: float = 1e3, digits: int = 2) -> str:
    """Return a median with its minimum and maximum, in milliseconds by default."""
    low, middle, high = (f"{value * unit:,.{digits}f}" for value in (min(times), median(times), max(times)))
    return f"{middle} ({low} to {high})"


def installed() -> dict[str, str]:
    """Return an environment in which a new process finds bytecode, as it does for an installed package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def train(recipe: str, settings: Sequence[str], run: Path) -> float:
    """Train a recipe by `torchrelay train`; return the seconds from the start of the process to its end.

    Args:
        recipe: name of a shipped recipe.
        settings: overrides, such as "run.seed=1".
        run: where the run folder goes.

    Raises:
        CalledProcessError: the training failed; its own message is on the screen.
    """
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "torchrelay", "train", recipe, *options, "--run", str(run), "--quiet"]
    began = time.perf_counter()
    subprocess.run(command, check=True, env=installed())
    return time.perf_counter() - began


def machine() -> str:
    """Return the machine, the threads and the torch version, in one line."""
    # Here, since a new process imports this module first, whatever it measures.
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    return f"{processor()}, {os.cpu_count()} cores, {threads} threads{gpu}, torch {torch.__version__}"


def processor() -> str:
    """Return the processor's name and its bf16 instructions."""
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.machine()
    named = re.search(r"^model name\s*: (.+)$", facts, re.MULTILINE)
    units = [unit for flag, unit in (("avx512_bf16", "AVX-512 bf16"), ("amx_bf16", "AMX")) if flag in facts]
    return " ".join((named[1] if named else platform.machine(), f"({', '.join(units)})" if units else "")).strip()


def fresh_process() -> ProcessPoolExecutor:
    """Return a process without the threads, settings and memory of another benchmark.

    It starts its own children by the default method. A spawned process would spawn the workers of a `DataLoader` too,
    each of which would import PyTorch again in each epoch, which would slow down the peers.
    """
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_start_as_usual)


def _start_as_usual() -> None:
    multiprocessing.set_start_method(None, force=True)
