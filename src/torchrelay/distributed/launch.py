"""Step 4: our launcher: `--devices N` starts N processes through torch's elastic launcher.

Each process runs the same command line again. Rank 0 has the terminal, the others write to files, and one line says why
a launch failed. torch is imported only when there is something to start, so that the command line starts fast.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torchrelay.distributed.failures import End, LaunchError, first_failure, read_reports
from torchrelay.distributed.process import LOGS, PARENT
from torchrelay.errors import RelayError, UsageError

# Seconds. `timeout` and SLURM may send a signal to a process and again to its group, which is one request, not two.
_TWICE = 0.5


# ------------------------------------------------------------------------------------------------ starting processes


def start(
    arguments: Sequence[str],
    devices: int,
    folder: Path,
    *,
    threads: int | None = None,
    restarts: int = 0,
    shutdown_timeout: float = 600.0,
    port: int | None = None,
) -> None:
    """Run a command line in `devices` processes and wait until they have ended.

    Args:
        arguments: the command line after `torchrelay`.
        devices: the number of processes, each with a device of its own.
        folder: the run folder; the output of ranks other than 0 is kept in its `logs`.
        threads: CPU threads of each process; by default they share the machine's cores.
        restarts: how often all processes are restarted after one of them fails.
        shutdown_timeout: seconds that they have to save a checkpoint after a signal.
        port: of the rendezvous on 127.0.0.1; a free one by default.

    Raises:
        UsageError: this system can't do it, or torchrun or SLURM has started several processes already.
        RelayError: the port is taken.
        LaunchError: a process failed, or a signal stopped them; the text is that process's error.
    """
    if os.name != "posix":
        raise UsageError(f"--devices {devices} needs Linux or macOS: leave it out, or run torchrelay in WSL")
    if "RANK" in os.environ:
        raise UsageError(
            f"--devices {devices}: this is one of {os.environ.get('WORLD_SIZE', 'several')} processes already, started "
            "by torchrun or SLURM: leave --devices out, or start torchrelay without them"
        )
    if port is not None:
        _check_port(port)
    existed, refused = folder.exists(), False
    with tempfile.TemporaryDirectory(prefix="torchrelay-") as name:
        reports = Path(name)
        logs = _logs(folder, reports)
        environment = {PARENT: str(os.getpid()), LOGS: str(logs), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment["OMP_NUM_THREADS"] = str(threads or max(1, cores() // devices))
        for key in ("TORCH_CPP_LOG_LEVEL", "OMP_NUM_THREADS"):  # what the user has set takes precedence
            environment[key] = os.environ.get(key, environment[key])
        signals = _Signals(reports, shutdown_timeout)
        try:
            with _environment(environment), signals.explained(), signals:
                _run_agent(arguments, devices, restarts, port, reports)
        except LaunchError as error:
            refused = error.exit_code == UsageError.exit_code
            raise
        finally:
            _clean_up(logs, None if existed else folder, refused)


def _run_agent(arguments: Sequence[str], devices: int, restarts: int, port: int | None, reports: Path) -> None:
    """Let torch's elastic agent start and restart the processes; raise an error of one line if they fail."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        logs_specs=DefaultLogsSpecs(log_dir=str(reports)),  # it keeps the reports of failures there, and no output
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port or 0}",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        max_restarts=restarts,
        signals_to_handle="SIGQUIT",  # `_Signals` handles the others
    )
    command = [argument.replace("$", "$$") for argument in ("-m", "torchrelay", *arguments)]  # torch substitutes ${…}
    with _silent():
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            ends = {rank: End(failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()}
            raise first_failure(reports, ends) from None
        except RendezvousConnectionError as error:
            taken = f"port {port} is taken; choose one that is free by --port"
            where = taken if port is not None else f"no port of 127.0.0.1 could be opened ({error.__cause__})"
            raise RelayError(f"the processes can't find each other: {where}") from None


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_devices(name: str, devices: int) -> None:
    """Raise a UsageError if there are fewer devices than processes.

    Args:
        name: the recipe's `device.name`.
        devices: the number of processes.

    Raises:
        UsageError: there are fewer devices, or the name is that of a single device.
    """
    import torch

    cuda = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not cuda and not torch.backends.mps.is_available()):
        return
    if name not in ("auto", "cuda"):
        raise UsageError(f"--devices {devices}: device.name '{name}' is one device: use cuda or cpu, or --devices 1")
    if devices > cuda:
        available = f"{cuda} CUDA device{'' if cuda == 1 else 's'}"
        raise UsageError(f"--devices {devices}: PyTorch sees {available} here: ask for fewer, or --set device.name=cpu")


def _check_port(port: int) -> None:
    """Raise a RelayError if a port is taken."""
    if not 0 < port < 65536:
        raise UsageError(f"--port {port}: a port is a number from 1 to 65535")
    with socket.socket() as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind(("", port))  # all addresses, as torch's store does
        except OSError as error:
            raise RelayError(
                f"port {port} can't be used ({error.strerror}): choose another by --port, or leave it out"
            ) from error


def _logs(folder: Path, fallback: Path) -> Path:
    """Return the folder for the output of ranks other than 0: in the run folder, if that is writable."""
    logs = folder / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError:  # rank 0 reports it if it has to write there, too
        logs = fallback / "logs"
        logs.mkdir()
    return logs.resolve()


def _clean_up(logs: Path, new: Path | None, refused: bool) -> None:
    """Remove empty logs, and a new folder that holds no run; all logs if the command was refused by every rank."""
    with contextlib.suppress(OSError):
        for log in logs.glob("rank-*.log"):
            if (refused and new) or not log.stat().st_size:
                log.unlink()
        logs.rmdir()
        if new is not None:
            new.rmdir()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Add environment variables within the context."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence torch's launcher, which logs many lines for each signal and each failure."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


# ------------------------------------------------------------------------------------------------------------ signals


class _Signals:
    """A context that forwards SIGINT, SIGTERM and SIGUSR1 to all processes and waits for them to end.

    torch would wait 30 s, send SIGTERM to DataLoader workers as well, and leave all alive at a second signal.

    Args:
        reports: where the processes write their ids.
        timeout: seconds to wait.
    """

    def __init__(self, reports: Path, timeout: float) -> None:
        self._reports = reports
        self._timeout = timeout
        self._received: signal.Signals | None = None
        self._since = 0.0
        self._timed_out = False
        self._codes: dict[int, int] = {}  # of processes that ended after the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature is Python's
        from torch.distributed.elastic.multiprocessing import SignalException

        if self._received is not None:
            if time.monotonic() - self._since > _TWICE:
                self._end_at_once(number)
            return
        self._received, self._since = signal.Signals(number), time.monotonic()
        pids = [pid for pid in self._pids() if self._runs(pid)]
        _send(pids, number)
        while any(self._runs(pid) for pid in pids) and not self._timed_out:
            self._timed_out = time.monotonic() - self._since > self._timeout
            time.sleep(0.02)
        _send([pid for pid in pids if self._runs(pid)], signal.SIGKILL)
        raise SignalException(f"received {self._received.name}", self._received)

    def _pids(self) -> list[int]:
        return [int(path.read_text() or 0) for path in self._reports.rglob("pid")]

    def _runs(self, pid: int) -> bool:
        """Return whether a process still runs. One that has ended is left for torch to reap, where the system can."""
        try:
            if hasattr(os, "waitid"):
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None:
                    self._codes[pid] = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                return ended is None
            reaped, status = os.waitpid(pid, os.WNOHANG)  # macOS
        except ChildProcessError:
            return False
        if reaped:
            self._codes[pid] = os.waitstatus_to_exitcode(status)
        return not reaped

    def _end_at_once(self, number: int) -> NoReturn:
        """Exit without waiting, as a single process does at a second signal; earlier checkpoints are complete."""
        _send(self._pids(), signal.SIGKILL)
        shutil.rmtree(self._reports, ignore_errors=True)
        os._exit(128 + number)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Explain a signal, whenever it comes: also one at which the handlers have only just been set."""
        # Imported before the handlers are set: one that ran amid its first import would find half of it.
        from torch.distributed.elastic.multiprocessing import SignalException

        try:
            yield
        except SignalException:
            self._explain()

    def _explain(self) -> None:
        """Say how the processes ended.

        Raises:
            LaunchError: they hadn't finished before the signal.
        """
        if self._received is None:  # torch handles SIGQUIT
            raise LaunchError("stopped by SIGQUIT", 128 + signal.SIGQUIT)
        name = self._received.name
        if self._timed_out:
            raise LaunchError(
                f"the processes had not ended {self._timeout:g} s after {name} and were killed: torchrelay resume "
                "continues from the last checkpoint; --shutdown-timeout gives them longer",
                1,
            )
        if self._codes and not any(self._codes.values()):
            return  # they had finished
        if all(report.follows for report in read_reports(self._reports)):
            raise LaunchError(f"stopped by {name} before training began", 128 + self._received)
        raise first_failure(self._reports, {})


def _send(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
