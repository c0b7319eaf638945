"""Step 4: portable bits: what a run needs to have the same ones on every x86-64 processor with AVX2.

With the pins of `run.pins`, the libraries choose the same kernels everywhere, and on one thread none of them divides a
sum by the number of threads. docs/evidence/portable.md has the operations.
"""

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrelay.device import private
from torchrelay.errors import UsageError
from torchrelay.run.pins import PINS


def check_pins() -> None:
    """Refuse a processor or a PyTorch that can't compute portable bits, and pins that aren't in force.

    Raises:
        UsageError: naming what is missing, and what to do.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    here = {
        "a processor with AVX2": capabilities.get("avx2", platform.machine().lower() in ("x86_64", "amd64")),
        "PyTorch with MKL": torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
        "PyTorch with oneDNN": torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    }
    if missing := [name for name, is_here in here.items() if not is_here]:
        raise UsageError(f"run.portable needs {' and '.join(missing)}, which isn't here: leave it out")
    unset = {name for name, value in PINS.items() if os.environ.get(name) != value}
    if unset or torch.backends.cpu.get_cpu_capability() != "AVX2" or private.mkl_branch() not in (None, "COMPATIBLE"):
        pins = " ".join(f"{name}={value}" for name, value in PINS.items())
        raise UsageError(
            "run.portable needs environment variables that are set before torch is imported: start the script by "
            f"{pins} python …"
        )


@cache
def replace_roots() -> None:
    """Replace PyTorch's square root on the CPU, from now on in this process, as AdamW takes it of each element.

    It is MKL's, which begins with the processor's approximation of 1 / root, and Intel's isn't AMD's.
    """
    roots: dict[str, Callable[..., Tensor]] = {"sqrt": _root, "sqrt_": _root_in_place, "sqrt.out": _root_into}
    for name, function in roots.items():
        private.replace_operator(name, function)


def _root(x: Tensor) -> Tensor:
    """Return the root by operations that the IEEE rounds: of float32, the nearest number."""
    if x.is_complex():
        return x.pow(0.5)
    return x.double().rsqrt().reciprocal().to(x.dtype if x.is_floating_point() else torch.get_default_dtype())


def _root_in_place(x: Tensor) -> Tensor:
    return x.copy_(_root(x))


def _root_into(x: Tensor, *, out: Tensor) -> Tensor:
    return out.resize_(x.shape).copy_(_root(x))


@cache
def arithmetic() -> str:
    """Return a hash of a few results that differ where kernels do: equal on two machines whose bits are."""
    digest = hashlib.sha256()
    for tensor in _results():
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def c_library() -> str:
    """Return the C library, whose cosine and powers the schedules use."""
    return " ".join(platform.libc_ver()).strip() or platform.system()


def _results() -> Iterator[Tensor]:
    """Yield results of products, convolutions and functions of fixed numbers."""
    numbers = (torch.arange(60_000, dtype=torch.int64) * 7_919 % 2_003 - 1_001).float() / 512
    a, b = numbers[:11_100].view(37, 300), numbers[:12_300].view(300, 41)
    yield from (a @ b, a.double() @ b.double(), a @ b[:, 0], torch.linalg.qr(a.T)[0])
    yield from (
        numbers.exp(),
        numbers.tanh(),
        F.gelu(numbers),
        numbers.erf(),
        numbers.abs().log1p(),
        numbers.abs().sqrt(),
    )
    yield from (numbers.sum(), numbers.norm(), a.softmax(1), F.layer_norm(a, (300,)))
    maps = numbers[:32_768].view(8, 16, 16, 16).clone().requires_grad_()
    for size in (1, 3):
        weight = numbers[: 32 * 16 * size**2].view(32, 16, size, size).clone().requires_grad_()
        for images in (maps, maps[:1]):
            outputs = F.conv2d(images, weight, padding=size // 2)
            yield from (outputs, *torch.autograd.grad(outputs, (maps, weight), outputs.detach()))
