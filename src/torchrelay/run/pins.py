"""Step 1: the environment variables by which PyTorch's libraries choose the same kernels on every processor.

Each library reads its own when it first computes, so they are set before torch is imported.
"""

import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PINS = {
    # PyTorch's own kernels: those for AVX2, also on a processor with AVX-512.
    "ATEN_CPU_CAPABILITY": "avx2",
    # MKL's products: the only branch that is the same on processors of Intel and of others. It has no AVX.
    "MKL_CBWR": "COMPATIBLE",
    # oneDNN's convolutions.
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
_LARGEST = 2**20  # bytes of a recipe


def needs_pins(file: Path, overrides: Sequence[str] = ()) -> bool:
    """Return whether a recipe has `run.portable`, without torch; what else is wrong with it, is said once it is loaded.

    Args:
        file: the recipe, or the sweep.toml that has it; it need not exist.
        overrides: strings such as "run.portable=true".
    """
    value = None
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        if file.is_file() and file.stat().st_size <= _LARGEST:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
            section = table.get("recipe", table).get("run")  # a sweep's file has more than its recipe
            value = section.get("portable") if isinstance(section, dict) else None
    for override in overrides:
        key, _, text = override.partition("=")
        if key.strip() == "run.portable":
            value = text.strip().lower() == "true"
    return value is True
