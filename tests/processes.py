"""Real processes that start fast, for tests of faults and of several processes; and checks of error lines."""

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).with_name("fork_server.py")
SHARED = "TEST_SERVER"  # the environment variable with the address of a server that xdist's workers share
Done = subprocess.CompletedProcess[str]
LAUNCHED = ("--devices", "--nproc-per-node", "--nproc_per_node")  # how PyTorch's launcher is asked for processes


class Process:
    """A real process, with a session of its own.

    Args:
        server: the server that started it.
        pid: its id, which is also its session's.
        streams: the files of its output and its errors, or none if it has a terminal.
    """

    def __init__(self, server: "Server", pid: int, streams: tuple[Path, Path] | None) -> None:
        self.server = server
        self.pid = pid
        self.streams = streams
        self.returncode: int | None = None

    def wait(self, timeout: float = 120) -> int:
        """Wait for its end and return its exit code, negative for a signal."""
        if self.returncode is None:
            self.returncode = self.server.ask(do="wait", pid=self.pid, timeout=timeout)
        if self.returncode is None:
            self.end(signal.SIGABRT)  # each prints the stacks of its threads
            self.end()
            pytest.fail(f"the process was still running after {timeout} s:\n{self.output}\n{self.errors}")
        return self.returncode

    def runs(self) -> bool:
        """Return whether it has not ended yet."""
        if self.returncode is None:
            self.returncode = self.server.ask(do="wait", pid=self.pid, timeout=0)
        return self.returncode is None

    def send(self, number: int) -> None:
        """Send a signal to this process only."""
        os.kill(self.pid, number)

    def until(self, happened: Callable[[], Any], timeout: float = 60) -> Any:
        """Wait for a condition while the process runs, and return its value."""
        end = time.monotonic() + timeout
        while not (found := happened()):
            assert self.runs(), f"it ended too early, with {self.returncode}:\n{self.output}\n{self.errors}"
            assert time.monotonic() < end, f"waited {timeout} s:\n{self.output}\n{self.errors}"
            time.sleep(0.002)
        return found

    def done(self, timeout: float = 120) -> Done:
        """Wait for its end; none of its children may outlive it."""
        code = self.wait(timeout)
        end = time.monotonic() + 5  # workers take a moment to notice that their parent is gone
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.02)
        assert not left, f"left behind: {left}"
        return subprocess.CompletedProcess([], code, self.output, self.errors)

    def family(self) -> list[int]:
        """Return the other living processes of its session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue  # it has just ended
            if int(session) == self.pid and state != "Z" and int(stat.parent.name) != self.pid:
                found.append(int(stat.parent.name))
        return found

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send a fatal signal to it and its children."""
        for pid in [*([] if self.returncode is not None else [self.pid]), *self.family()]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if self.returncode is None:
            self.returncode = self.server.ask(do="wait", pid=self.pid, timeout=30)

    @property
    def output(self) -> str:
        return self.streams[0].read_text(errors="replace") if self.streams else ""

    @property
    def errors(self) -> str:
        return self.streams[1].read_text() if self.streams else ""


class Server:
    """Starts processes through one that has already imported PyTorch and forks; see fork_server.py.

    Args:
        address: its socket.
        folder: where the output of processes goes.
    """

    def __init__(self, address: Path, folder: Path) -> None:
        self.folder = folder
        self.started: list[Process] = []
        self._count = 0
        self._socket = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + 120
        while True:
            try:
                self._socket.connect(str(address))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < end, "the server for processes doesn't start"
                time.sleep(0.01)
        self._lines = self._socket.makefile("rw", encoding="utf-8")

    def ask(self, **request: Any) -> Any:
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        return json.loads(self._lines.readline())

    def start(
        self,
        *arguments: str | Path,
        folder: Path,
        sets: Sequence[str] = (),
        script: Path | None = None,
        program: str | None = None,
        module: str = "torchrelay",
        terminal: str | None = None,
        environment: dict[str, str] | None = None,
        forks: bool = True,
        plots: bool = False,
        network: str | None = None,
    ) -> Process:
        """Start `python -m torchrelay …`, another module, a script, or a program given as text.

        Args:
            *arguments: its arguments.
            folder: its working directory.
            sets: overrides, each passed with `--set`.
            script: run this instead of torchrelay.
            program: or this.
            module: run this instead of torchrelay.
            terminal: the device of a terminal to run in, from `pty.openpty`.
            environment: additional variables.
            forks: whether the processes that it starts through PyTorch's launcher are also forked.
            plots: whether runs draw their plots, which takes another process more than a second, and their first batch.
            network: the name of a network namespace to run in.
        """
        self._count += 1
        streams = (self.folder / f"{self._count}.out", self.folder / f"{self._count}.err")
        for stream in streams:
            stream.touch()
        if program is not None:
            script = self.folder / f"{self._count}.py"
            script.write_text(textwrap.dedent(program))
        pid = self.ask(
            do="start",
            argv=[str(script or module), *map(str, arguments), *(f"--set={setting}" for setting in sets)],
            script=str(script) if script else None,
            module=module,
            folder=str(folder),
            stdout=str(streams[0]),
            stderr=str(streams[1]),
            terminal=terminal,
            environment=clean_environment(self.folder) | (environment or {}),
            plots=plots,
            network=network,
            forks=forks and any(str(each).startswith(LAUNCHED) for each in arguments),
        )
        self.started.append(Process(self, pid, None if terminal else streams))
        return self.started[-1]

    def end_all(self) -> None:
        """Kill processes that a test left running."""
        for process in self.started:
            process.end()
        self.started.clear()

    def close(self) -> None:
        self.end_all()
        self._lines.close()
        self._socket.close()


def clean_environment(home: Path) -> dict[str, str]:
    """Return a minimal environment with one thread."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "TMPDIR") if name in os.environ}
    return kept | {"HOME": str(home), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"}


@contextlib.contextmanager
def listening() -> Iterator[Path]:
    """Start a server, and give its address."""
    folder = Path(tempfile.mkdtemp(prefix="server"))  # a socket's path must be short
    command = [sys.executable, SERVER, folder / "socket"]
    with subprocess.Popen(command, env=clean_environment(folder), start_new_session=True) as process:
        yield folder / "socket"
        process.terminate()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def _server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    with contextlib.ExitStack() as stack:
        server = Server(Path(os.environ.get(SHARED) or stack.enter_context(listening())), folder)
        yield server
        server.close()
    shutil.rmtree(folder)


@pytest.fixture
def server(_server: Server) -> Iterator[Server]:
    """A server for processes that a test observes, signals or kills; it kills them after the test."""
    yield _server
    _server.end_all()


@pytest.fixture
def start(server: Server, tmp_path: Path) -> Callable[..., Process]:
    """Start `python -m torchrelay …` in the test's folder, as a process to observe, signal or kill."""

    def started(*arguments: str | Path, folder: Path = tmp_path, **options: Any) -> Process:
        return server.start(*arguments, folder=folder, **options)

    return started


@pytest.fixture
def cli(start: Callable[..., Process]) -> Callable[..., Done]:
    """Run `python -m torchrelay …` to its end, with one thread and a clean environment; no child may be left."""

    def run(*arguments: str | Path, timeout: float = 120, **options: Any) -> Done:
        return start(*arguments, **options).done(timeout)

    return run


@pytest.fixture
def one_line() -> Callable[..., str]:
    """Assert that a command failed with this exit code and one line that contains all of `says`; return the line."""

    def check(done: Done, *says: str, code: int = 1) -> str:
        assert done.returncode == code, f"exit code {done.returncode}: {done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.endswith("\n")
        assert done.stderr.count("\n") == 1, f"more than a line: {done.stderr}"
        for part in says:
            assert part in done.stderr, f"'{part}' isn't in: {done.stderr}"
        return done.stderr.strip()

    return check


class Namespace:
    """A mount namespace in which a test may mount file systems, such as a small disk.

    Args:
        server: starts processes in it.
        pid: a process in it.
    """

    def __init__(self, server: Server, pid: int) -> None:
        self.server = server
        self.pid = pid

    def shell(self, script: str) -> None:
        """Run a shell script in it."""
        entering = ["nsenter", f"--target={self.pid}", "--user", "--mount", "--preserve-credentials"]
        subprocess.run([*entering, "sh", "-ec", script], check=True, capture_output=True, text=True, timeout=60)

    def seen(self, path: Path) -> Path:
        """Return the path of a namespace's file as seen from this process."""
        return Path(f"/proc/{self.pid}/root{path}")


@pytest.fixture(scope="session")
def _namespace(_server: Server) -> Iterator[Namespace | None]:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        yield None
        return
    pid = _server.ask(do="divide", address=str(_server.folder / "inside"))
    inside = Server(_server.folder / "inside", _server.folder)
    inside._count = 100_000  # separate names for its output files
    yield Namespace(inside, pid)
    inside.close()


@pytest.fixture
def namespace(_namespace: Namespace | None) -> Iterator[Namespace]:
    """A mount namespace with its own processes; skips if that isn't allowed."""
    if _namespace is None:
        pytest.skip("unshare -rm isn't allowed here")
    yield _namespace
    _namespace.server.end_all()


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """A terminal: the user's side, and the device for a process."""
    person, device = pty.openpty()
    yield person, os.ttyname(device)
    os.close(person)
    os.close(device)
