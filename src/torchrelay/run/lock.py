"""Locks between processes, which the operating system releases when their holder ends; and one around a fork."""

import sys
import threading
from typing import IO, Any

from portalocker import LockFlags
from portalocker import portalocker as lockers

# Held by a background thread that calls PyTorch, and while worker processes are forked. A fork copies the C library's
# locks as they are, and an operator's first call takes one (to register a destructor): a worker that is forked at that
# moment would wait for it for ever.
around_fork = threading.Lock()


def lock(file: IO[Any], *, wait: bool) -> None:
    """Lock an open file exclusively, until it is closed or the process ends.

    Args:
        file: opened for writing.
        wait: whether to wait for another holder; otherwise `portalocker.AlreadyLocked` is raised.

    Raises:
        LockException: of portalocker: the file system has no locks.
    """
    flags = LockFlags.EXCLUSIVE if wait else LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING
    if sys.platform == "win32":
        lockers.lock(file, flags)
    else:
        # lockf belongs to the process alone: forked loader workers would keep a flock after kill -9.
        lockers.LockfLocker().lock(file, flags)
