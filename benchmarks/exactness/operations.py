"""Compute a table of operations on fixed inputs, and print a line with the SHA-256 of its results' bytes for each.

    python -m benchmarks.exactness.operations [--threads N] [--quick] [--roots] [--skip NAME…]

It imports little beside torch, so that an emulated processor runs it in minutes.
"""

# mypy: disable-error-code="no-untyped-call"

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Results = dict[str, Tensor | list[Tensor]]  # by the part of an operation


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Return about normal numbers, the same everywhere: small integers, divided by a power of two."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-(2**20), 2**20, (3, *shape), generator=generator).sum(0).float() / 2**20


def passes(layer: nn.Module, *inputs: Tensor) -> Results:
    """Return a layer's outputs and gradients; its weights are fixed."""
    for index, weight in enumerate(layer.parameters()):
        weight.data = numbers(*weight.shape, seed=index + 1) / 8
    for each in inputs:
        each.requires_grad_(each.is_floating_point())
    outputs = layer(*inputs)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    wanted = [each for each in inputs if each.requires_grad]
    found = torch.autograd.grad(outputs, [*wanted, *layer.parameters()], numbers(*outputs.shape, seed=9))
    parts: Results = {"forward": outputs}
    parts |= {"input gradient": [*found[: len(wanted)]]} if wanted else {}
    return parts | ({"weight gradient": [*found[len(wanted) :]]} if len(found) > len(wanted) else {})


def layers(quick: bool) -> Iterator[tuple[str, Callable[[], Results]]]:
    """Yield layers by name, with what computes them."""
    maps, few = (lambda: numbers(16, 32, 16, 16)), (lambda: numbers(16, 3, 32, 32))
    yield "linear", lambda: passes(nn.Linear(256, 192), numbers(128, 256))
    yield "convolution 3x3", lambda: passes(nn.Conv2d(32, 48, 3, padding=1), maps())
    yield "convolution 3x3 of 3 channels", lambda: passes(nn.Conv2d(3, 32, 3, padding=1), few())
    yield "convolution 1x1", lambda: passes(nn.Conv2d(32, 64, 1), maps())
    if quick:
        return
    yield "convolution 3x3, stride 2", lambda: passes(nn.Conv2d(32, 64, 3, 2, 1, bias=False), maps())
    yield (
        "convolution 3x3, channels last",
        lambda: passes(nn.Conv2d(32, 48, 3, padding=1), maps().contiguous(memory_format=torch.channels_last)),
    )
    yield "convolution 3x3, one image", lambda: passes(nn.Conv2d(32, 48, 3, padding=1), numbers(1, 32, 16, 16))
    yield "convolution 5x5, depthwise", lambda: passes(nn.Conv2d(32, 32, 5, padding=2, groups=32), maps())
    yield "transposed convolution", lambda: passes(nn.ConvTranspose2d(32, 16, 4, 2, 1), maps())
    yield "convolution of sequences", lambda: passes(nn.Conv1d(32, 48, 5), numbers(16, 32, 128))
    yield "batch norm", lambda: passes(nn.BatchNorm2d(32), maps())
    yield "layer norm", lambda: passes(nn.LayerNorm(192), numbers(64, 16, 192))
    yield "group norm", lambda: passes(nn.GroupNorm(8, 32), maps())
    yield "max pool", lambda: passes(nn.MaxPool2d(2), maps())
    yield "average pool", lambda: passes(nn.AdaptiveAvgPool2d(1), maps())
    yield "embedding", lambda: passes(nn.Embedding(50, 64), torch.arange(5_000) % 47)
    yield "attention", lambda: passes(nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True), numbers(8, 40, 64))
    yield "LSTM", lambda: passes(nn.LSTM(32, 48), numbers(20, 16, 32))
    yield "resizing with antialias", lambda: passes(nn.Upsample(size=(24, 24), mode="bilinear"), maps())


def others(quick: bool) -> Iterator[tuple[str, Callable[[], Results]]]:
    """Yield functions of each element, losses, sums, updates and random numbers."""
    many = numbers(40_001)
    functions: list[Callable[[Tensor], Tensor]] = [torch.exp, torch.tanh, torch.sigmoid, F.gelu, F.silu, torch.erf]
    for function in [*functions, torch.cos, torch.rsqrt][: 1 if quick else None]:
        inputs = many.abs() + 0.1 if function is torch.rsqrt else many
        yield function.__name__, partial(named, function, inputs)
    positive = many.abs() + 0.01
    yield "logarithm", lambda: {"": [positive.log(), positive.log1p()]}
    yield "square root", lambda: {"": positive.sqrt()}
    yield "power of 0.3", lambda: {"": positive.pow(0.3)}
    yield "power of 0.5", lambda: {"": positive.pow(0.5)}
    yield "tan, atan, asin, acos, log2, log10", lambda: {"": rare(positive / positive.max())}
    yield "softmax", lambda: {"": [numbers(64, 1000).softmax(1), numbers(64, 1000).log_softmax(1)]}
    yield "cross entropy", lambda: passes(Loss(), numbers(512, 100))
    yield "sum of 10^6", lambda: {"": numbers(1_000_000).sum()}
    if quick:
        return
    yield "mean, variance", lambda: {"": [numbers(1_000_000).mean(), numbers(1_000_000).var()]}
    yield "sums of rows and columns", lambda: {"": [numbers(1000, 300).sum(0), numbers(1000, 300).sum(1)]}
    yield "norm of gradients", lambda: {"": [norm(), numbers(300_000).norm()]}
    yield "batched product", lambda: {"": numbers(12, 40, 64) @ numbers(12, 64, 40)}
    yield "product with a vector", lambda: {"": numbers(500, 300) @ numbers(300)}
    yield (
        "QR, singular values",
        lambda: {"": [*torch.linalg.qr(numbers(48, 32)), torch.linalg.svdvals(numbers(48, 32))]},
    )
    yield "cumulative sum", lambda: {"": numbers(100, 1000).cumsum(1)}
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        yield f"update by {kind.__name__}", partial(named, updated, kind)
    yield "random numbers", lambda: {"": list(drawn())}


def named(function: Callable[..., Any], *arguments: Any) -> Results:
    """Return a function's result as the only part."""
    return {"": function(*arguments)}


class Loss(nn.Module):
    """The cross entropy of fixed classes."""

    def forward(self, outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, torch.arange(len(outputs)) % outputs.shape[1], reduction="none")


def rare(numbers: Tensor) -> list[Tensor]:
    """Return functions that networks seldom have."""
    return [function(numbers) for function in (torch.tan, torch.atan, torch.asin, torch.acos, torch.log2, torch.log10)]


def norm() -> Tensor:
    """Return the norm by which gradients are clipped."""
    weights = [nn.Parameter(numbers(1000, n)) for n in (10, 100, 300)]
    for weight in weights:
        weight.grad = weight.detach().clone()
    return torch.nn.utils.clip_grad_norm_(weights, 1.0)


def updated(kind: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
    """Return weights after three updates."""
    weights = [nn.Parameter(numbers(300, 200)), nn.Parameter(numbers(7))]
    more: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(weights, lr=0.01, weight_decay=0.01, **more)
    for step in range(3):
        for weight in weights:
            weight.grad = numbers(*weight.shape, seed=step + 5)
        optimizer.step()
    return [weight.detach() for weight in weights]


def drawn() -> Iterator[Tensor]:
    """Yield random numbers of each kind that layers, initial weights and augmentation draw."""
    torch.manual_seed(0)
    yield from (torch.rand(50_000), torch.randn(50_000), torch.randn(7), torch.randperm(1000))
    yield F.dropout(numbers(50_000), 0.3)
    yield torch.bernoulli(torch.full((50_000,), 0.3))
    yield torch.empty(50_000).exponential_()
    yield torch.nn.init.trunc_normal_(torch.empty(10_000))
    yield torch._standard_gamma(torch.full((1_000,), 0.4))


def sha256(result: Tensor | list[Tensor]) -> str:
    """Return the first half of the SHA-256 of a result's bytes."""
    digest = hashlib.sha256()
    for tensor in result if isinstance(result, list) else [result]:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of an operation (1)")
    parser.add_argument("--quick", action="store_true", help="fewer operations")
    parser.add_argument("--roots", action="store_true", help="with the square root of a portable run")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="operations to leave out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    if options.roots:
        from torchrelay.device.portable import replace_roots

        replace_roots()
    for name, compute in (*layers(options.quick), *others(options.quick)):
        if name not in options.skip:
            print(f"{name}:", end=" ", flush=True)  # if it crashes, one sees which
            print(json.dumps({part: sha256(result) for part, result in compute().items()}), flush=True)


if __name__ == "__main__":
    main()
