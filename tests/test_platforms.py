"""Every module can be imported where POSIX's own modules and functions are missing, as on Windows."""

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, os, pkgutil, signal, sys

import torch, torchvision, matplotlib.pyplot, rich.progress, torch.utils.tensorboard  # of other people

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for module, names in (
    (signal, ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGQUIT", "SIGHUP")),
    (os, ("fork", "register_at_fork", "waitid", "sched_getaffinity", "getuid", "nice", "WNOHANG")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("package", ["torchrelay.device", "torchrelay.distributed", "torchrelay"])
def test_nothing_of_posix_alone_is_needed_to_import(package):
    done = subprocess.run([sys.executable, "-c", PROGRAM, package], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
