"""Starts real processes without the seconds that importing PyTorch takes: it has imported it, and forks for each.

A process of it has a session, streams, an environment and signals of its own, and ends as any other Python does; only
its imports are done already. Run as `fork_server.py SOCKET`; a request and its answer are a line of JSON each.

A process that starts others through PyTorch's launcher may have them forked likewise. They are its children as they
should be: whose parent ends is given to the next ancestor that has asked for it.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_PR_SET_CHILD_SUBREAPER = 36


def preload() -> None:
    """Import what a training needs, and what is imported only where it is used."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import sklearn.datasets
    import tensorboard.compat.proto.summary_pb2
    import torch
    import torch._inductor
    import torch.distributed.launcher.api
    import torch.utils.tensorboard
    import torchmetrics

    import torchrelay.cli
    import torchrelay.distributed.launch
    import torchrelay.models.summary
    import torchrelay.recipe.predictor
    import torchrelay.report.draw

    torch.use_deterministic_algorithms(True)  # so that what it imports is imported
    torch.use_deterministic_algorithms(False)
    gc.freeze()  # a fork that ends need not look at, and so copy, all that was imported
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "only a process of one thread can be forked"
    assert all((matplotlib, sklearn, tensorboard, torchmetrics, torchrelay))


def serve(address: str) -> dict[str, Any]:
    """Answer requests until the socket is closed; return only in a forked process, with what it shall do."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        connection, _ = listening.accept()
    with connection, connection.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            answer: Any = None
            match request["do"]:
                case "start":
                    if (answer := os.fork()) == 0:
                        return request
                case "wait":
                    answer = wait(request["pid"], request["timeout"])
                case "divide":
                    if (answer := os.fork()) == 0:
                        return request
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
    os._exit(0)


def wait(pid: int, timeout: float) -> int | None:
    """Return a process's exit code, minus the signal's number where one ended it; None if it has not ended in time."""
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def become(request: dict[str, Any]) -> None:
    """Turn this fork into the process that was asked for, and run its program."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    terminal = request["terminal"]
    streams = (terminal,) * 3 if terminal else (os.devnull, request["stdout"], request["stderr"])
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.closerange(3, 1024)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()  # whatever crashes it, or sends SIGABRT as it hangs, is told each thread's place
    sys.argv = request["argv"]
    if request["forks"]:
        fork_children()
    sys.path[0] = request["folder"]
    if not request["plots"]:
        from torchrelay.run.plots import PlotProcess

        PlotProcess.start = lambda *_, **__: None
    try:
        if request["script"]:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            runpy.run_module("torchrelay", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        leave(end.code)
    except BaseException:
        gc.unfreeze()
        raise
    leave(0)


def leave(code: Any) -> None:
    """End as Python does, but for taking apart all that was imported, which would take seconds."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads any more
            stream.flush()
    os._exit(code or 0)


def fork_children() -> None:
    """Let PyTorch's launcher in this process fork `python -m torchrelay …` instead of starting it."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    parent = os.getpid()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    mine, others = socket.socketpair()
    if os.fork() == 0:  # this one has no threads, now and later
        mine.close()
        serve_parent(others.makefile("rw", encoding="utf-8"), parent)
        return
    others.close()
    lines = mine.makefile("rw", encoding="utf-8")

    def popen(handler: Any, args: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen:
        assert args[1:3] == ("-m", "torchrelay"), args
        lines.write(json.dumps([args[3:], environment]) + "\n")
        lines.flush()
        return Forked(int(lines.readline()))

    subprocess_handler.SubprocessHandler._popen = popen


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
    """A process that was forked, as who started it wants to see it."""

    def __init__(self, pid: int) -> None:
        self.pid, self.args, self.returncode = pid, (), None
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._waitpid_lock = True, threading.Lock()


def divide() -> None:
    """Enter a user and a mount namespace of its own, as `unshare -rm` does."""
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
