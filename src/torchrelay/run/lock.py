"""Locks between processes, which the operating system releases when their holder ends; and one around a fork."""

import os
import struct
import sys
import threading
from pathlib import Path
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


def is_locked(path: Path) -> bool:
    """Return whether another process holds the lock of a file; it is asked without taking it, so nobody is refused.

    False where that can't be told: the structure below is Linux's.
    """
    if sys.platform != "linux" or not path.exists():
        return False
    import fcntl

    # A process asks about the start of the file, as `lockf` locks it: struct flock with its type, whence, start,
    # length and process id.
    query = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with path.open("rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, query)
    except OSError:
        return False
    kind: int = struct.unpack("hhqqi", answer)[0]
    return kind != fcntl.F_UNLCK
