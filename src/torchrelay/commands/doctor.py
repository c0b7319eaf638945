"""`torchrelay doctor`: show what this machine has, and what a run would use of it."""

import argparse
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

HELP = "show this machine's devices and libraries, and what a run would use"
_PACKAGES = ("torchrelay", "torch", "torchvision", "timm", "torchmetrics", "tensorboard", "safetensors", "scikit-learn")


def add_options(_parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options of its own."""


def run(_options: argparse.Namespace) -> None:
    """Print the findings as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in findings().items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def findings() -> dict[str, str]:
    """Return what this machine has, by name."""
    import torch

    from torchrelay.device.device import DeviceSettings, instructions, processor_name, set_up

    device = set_up(DeviceSettings(), exact=True)
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": f"{processor_name()}, {os.cpu_count()} cores, {instructions()}",
        "memory": _memory(),
        "threads": f"{torch.get_num_threads()} for one operation (device.threads)",
        "CUDA": _cuda(),
        "MPS": "yes" if torch.backends.mps.is_available() else "no",
        "device.name auto": device.describe(),
        "bf16 on the CPU": "in hardware" if has_bf16 else "emulated: keep device.precision float32",
        # Loader workers hand over their batches through it.
        "shared memory": _free("/dev/shm"),  # noqa: S108
        "disk here": _free("."),
        **{name: _version(name) for name in _PACKAGES},
    }


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, ValueError):  # Windows has no sysconf
        return "unknown"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no" if torch.version.cuda else "no: this build of torch is for the CPU"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB)" for d in devices)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _free(folder: str) -> str:
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free" if Path(folder).is_dir() else "none"
