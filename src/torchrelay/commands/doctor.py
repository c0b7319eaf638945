"""What this machine has, and what a run would use of it."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from torchrelay.device import processor
from torchrelay.device.device import DeviceSettings, set_up

_PACKAGES = ("torchrelay", "torch", "torchvision", "timm", "torchmetrics", "tensorboard", "safetensors", "scikit-learn")


def findings() -> dict[str, str]:
    """Return what was found, by name."""
    device = set_up(DeviceSettings(), exact=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": f"{processor.name()}, {os.cpu_count()} cores, {processor.instructions()}",
        "memory": f"{memory / 2**30:.0f} GiB",
        "threads": f"{torch.get_num_threads()} for one operation (device.threads)",
        "CUDA": _cuda(),
        "MPS": "yes" if torch.backends.mps.is_available() else "no",
        "device.name auto": device.describe(),
        "bf16 on the CPU": "in hardware" if _has_bf16() else "emulated: keep device.precision float32",
        "shared memory": _free("/dev/shm"),  # noqa: S108 - loader workers hand batches over through it
        "disk here": _free("."),
    }
    return found | {name: _version(name) for name in _PACKAGES}


def examine() -> None:
    """Print what was found as a table."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in findings().items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no" if torch.version.cuda else "no: this build of torch is for the CPU"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB)" for d in devices)


def _has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _free(folder: str) -> str:
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free" if Path(folder).is_dir() else "none"
