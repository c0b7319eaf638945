"""Step 4: the processes that train together: started by us, by torchrun or by SLURM.

`--devices N` starts N of them through torch's own elastic launcher. Each is the same command line again; rank 0 has the
terminal, the others write to files, and one line says why it ended if it didn't end well. torch is imported only when
there is something to start: the command line stays quick.
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

from torchrelay.distributed.failures import End, LaunchError, first_failure, reported
from torchrelay.distributed.process import LOGS, PARENT
from torchrelay.errors import RelayError, UsageError

_TWICE = 0.5  # seconds: `timeout` and SLURM may send a signal to a process and to its group, which is one wish, not two


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
    """Run a command line in `devices` processes and wait for their end.

    Args:
        arguments: the command line behind `torchrelay`.
        devices: how many processes, each with a device of its own.
        folder: the run's folder; what ranks other than 0 write is kept in its `logs`.
        threads: of each process on the CPU; unset: the machine's cores shared out.
        restarts: how often all processes are started again after one of them failed.
        shutdown_timeout: seconds that they have for a checkpoint after a signal.
        port: of the rendezvous on 127.0.0.1; unset: a free one.

    Raises:
        UsageError: something else has already started several processes, or the port is taken.
        LaunchError: a process failed, or a signal stopped them; the text is its own.
    """
    if "RANK" in os.environ:
        raise UsageError(
            f"--devices {devices}: this is one of {os.environ.get('WORLD_SIZE', 'several')} processes already, started "
            "by torchrun or SLURM: leave --devices out, or start torchrelay without them"
        )
    if port is not None:
        _check_port(port)
    was_there, refused = folder.exists(), False
    with tempfile.TemporaryDirectory(prefix="torchrelay-") as name:
        reports = Path(name)
        logs = _logs(folder, reports)
        environment = {PARENT: str(os.getpid()), LOGS: str(logs), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment["OMP_NUM_THREADS"] = str(threads or max(1, cores() // devices))
        for key in ("TORCH_CPP_LOG_LEVEL", "OMP_NUM_THREADS"):  # what the user set counts
            environment[key] = os.environ.get(key, environment[key])
        try:
            with _environment(environment), _Signals(reports, shutdown_timeout) as signals:
                _run_agent(arguments, devices, restarts, port, reports, signals)
        except LaunchError as error:
            refused = error.exit_code == UsageError.exit_code
            raise
        finally:
            _clean_up(logs, None if was_there else folder, refused)


def _run_agent(
    arguments: Sequence[str], devices: int, restarts: int, port: int | None, reports: Path, signals: "_Signals"
) -> None:
    """Let torch's elastic agent start the processes, and start them again; say in one line how they ended."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        logs_specs=DefaultLogsSpecs(log_dir=str(reports)),  # which keeps no output there, but the reasons of failures
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port or 0}",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        max_restarts=restarts,
        signals_to_handle="SIGQUIT",  # the others are ours
    )
    command = [argument.replace("$", "$$") for argument in ("-m", "torchrelay", *arguments)]  # torch fills in ${…}
    with _silent():
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            ends = {rank: End(found.exitcode, found.timestamp) for rank, found in error.failures.items()}
            raise first_failure(reports, ends) from None
        except SignalException:
            signals.explain()
        except RendezvousConnectionError as error:
            where = f"port {port} is taken" if port is not None else f"no port could be opened ({error.__cause__})"
            raise RelayError(
                f"the processes can't find each other: {where}; choose one that is free by --port"
            ) from None


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_devices(name: str, devices: int) -> None:
    """Refuse more processes than there are devices.

    Args:
        name: the recipe's `device.name`.
        devices: how many are asked for.

    Raises:
        UsageError: there aren't as many, or the name stands for one device alone.
    """
    import torch

    cuda = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not cuda and not torch.backends.mps.is_available()):
        return
    if name not in ("auto", "cuda"):
        raise UsageError(f"--devices {devices}: device.name '{name}' is one device: use cuda or cpu, or --devices 1")
    if devices > cuda:
        there = f"{cuda} CUDA device{'' if cuda == 1 else 's'}"
        raise UsageError(f"--devices {devices}: PyTorch sees {there} here: ask for fewer, or --set device.name=cpu")


def _check_port(port: int) -> None:
    """Raise an error if a port is taken."""
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


def _logs(folder: Path, otherwise: Path) -> Path:
    """Return where the ranks other than 0 write: in the run's folder, if one can write there."""
    logs = folder / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError:  # rank 0 will say so, if it has to write there too
        logs = otherwise / "logs"
        logs.mkdir()
    return logs.resolve()


def _clean_up(logs: Path, new: Path | None, refused: bool) -> None:
    """Remove logs that nobody wrote to, and a new folder if no run came of it; refused, all ranks said the same."""
    with contextlib.suppress(OSError):
        for log in logs.glob("rank-*.log"):
            if (refused and new) or not log.stat().st_size:
                log.unlink()
        logs.rmdir()
        if new is not None:
            new.rmdir()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence torch's launcher, which logs every signal and every failure with many lines."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


# ------------------------------------------------------------------------------------------------------------ signals


class _Signals:
    """A context that hands SIGTERM, SIGINT and SIGUSR1 on to all processes and waits for them.

    torch would wait 30 s, send SIGTERM to loader workers as well, and leave all alive at a second signal.

    Args:
        reports: where the processes have written their ids.
        timeout: seconds to wait.
    """

    def __init__(self, reports: Path, timeout: float) -> None:
        self._reports = reports
        self._timeout = timeout
        self._received: signal.Signals | None = None
        self._since = 0.0
        self._late = False
        self._codes: dict[int, int] = {}  # of processes that ended after the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
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
        while any(self._runs(pid) for pid in pids) and not self._late:
            self._late = time.monotonic() - self._since > self._timeout
            time.sleep(0.02)
        _send([pid for pid in pids if self._runs(pid)], signal.SIGKILL)
        raise SignalException(f"{self._received.name} has come", self._received)

    def _pids(self) -> list[int]:
        return [int(path.read_text() or 0) for path in self._reports.rglob("pid")]

    def _runs(self, pid: int) -> bool:
        """Return whether a process still runs; leave it to torch to reap it."""
        try:
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        if found is not None:
            self._codes[pid] = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return found is None

    def _end_at_once(self, number: int) -> NoReturn:
        """Leave without waiting, as one process does; the earlier checkpoints are whole."""
        _send(self._pids(), signal.SIGKILL)
        shutil.rmtree(self._reports, ignore_errors=True)
        os._exit(128 + number)

    def explain(self) -> None:
        """Say how the processes ended.

        Raises:
            LaunchError: they had not come to their end by themselves.
        """
        if self._received is None:  # SIGQUIT, which torch has handled
            raise LaunchError("stopped by SIGQUIT", 128 + signal.SIGQUIT)
        name = self._received.name
        if self._late:
            raise LaunchError(
                f"the processes had not ended {self._timeout:g} s after {name} and were killed; the last checkpoint "
                "counts: torchrelay resume goes on from it; --shutdown-timeout gives them longer",
                1,
            )
        if self._codes and not any(self._codes.values()):
            return  # they were done
        if all(each.follows for each in reported(self._reports)):
            raise LaunchError(f"stopped by {name} before the training began", 128 + self._received)
        raise first_failure(self._reports, {})


def _send(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
