"""Every module can be imported without POSIX modules and functions, as on Windows."""

import subprocess
import sys

PROGRAM = """
import importlib, os, pkgutil, signal, sys

# Our dependencies, which check the platform themselves.
import matplotlib.pyplot, portalocker, rich.progress, torch.utils.tensorboard, torchvision

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for module, names in (
    (signal, ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGQUIT", "SIGHUP")),
    (os, ("fork", "register_at_fork", "waitid", "sched_getaffinity", "getuid", "nice", "WNOHANG")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

import torchrelay
for module in pkgutil.walk_packages(torchrelay.__path__, "torchrelay."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_importing_needs_no_posix_modules():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
