"""Step 4: what this machine's CPU is, as far as it decides which kernels run and how fast they are."""

import platform
from functools import cache
from typing import Any

import torch

# Besides the width of vectors, PyTorch's libraries choose kernels by these.
_UNITS = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def name() -> str:
    """Return the CPU's model name."""
    return str(_capabilities().get("cpu_name") or platform.machine())


def instructions() -> str:
    """Return the vector instructions that PyTorch uses, and the CPU's units for half precision."""
    units = [unit for unit in _UNITS if _capabilities().get(unit)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *units])


def has_amx() -> bool:
    """Return whether this CPU multiplies bf16 matrices in tiles."""
    return bool(_capabilities().get("amx_bf16"))


def identity(device: torch.device) -> dict[str, str | int | bool]:
    """Return what decides the last bits of a result on this machine."""
    facts: dict[str, str | int | bool] = {}
    if device.type == "cuda":
        facts["cudnn"] = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({name()})"
    return facts | {
        "torch": torch.__version__,
        "device": kind,
        "instructions": instructions(),
        "threads": torch.get_num_threads(),
    }


@cache
def _capabilities() -> dict[str, Any]:
    """Return PyTorch's description of the CPU; an older PyTorch has none."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities
