"""Look for kernels whose results can't be trusted: convolutions, products and norms alone, over shapes and precisions.

    python -m benchmarks.exactness.kernels [--quick] [--out docs/evidence/kernels.md]

Each layer is computed twice, with other values in the allocator's free memory, on one thread and on all, and against
float64, by what `torchrelay doctor --deep` uses. A precision that this processor only emulates is left out.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.exactness import narrow
from benchmarks.measure import machine
from benchmarks.page import NOT_MEASURED, markdown
from torchrelay.device.device import Device, DeviceSettings, set_up
from torchrelay.train.layers import LayerCheck, check_layer

CHANNELS = ((64, 128), (128, 256), (256, 512))
BATCHES = (1, 7, 50, 100)
SIZES = (1, 2, 4, 7)
KERNELS = ((1, 0), (3, 1))  # with their padding
STRIDES = (1, 2)


def convolutions(quick: bool) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Yield convolutions with inputs (batch, channels, size, size), in both memory formats."""
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    cases = itertools.product(CHANNELS[: 1 if quick else None], BATCHES, SIZES, KERNELS, STRIDES, formats)
    for (inputs, outputs), batch, size, (kernel, padding), stride, name in cases:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False).to(memory_format=formats[name])
        images = torch.randn(batch, inputs, size, size).contiguous(memory_format=formats[name])
        title = f"{inputs} to {outputs}, kernel {kernel}, stride {stride}, {batch} maps of {size}x{size}, {name}"
        yield f"convolution {title}", layer, images


def others() -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Yield products, norms and pools with inputs of usual shapes."""
    for batch, width in itertools.product(BATCHES, (10, 64, 512)):
        yield f"product {batch}x{width}", nn.Linear(width, 2 * width), torch.randn(batch, width)
        yield f"layer norm {batch}x{width}", nn.LayerNorm(width), torch.randn(batch, 8, width)
    for batch, size in itertools.product(BATCHES, SIZES):
        if batch * size > 1:
            yield f"batch norm, {batch} maps of {size}x{size}", nn.BatchNorm2d(64), torch.randn(batch, 64, size, size)
    for size in (4, 7):
        for pool in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)):
            yield f"{type(pool).__name__} of {size}x{size}", pool, torch.randn(50, 64, size, size)


def tried(device: Device, quick: bool) -> list[LayerCheck]:
    """Check all layers in the device's precision."""
    torch.manual_seed(0)
    layers = itertools.chain(convolutions(quick), others())
    return [
        check_layer(title, layer.to(device.device), (inputs.to(device.device),), device)
        for title, layer, inputs in layers
    ]


def rows(quick: bool) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return a row for each precision, and a line for each layer that can't be trusted."""
    found, bad = [], []
    emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for precision in ("float32", "bf16"):
        device = set_up(DeviceSettings(name="cpu", precision=precision), exact=True)
        if precision == "bf16" and emulated:
            found.append((device.describe(), *[NOT_MEASURED] * 4))
            continue
        checks = tried(device, quick)
        counts = Counter(
            twice=sum(not each.twice for each in checks),
            wrong=sum(each.twice and not each.is_good for each in checks),
            threads=sum(each.one_thread is False for each in checks),
        )
        found.append(
            (device.describe(), f"{len(checks)}", *(f"{counts[key]}" for key in ("twice", "wrong", "threads")))
        )
        bad += [f"- {precision}: {each.name}: backward {each.backward:.0e}" for each in checks if not each.is_good]
    return found, bad


STRIDED = """\
import sys, torch
torch.manual_seed(0)
layer = torch.nn.Conv2d(int(sys.argv[1]), 16, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
images = torch.randn(32, layer.in_channels, 32, 32).contiguous(memory_format=torch.channels_last)
outputs, found = layer(images), []
gradient = torch.randn_like(outputs)
for each in (torch.float32, torch.float64):
    layer, outputs = layer.to(each), layer.to(each)(images.to(each))
    found.append(torch.autograd.grad(outputs, layer.weight, gradient.to(each))[0].double())
print(f"{float((found[0] - found[1]).norm() / found[1].norm()):.0e}")
"""


def strided() -> list[tuple[str, ...]]:
    """Return what becomes of strided 1x1 convolutions of few channels, each in a process, which may not end."""
    found = list[tuple[str, ...]]()
    for channels in (1, 2, 3, 4, 5, 6, 7, 8, 12):
        try:
            command = [sys.executable, "-c", STRIDED, str(channels)]
            done = subprocess.run(
                command,
                env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
        except subprocess.TimeoutExpired:
            found.append((str(channels), "doesn't end within a minute"))
            continue
        ended = f"killed by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else "failed"
        found.append((str(channels), ended if done.returncode else f"error {done.stdout.strip()}"))
    return found


PAGE = """\
# Kernels that can't be trusted

PyTorch's deterministic mode refuses kernels that are known to vary. A kernel that reads memory which it didn't write
is another matter: its results depend on what was there. So each run checks itself before its first step: the gradients
of the first batch are computed twice, with other values in the allocator's free memory. A gradient that differs, or
isn't finite though the loss is, ends an exact run with the names of the parameter and of the kernel, and warns in
others where the difference is more than rounding. `torchrelay doctor --deep RECIPE` tries each layer of a model alone.

## Each layer alone

Made by `{command}` on {machine}.

{table}

"Other on one thread" isn't an error: the number of threads belongs to a run's identity.

## bf16 maps that are narrower than the stride

On a processor with AVX-512, in torch 2.15 (oneDNN 3.13.3), the bf16 weight gradient of a strided convolution holds
whatever was in memory where its maps have fewer columns than the stride: such as maps of 1x1 with a stride of 2.
Deterministic algorithms and `fill_uninitialized_memory` don't change it. oneDNN's kernel (`jit_bf16`, backward weights)
sorts the columns by their remainder by the stride; a remainder that no column has stays unwritten, and is multiplied
with the gradient at each tap of the kernel that meets it. It takes a kernel wider than 1 with padding and no dilation,
of any batch, in both memory formats, on one thread or more, with `ONEDNN_MAX_CPU_ISA` from `AVX512_CORE` on; not with
`AVX2`, nor in float32 or fp16. Rows don't matter. oneDNN's kernel for AMX sorts columns by the same function; it wasn't
tried.

{narrow}

Each gradient was computed eight times; made by `python -m benchmarks.exactness.narrow` on the same machine.

`torchrelay.models.convolution.Conv2d` adds the padding to such maps itself: its outputs are the same, and its gradient
is right. It takes the place of the strided convolutions of torchvision's and timm's models when a recipe names one.
In other models, a run with such a layer is refused by name before its first step. Computing gradients twice doesn't
find all of them: where the last BatchNorm of a block begins with 0, as timm's do, the first step multiplies what memory
holds by 0. `timm/resnet10t` meets such maps with images of 16 pixels, and not with 32.

## Strided 1x1 convolutions of few channels

`Conv2d(channels, 16, 1, stride=2)` on 32 images of 32x32 in channels-last format, float32, with
`ONEDNN_MAX_CPU_ISA=AVX2`; its weight gradient's error:

{strided}

On a processor without AVX-512, or in a portable run, oneDNN's kernel for it writes past its memory (oneDNN issue 6035):
of 3 to 7 channels, the gradient is wrong, or the process crashes or hangs. A run with such a layer is refused by name
there, before its first step.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--out", type=Path, help="write the page to this file")
    options = parser.parse_args()
    found, bad = rows(options.quick)
    heads = ("device", "layers", "other the second time", "wrong against float64", "other on one thread")
    table = markdown(heads, found) + ("\n\nNot to be trusted:\n\n" + "\n".join(bad) if bad else "")
    command = f"python -m benchmarks.exactness.kernels{' --quick' * options.quick}"
    text = PAGE.format(
        command=command,
        machine=machine(),
        table=table,
        narrow=markdown(narrow.HEAD, narrow.rows()),
        strided=markdown(("channels", "weight gradient"), strided()),
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
