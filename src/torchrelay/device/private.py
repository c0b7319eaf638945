"""Calls that PyTorch and the C library don't document as public, all in one place, each with what it gains.

Everything else uses public functions only. Each call here falls back to a public one, or does nothing, where it is
missing. docs/explanation/decisions.md has the measurements.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_KEPT = 2**31 - 1  # bytes free at the end of the heap before any are returned: the largest value that fits
_LARGEST = 2**30  # bytes; a larger block is still mapped on its own, and returned


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep freed memory for the next step, unless the environment configures the allocator.

    By default it returns large blocks to the system and maps new ones, whose pages the system fills with zeros on first
    use. A bf16 step of cifar10-fast on the CPU took 1,413 to 1,588 ms with the default, and 1,074 to 1,124 ms with
    freed memory kept, at the same peak. Resident memory stays near its peak until the process ends.

    Returns:
        Whether the allocator was configured: not on another C library.
    """
    configured = any(name.startswith("MALLOC_") for name in os.environ)
    configured = configured or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # another C library
        return False
    return not configured and all((mallopt(_MMAP_THRESHOLD, _LARGEST), mallopt(_TRIM_THRESHOLD, _KEPT)))


def mkl_branch() -> str | None:
    """Return which branch of its code MKL computes by ("OFF" if it follows the processor), or None if it can't be told.

    `MKL_CBWR` chooses it, if it is set before the first product; MKL's public function for it isn't part of PyTorch.
    """
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        branch = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / name)).mkl_serv_cbwr_get(1)
    except (AttributeError, OSError):
        return None
    return {1: "OFF", 2: "AUTO", 3: "COMPATIBLE"}.get(branch, f"branch {branch}")


# What is replaced stays so while it lives.
_replaced = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def replace_operator(name: str, function: Callable[..., Tensor]) -> None:
    """Let a function of Python's compute an operator of PyTorch's own on the CPU, such as "sqrt", for all callers."""
    _replaced.impl(name, function, "CPU", allow_override=True)  # type: ignore[no-untyped-call]


def use_deterministic_algorithms(deterministic: bool, compiles: bool) -> None:
    """Call `torch.use_deterministic_algorithms`, without its import of the compiler if nothing will be compiled.

    That import takes 0.6 s at each start.
    """
    if compiles or "torch._inductor" in sys.modules or not hasattr(torch._C, "_set_deterministic_algorithms"):
        torch.use_deterministic_algorithms(deterministic)
    else:
        torch._C._set_deterministic_algorithms(deterministic)


def run_backward(loss: Tensor, gradient: Tensor) -> None:
    """Do what `loss.backward(gradient)` does, without its checks of the arguments: 10 us less per step.

    Args:
        loss: without dimensions.
        gradient: of the same shape and dtype, the gradient with respect to `loss` to begin with.
    """
    _engine_run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def forget_removed_hooks(tensor: Tensor) -> None:
    """Let the backward pass call Python no more for a tensor all of whose hooks were removed.

    PyTorch keeps the empty dictionary and takes the interpreter's lock in each backward pass to look into it: 1% of the
    instructions of a small network's step.
    """
    if not getattr(tensor, "_backward_hooks", True):
        tensor._backward_hooks = None


def set_timeout(timeout: timedelta, group: Any) -> None:
    """Change how long a torch process group waits: newer releases of PyTorch have a public function for it."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    (getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout)(timeout, group)


def default_store() -> Any:
    """Return the store through which the processes met; PyTorch has no public function for it."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
