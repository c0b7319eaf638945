"""Start real processes without the seconds that importing PyTorch takes: this one has imported it, and forks.

Each process has its own session, streams, environment and signals, and ends like any Python process; only its imports
are already done. Run as `fork_server.py SOCKET`; a fork serves each client, and a request and its answer are a line of
JSON each.

A process that starts others through PyTorch's launcher may fork them likewise. They are its children: the kernel
reparents an orphan to the nearest ancestor that is a subreaper.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
_PR_SET_CHILD_SUBREAPER = 36
_MADV_COLLAPSE, _LARGE = 25, 2**21


def preload() -> None:
    """Import what a training needs, including lazy imports."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import PIL.Image
    import pydantic.validate_call_decorator
    import sklearn.datasets.data
    import sklearn.datasets.descr
    import tensorboard.compat.proto.summary_pb2
    import tensorboard.plugins.hparams.api_pb2
    import tensorboard.plugins.hparams.metadata
    import torch
    import torch._inductor
    import torch.distributed.launcher.api
    import torch.utils.flop_counter
    import torch.utils.tensorboard
    import torchmetrics
    import torchvision.models
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    import torchrelay

    for module in pkgutil.walk_packages(torchrelay.__path__, "torchrelay."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    PIL.Image.preinit()
    # What a fork would do once, this process does for all of them: parsers, and scikit-learn's reading of a text.
    torchrelay.cli._parsers()
    sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)
    sklearn.datasets.load_digits()
    sys.path.append(str(Path(__file__).parent / "distributed"))
    importlib.import_module("forked")
    # A launcher asks for names of functions, for each of which torch reads the source of the whole stack: that takes
    # 1.5 s where so many modules are loaded.
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
    torch.use_deterministic_algorithms(True)  # so that what it imports is imported
    torch.use_deterministic_algorithms(False)
    weakref.finalize._registry.clear()  # torch takes its hundreds of operators down when a process exits
    gc.freeze()  # the garbage collector of a fork doesn't touch, and so copy, the imported modules
    use_large_pages()
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "only a process of one thread can be forked"
    assert all((matplotlib, pydantic, sklearn, tensorboard, torchmetrics, torchrelay, torchvision))


def draw_nothing() -> Callable[[], None]:
    """Leave out a run's pictures, which take longer than a short training: its plots and its first batch.

    Returns:
        A function that restores them.
    """
    from torchrelay.run.plots import PlotProcess
    from torchrelay.run.trackers import TensorBoard

    start, prepare, images = PlotProcess.start, PlotProcess.prepare, TensorBoard.images

    def images_but_the_first(board: TensorBoard, tag: str, *rest: Any, **more: Any) -> None:
        if tag != "pictures/first batch":
            images(board, tag, *rest, **more)

    def restore() -> None:
        PlotProcess.start, PlotProcess.prepare, TensorBoard.images = start, prepare, images

    PlotProcess.start = PlotProcess.prepare = lambda *_, **__: None
    TensorBoard.images = images_but_the_first
    return restore


def use_large_pages() -> None:
    """Use pages of 2 MiB for this process's memory if Linux can: a fork copies the page table."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, access, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in place.split("-"))
        start, end = -(-start // _LARGE) * _LARGE, end // _LARGE * _LARGE
        if access.startswith("rw") and inode == "0" and start < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_COLLAPSE)


def serve(address: str) -> dict[str, Any]:
    """Let a fork answer each client until the parent has ended; return only in a forked process, with its request."""
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        listening.settimeout(1)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                connection, _ = listening.accept()
                if os.fork() == 0:
                    listening.close()
                    return answer(connection)
                connection.close()
    os._exit(0)


def answer(connection: socket.socket) -> dict[str, Any]:
    """Answer requests until the socket is closed; return only in a forked process, with its request."""
    with connection, connection.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            found: Any = None
            if request["do"] == "wait":
                found = wait(request["pid"], request["timeout"])
            elif (found := os.fork()) == 0:
                return request
            lines.write(json.dumps(found) + "\n")
            lines.flush()
    os._exit(0)


def wait(pid: int, timeout: float) -> int | None:
    """Return a process's exit code, negative for a signal, or None if it has not ended in time."""
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def become(request: dict[str, Any]) -> None:
    """Turn this fork into the requested process, and run its program."""
    os.setsid()
    if request["network"]:
        enter_network(request["network"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    terminal = request["terminal"]
    streams = (terminal,) * 3 if terminal else (os.devnull, request["stdout"], request["stderr"])
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    # The server's own were opened for another kind of file, and would seek in a terminal.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    encoding = os.environ.get("PYTHONIOENCODING")
    sys.stdout = open(1, "w", buffering=1 if terminal else -1, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.closerange(3, 1024)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()  # a crash, or SIGABRT to a hanging process, prints the stack of each thread
    sys.argv = request["argv"]
    if request["forks"] and fork_children():
        request["module"] = "torchrelay"
    sys.path[0] = str(Path(request["script"]).parent) if request["script"] else request["folder"]
    if not request["plots"]:
        draw_nothing()
    try:
        if request["script"]:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        leave(end.code)
    except Exception:  # noqa: BLE001 - whatever ends it
        sys.excepthook(*sys.exc_info())
        leave(1)
    except BaseException:
        gc.unfreeze()
        raise
    leave(0)


def enter_network(name: str) -> None:
    """Enter a network namespace, as `ip netns exec` does."""
    with Path(f"/run/netns/{name}").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def leave(code: Any) -> None:
    """Exit like Python, without tearing down the imported modules, which would take seconds."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or the reader is gone
            stream.flush()
    os._exit(code or 0)


def fork_children() -> bool:
    """Let PyTorch's launcher in this process fork `python -m torchrelay …` instead of starting it.

    Returns:
        Whether this is one of the forked processes.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    parent = os.getpid()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    mine, others = socket.socketpair()
    if os.fork() == 0:  # this process never has threads
        mine.close()
        serve_parent(others.makefile("rw", encoding="utf-8"), parent)
        return True
    others.close()
    lines = mine.makefile("rw", encoding="utf-8")

    def popen(handler: Any, args: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen:
        module = args.index("torchrelay")
        assert args[1:module] in (("-m",), ("-u", "-m")), args
        lines.write(json.dumps([args[module + 1 :], environment]) + "\n")
        lines.flush()
        return Forked(int(lines.readline()))

    subprocess_handler.SubprocessHandler._popen = popen
    return False


def serve_parent(lines: Any, parent: int) -> None:
    """Fork until the parent has ended; return in the forked processes."""
    for line in lines:
        argv, environment = json.loads(line)
        between, also_between = os.pipe()
        if (middle := os.fork()) == 0:
            if (pid := os.fork()) > 0:
                os.write(also_between, str(pid).encode())
                os._exit(0)
            while os.getppid() != parent:
                time.sleep(0.001)
            os.setsid()
            os.closerange(3, 1024)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv[1:] = argv
            return
        os.waitpid(middle, 0)
        lines.write(os.read(between, 100).decode() + "\n")
        lines.flush()
        os.close(between)
        os.close(also_between)
    os._exit(0)


class Forked(subprocess.Popen):
    """A forked process with the interface of `Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid, self.args, self.returncode = pid, (), None
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._waitpid_lock = True, threading.Lock()


def divide() -> None:
    """Enter a new user and mount namespace, as `unshare -rm` does."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


if __name__ == "__main__":
    preload()
    wanted = serve(sys.argv[1])
    while wanted["do"] == "divide":
        divide()
        wanted = serve(wanted["address"])
    become(wanted)
