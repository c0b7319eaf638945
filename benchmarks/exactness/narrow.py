"""Show that PyTorch's bf16 weight gradient of a strided convolution reads memory that it didn't write, and where.

    python -m benchmarks.exactness.narrow

Each row computes the gradient several times with other values in the allocator's free memory, and compares it with
float64. oneDNN's kernel for AVX-512 (`jit_bf16`) copies, for each remainder of the columns by the stride, the columns
that have it. Where no column has it, as where maps are narrower than the stride, the copy isn't written; the taps of
the kernel that meet it are multiplied with what is there.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import machine
from benchmarks.page import markdown
from torchrelay.models.convolution import Conv2d, reads_gaps
from torchrelay.train.self_check import FILLINGS, fill_free_memory

TIMES = 8  # a gradient is computed
HEAD = ("layer", "input", "known by its shape", "wrong", "largest number", "wrong taps")
_ROUNDING = 0.02  # of the largest number, which bf16 explains


def cases() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Yield layers, with the shape of their input."""
    for batch in (1, 50, 100):
        yield "", nn.Conv2d(256, 512, 3, stride=2, padding=1, bias=False), (batch, 256, 1, 1)
    yield "", nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False), (50, 64, 1, 1)
    yield "channels last", nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False), (50, 64, 1, 1)
    layer: Callable[..., nn.Conv2d] = partial(nn.Conv2d, 32, 32, bias=False)
    for height, width in ((2, 2), (1, 4), (4, 1)):
        yield "", layer(3, stride=2, padding=1), (50, 32, height, width)
    yield "", layer(3, stride=(1, 2), padding=1), (50, 32, 4, 1)
    yield "", layer(3, stride=(2, 1), padding=1), (50, 32, 4, 1)
    yield "", layer(3, stride=1, padding=1), (50, 32, 1, 1)
    yield "", layer(3, stride=3, padding=1), (50, 32, 2, 2)
    yield "", layer(5, stride=2, padding=2), (50, 32, 1, 1)
    yield "", layer(1, stride=2), (50, 32, 1, 1)
    yield "", layer(3, stride=2, padding=2, dilation=2), (50, 32, 1, 1)
    yield "channels last", layer(3, stride=2, padding=1, groups=4), (50, 32, 1, 1)
    yield "", layer(3, stride=2, padding=1, groups=32), (50, 32, 1, 1)
    yield "", nn.Conv1d(32, 32, 3, stride=2, padding=1, bias=False), (50, 32, 1)
    yield "", nn.Conv3d(32, 32, 3, stride=2, padding=1, bias=False), (50, 32, 4, 4, 1)
    yield "", nn.ConvTranspose2d(32, 32, 3, stride=2, padding=1, bias=False), (50, 32, 4, 1)
    yield "torchrelay's", Conv2d(64, 128, 3, stride=2, padding=1, bias=False), (50, 64, 1, 1)


def gradients(layer: nn.Module, maps: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return a layer's weight gradient in float64, and several in another type."""
    with torch.autocast("cpu", enabled=False):
        outputs = layer(maps)
        gradient = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        exact = layer.double()(maps.double())
        (true,) = torch.autograd.grad(exact, layer.weight, gradient.double())  # type: ignore[arg-type]
    layer.float()
    found = []
    for number in range(TIMES):
        fill_free_memory(FILLINGS[number % len(FILLINGS)], 2**24, maps.device)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            (one,) = torch.autograd.grad(layer(maps), layer.weight, gradient)  # type: ignore[arg-type]
        found.append(one.double())
    return true, found


def row(note: str, layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[str, ...]:
    """Return a row of the table."""
    layout = torch.channels_last if note == "channels last" else torch.contiguous_format
    torch.manual_seed(0)
    maps = torch.randn(shape).to(dtype).float()
    layer = layer.to(memory_format=layout) if note == "channels last" else layer
    width = shape[-1] * 2 - 1 if isinstance(layer, nn.ConvTranspose2d) else shape[-1]
    expected = dtype is torch.bfloat16 and reads_gaps(layer, width) and not isinstance(layer, Conv2d)
    true, found = gradients(layer, maps.contiguous(memory_format=layout) if note else maps, dtype)
    far = [~((one - true).abs() <= _ROUNDING * true.abs().max()) for one in found]
    times = sum(bool(each.any()) for each in far)
    taps = torch.stack(far).flatten(0, 2).any(0).flatten().nonzero().flatten().tolist()
    finite = [float(one[one.isfinite()].abs().max()) for one in found]
    title = str(layer).replace(", bias=False", "").replace("kernel_size=", "")
    return (
        f"`{title}`" + (f", {note}" if note else "") + (", float32" if dtype is torch.float32 else ""),
        "x".join(map(str, shape)),
        "yes" if expected else "no",
        f"{times} of {TIMES}",
        f"{max(finite):.0e}" if times else f"{max(finite):.2g}",
        f"{len(taps)} of {layer.weight[0, 0].numel()}",  # type: ignore[index]
    )


def rows() -> list[tuple[str, ...]]:
    """Return the table: convolutions in bf16, and one in float32."""
    found = [row(note, layer, shape) for note, layer, shape in cases()]
    plain = nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False)
    return [*found, row("", plain, (50, 64, 1, 1), torch.float32)]


def main() -> None:
    print(f"{machine()}\n\n{markdown(HEAD, rows())}")


if __name__ == "__main__":
    main()
