"""Step 4, on the CPU: memory that a step has freed stays with the process for the next one.

As it comes, the C library gives large blocks back to the system at once and takes new ones, whose pages the system must
fill with zeros at their first touch. In a training step that can cost as much as half the arithmetic.
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_KEPT = 2**31 - 1  # bytes free at the end of the heap before any go back: the most that can be said
_LARGEST = 2**30  # bytes; a larger block is still taken alone, and given back


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed, unless the environment tunes it already; return whether it was told.

    It changes no result. The process's resident memory stays near its peak until it ends.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # another C library
        return False
    return not tuned and all((mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, _KEPT)))
