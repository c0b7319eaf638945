"""`torchrelay doctor`: show what this machine has, and what a run would use of it; or try a recipe's layers on it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torchrelay.commands.options import add_common, code_of, terminal_of
from torchrelay.errors import RelayError

if TYPE_CHECKING:
    import torch

    from torchrelay.data.batch import Batch
    from torchrelay.train.layers import LayerCheck
    from torchrelay.train.step import TrainStep

HELP = "show this machine's devices and libraries, and what a run would use"
_PACKAGES = ("torchrelay", "torch", "torchvision", "timm", "torchmetrics", "tensorboard", "safetensors", "scikit-learn")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--deep",
        metavar="RECIPE",
        help="try each layer of a recipe's model: against float64, twice, on one thread, in both memory formats",
    )
    add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Print the findings as a table."""
    from rich.console import Console
    from rich.table import Table

    if options.deep is not None:
        examine(options)
        return

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in findings().items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def examine(options: argparse.Namespace) -> None:
    """Print what was found of each layer.

    Raises:
        RelayError: an exact run can't stand on one of them.
    """
    from torchrelay.recipe import recipe
    from torchrelay.recipe.build import build_trainer
    from torchrelay.train.layers import check_layers

    loaded = recipe.load(options.deep, options.overrides)
    trainer = build_trainer(loaded, code=code_of(options), terminal=terminal_of(options))
    step, batch = trainer.train_step, next(iter(trainer.batches.epoch(0)))
    trainer.model.train()
    checks = list(check_layers(step, batch))
    show(checks)
    compiled = _compiled(step, batch)
    print(f"compiled with torch.compile: {compiled}")
    bad = [each.name for each in checks if not each.is_good]
    if bad:
        raise RelayError(
            f"{len(bad)} of {len(checks)} layers can't be trusted here ({', '.join(bad[:5])}): try "
            "device.precision=float32, another memory format (device.channels_last) or another version of torch"
        )
    print(f"all {len(checks)} layers are right, and the same twice")


def show(checks: list[LayerCheck]) -> None:
    """Print a row for each layer."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in ("layer", "kind", "input"):
        table.add_column(head, no_wrap=True, max_width=12 if head == "kind" else None)
    for head in ("forward", "backward", "twice", "1 thread", "format"):
        table.add_column(head, justify="right")
    for each in checks:
        row = (
            each.name,
            each.kind,
            "×".join(map(str, each.input_shape)),
            _error(each.forward),
            _error(each.backward),
            "same" if each.twice else "DIFFERS",
            "" if each.one_thread is None else "same" if each.one_thread else "other",
            _error(each.other_format),
        )
        table.add_row(*row, style=None if each.is_good else "bold red")
    console = Console(highlight=False)
    console.print(
        "forward, backward: error against float64, as a part of the norm; format: in the other memory format; twice, 1 "
        "thread: the bits"
    )
    console.print(table)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _compiled(step: TrainStep, batch: Batch) -> str:
    from torchrelay.train.layers import compile_error

    try:
        differ = compile_error(step, batch)
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything
        return f"not possible here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return f"gradients differ by {differ:.0e} of their norm from the eager ones"


def findings() -> dict[str, str]:
    """Return what this machine has, by name."""
    import torch

    from torchrelay.device.device import DeviceSettings, instructions, processor_name, set_up

    device = set_up(DeviceSettings(), exact=True)
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": f"{processor_name()}, {os.cpu_count()} cores, {instructions()}",
        "memory": _memory(),
        "threads": f"{torch.get_num_threads()} for one operation (device.threads)",
        "CUDA": _cuda(),
        "MPS": "yes" if torch.backends.mps.is_available() else "no",
        "device.name auto": device.describe(),
        **_products(device.device),
        # Loader workers hand over their batches through it.
        "shared memory": _free("/dev/shm"),  # noqa: S108
        "disk here": _free("."),
        **{name: _version(name) for name in _PACKAGES},
    }


def _products(device: torch.device) -> dict[str, str]:
    """Return how fast this device multiplies matrices in each precision, and what follows for `device.precision`."""
    import torch

    rates = {name: _rate(dtype, device) for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))}
    rows = {f"{name} products": f"{rate:.3g} GFLOP/s" for name, rate in rates.items()}
    gain = rates["bf16"] / rates["float32"]
    advice = f", {gain:.1f} times as fast as float32" if gain >= 1 else ", slower: keep device.precision float32"
    return rows | {"bf16 products": rows["bf16 products"] + advice}


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return how many GFLOP/s products of 512x512 matrices reach: the best of a quarter of a second."""
    import torch

    size = 512
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times, began = list[float](), time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < 0.25:  # the first one chooses kernels
        start = time.perf_counter()
        (one @ other)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


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
