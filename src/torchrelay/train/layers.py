"""Step 7: each layer of a model alone: against float64, twice, on one thread and in the other memory format.

The inputs are those that the layer gets in a training batch; the gradient of its outputs is drawn at random.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrelay import rng
from torchrelay.data.batch import Batch
from torchrelay.device.device import Device
from torchrelay.tasks.task import loss_and_outputs
from torchrelay.train.record import log
from torchrelay.train.self_check import FILLINGS, fill_free_memory, unchanged
from torchrelay.train.step import TrainStep

# The largest errors that rounding explains, as a part of the norm of a tensor.
_TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}
_MOST = 16 * 2**20  # bytes of free memory to fill before a layer


@dataclass(frozen=True)
class LayerCheck:
    """What was found of a layer; None: it doesn't apply.

    Attributes:
        name: within the model.
        kind: its class.
        input_shape: of its first input.
        forward: error of the outputs against float64, as a part of their norm.
        backward: largest error of the gradients with respect to inputs and parameters, as a part of each one's norm.
        twice: whether a second pass, with other values in free memory, has the same bits.
        one_thread: whether a pass on one thread has the same bits.
        other_format: largest error in the other memory format, of images.
        tolerance: the largest error that rounding explains.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    forward: float | None
    backward: float | None
    twice: bool
    one_thread: bool | None
    other_format: float | None
    tolerance: float

    @property
    def is_good(self) -> bool:
        """Whether an exact run can stand on the layer."""
        errors = (self.forward, self.backward, self.other_format)
        return self.twice and all(error is None or error <= self.tolerance for error in errors)


def check_layers(train_step: TrainStep, batch: Batch) -> Iterator[LayerCheck]:
    """Check the layers of a model, one after another, on a batch.

    Args:
        train_step: whose model computes the batch; nothing of it changes.
        batch: this process's part of a global batch, of which the first replica is computed.
    """
    device = train_step.device
    first = next(replica for replica in batch.replicas() if replica.samples)
    for name, layer, inputs in _layers_and_inputs(train_step, first):
        yield check_layer(name, layer, inputs, device)


def compile_error(train_step: TrainStep, batch: Batch) -> float:
    """Return by which part of its norm the gradient of the compiled model differs from that of the eager one."""
    model, first = train_step.strategy.model, next(replica for replica in batch.replicas() if replica.samples)
    compiled = torch.compile(model, dynamic=False)
    found = []
    for each in (model, compiled):
        with unchanged(model, train_step.task), rng.kept(train_step.device.device), log.muted():
            rng.reseed(0, train_step.device.device)
            with train_step.device.autocast():
                outputs = train_step.task.forward(each, first)
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            loss = _sum_of(_tensors(outputs))
            found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    pairs = zip(*found, strict=True)
    return max((_error(b.double(), a.double()) for a, b in pairs if a is not None and b is not None), default=0.0)


def _layers_and_inputs(train_step: TrainStep, batch: Batch) -> list[tuple[str, nn.Module, tuple[Any, ...]]]:
    """Return what computes with parameters of its own, or has no parts, with the inputs of its first call."""
    model, found = train_step.strategy.model, dict[str, tuple[str, nn.Module, tuple[Any, ...]]]()

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if name not in found and inputs and all(isinstance(each, Tensor) for each in inputs):
                found[name] = name, layer, tuple(each.detach().clone() for each in inputs)

        return hook

    layers = [(name, each) for name, each in model.named_modules() if each._parameters or not list(each.children())]
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers]
    device = train_step.device
    try:
        with unchanged(model, train_step.task), rng.kept(device.device), log.muted(), torch.no_grad():
            rng.reseed(0, device.device)
            with device.autocast():
                loss_and_outputs(train_step.task, train_step.strategy.module, batch, train_step.updates[0].name)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def check_layer(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], device: Device) -> LayerCheck:
    """Check a layer on inputs that are on the device."""
    first = _passes(layer, inputs, device, FILLINGS[0])
    second = _passes(layer, inputs, device, FILLINGS[1])
    with _one_thread():
        alone = _passes(layer, inputs, device, FILLINGS[0])
    is_random = not _same(first, _passes(layer, inputs, device, FILLINGS[0], seed=1)) and _same(first, second)
    exact = None if is_random else _passes(copy.deepcopy(layer).double(), _mapped(inputs, _as_double), None, None)
    other = None
    if exact is not None and inputs[0].ndim == 4:
        other = _errors(_passes(layer, _mapped(inputs, _other_format), device, FILLINGS[0]), exact)
    errors = _errors(first, exact) if exact is not None else [None, None]
    is_tf32 = device.settings.precision == "float32" and device.settings.tf32
    return LayerCheck(
        name or "(model)",
        type(layer).__name__,
        tuple(inputs[0].shape),
        errors[0],
        errors[1],
        _same(first, second),
        _same(first, alone) if device.device.type == "cpu" else None,
        None if other is None else max(error for error in other if error is not None),
        _TOLERANCE["tf32" if is_tf32 else device.settings.precision],
    )


# The outputs, and the gradients of inputs and parameters, in double precision.
Found = tuple[list[Tensor], list[Tensor]]


def _passes(
    layer: nn.Module, inputs: tuple[Tensor, ...], device: Device | None, filling: int | None, seed: int = 0
) -> Found:
    """Go forward and backward through a layer; without a device, in the precision of the inputs."""
    inputs = tuple(each.detach().requires_grad_(each.is_floating_point()) for each in inputs)
    place = inputs[0].device
    with unchanged(layer), rng.kept(place):
        rng.reseed(seed, place)
        if filling is not None:
            fill_free_memory(filling, min(_MOST, 4 * sum(each.nbytes for each in inputs)), place)
        with nullcontext() if device is None else device.autocast():
            outputs = _tensors(layer(*(each.clone() for each in inputs)))  # some layers work in place
        wanted = [each for each in (*inputs, *layer.parameters()) if each.requires_grad]
        if not wanted or not any(each.requires_grad for each in outputs):
            return [each.detach().double() for each in outputs], []
        gradients = torch.autograd.grad(_sum_of(outputs), wanted, allow_unused=True)
    return [each.detach().double() for each in outputs], [each.double() for each in gradients if each is not None]


def _sum_of(outputs: Sequence[Tensor]) -> Tensor:
    """Return a sum of the outputs' elements with weights drawn at random, the same each time."""
    generator, terms = torch.Generator().manual_seed(0), []
    for each in outputs:
        if each.requires_grad:
            weights = torch.randn(each.shape, generator=generator, dtype=torch.float32)
            terms.append((each * weights.to(each.device, each.dtype)).double().sum())
    return torch.stack(terms).sum()


def _errors(found: Found, exact: Found) -> list[float | None]:
    pairs = (list(zip(mine, true, strict=True)) for mine, true in zip(found, exact, strict=True))
    return [max((_error(mine, true) for mine, true in each), default=None) for each in pairs]


def _error(found: Tensor, exact: Tensor) -> float:
    norm = float(exact.norm())
    error = float((found - exact).norm())
    return error if not norm else error / norm if error == error else float("inf")


def _same(first: Found, second: Found) -> bool:
    pairs = zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True)
    return all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)


def _tensors(outputs: Any) -> list[Tensor]:
    values = outputs.values() if isinstance(outputs, dict) else outputs
    values = [values] if isinstance(values, Tensor) else values
    return [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]


def _mapped(inputs: tuple[Tensor, ...], function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    return tuple(map(function, inputs))


def _as_double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _other_format(images: Tensor) -> Tensor:
    if images.ndim != 4:
        return images
    is_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return images.contiguous(memory_format=torch.contiguous_format if is_last else torch.channels_last)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
