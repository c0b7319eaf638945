"""Every module can be imported without POSIX modules and functions, as on Windows."""

PROGRAM = """
import importlib, os, pkgutil, signal, sys

from forked import forget

# Our dependencies, which check the platform themselves.
import matplotlib.pyplot, portalocker, rich.progress, torch.utils.tensorboard, torchvision

forget("torchrelay")
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
print(len([name for name in sys.modules if name.startswith("torchrelay.")]))
"""


def test_importing_needs_no_posix_modules(cli):
    done = cli(program=PROGRAM)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
