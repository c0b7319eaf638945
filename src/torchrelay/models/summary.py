"""Step 3: the parameters, FLOPs and activation memory of a model, layer by layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """One layer at the top level of a model."""

    name: str
    kind: str  # its class
    output: str  # the shape of its last output
    parameters: int
    flops: int  # of one forward pass over the whole batch; a multiply-add counts as two
    activation_bytes: int


@dataclass(frozen=True)
class Summary:
    """The costs of a model on one batch; `str` returns them as a table."""

    rows: tuple[Row, ...]
    batch: int
    parameters: int
    trainable: int
    buffer_bytes: int
    flops: int  # of one forward pass over the batch; training costs about three times as many
    activation_bytes: int  # the outputs of all layers: about what a training step keeps for its backward pass

    def __str__(self) -> str:
        header = ("layer", "kind", "output", "parameters", "FLOPs", "activations")
        cells = [
            (row.name, row.kind, row.output, f"{row.parameters:,}", _short(row.flops), _bytes(row.activation_bytes))
            for row in self.rows
        ]
        total = ("total", "", "", f"{self.parameters:,}", _short(self.flops), _bytes(self.activation_bytes))
        table = [header, *cells, total]
        widths = [max(map(len, cells_below)) for cells_below in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        note = f"{self.trainable:,} parameters are trained; buffers {_bytes(self.buffer_bytes)}; batch of {self.batch}"
        return "\n".join([*lines, note])


def summarize(model: nn.Module, inputs: Tensor) -> Summary:
    """Count the costs of one forward pass of `inputs`. Weights, buffers, modes and random state don't change.

    Args:
        model: on any device.
        inputs: a batch, (batch, ...), on the same device.

    Returns:
        The counts. FLOPs are those of matrix products, convolutions and attention, by PyTorch's formulas; activations
        are the outputs of the modules without children, so arithmetic between modules is left out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    layers = dict(model.named_children()) or {"": model}
    shapes = dict.fromkeys(layers, "not used")
    activations = dict.fromkeys(layers, 0)
    counter = FlopCounterMode(display=False)
    with _unchanged(model, inputs.device), _measured(layers, shapes, activations), torch.no_grad(), counter:
        model(inputs)
    flops = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    root = type(model).__name__
    rows = tuple(
        Row(
            name=name or root,
            kind=type(layer).__name__,
            output=shapes[name],
            parameters=sum(value.numel() for value in layer.parameters()),
            flops=flops.get(f"{root}.{name}".removesuffix("."), 0),
            activation_bytes=activations[name],
        )
        for name, layer in layers.items()
    )
    parameters = list(model.parameters())
    return Summary(
        rows=rows,
        batch=len(inputs),
        parameters=sum(value.numel() for value in parameters),
        trainable=sum(value.numel() for value in parameters if value.requires_grad),
        buffer_bytes=sum(value.nbytes for value in model.buffers()),
        flops=counter.get_total_flops(),
        activation_bytes=sum(activations.values()),
    )


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the block in evaluation mode, then restore modes, buffers and random generators."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(value, value.clone()) for value in model.buffers()]
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for value, before in buffers:
                value.copy_(before)


@contextmanager
def _measured(layers: dict[str, nn.Module], shapes: dict[str, str], activations: dict[str, int]) -> Iterator[None]:
    """Record each layer's output shape and the bytes of the outputs of its submodules."""
    hooks = []
    for name, layer in layers.items():

        def note_shape(_module: nn.Module, _inputs: Any, outputs: Any, name: str = name) -> None:
            shapes[name] = " ".join("×".join(map(str, tensor.shape)) for tensor in _tensors(outputs))

        def add_bytes(_module: nn.Module, inputs: Any, outputs: Any, name: str = name) -> None:
            # Views of the inputs and results of in-place operations take no memory.
            held = {tensor.untyped_storage().data_ptr() for tensor in _tensors(inputs)}
            new = [tensor for tensor in _tensors(outputs) if tensor.untyped_storage().data_ptr() not in held]
            activations[name] += sum(tensor.nbytes for tensor in new)

        hooks.append(layer.register_forward_hook(note_shape))
        leaves = [module for module in layer.modules() if not list(module.children())]
        hooks += [leaf.register_forward_hook(add_bytes) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a module's inputs or outputs: a tensor, or nested tuples, lists and dicts of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _short(count: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return str(count)


def _bytes(count: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
