"""Step 7: the self-check: are the gradients of one batch the same twice, before a run stands on them?

Deterministic mode refuses the kernels that are known to vary. It can't know of a kernel that reads memory which it
didn't write; PyTorch 2.15 is reported to have one (docs/evidence/kernels.md). So a run computes the gradients of its
first batch twice, with other values in the allocator's free memory each time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchrelay import rng
from torchrelay.data.batch import Batch
from torchrelay.device.device import Device, has_only_avx2
from torchrelay.device.private import forget_removed_hooks
from torchrelay.errors import RelayError
from torchrelay.models.convolution import Conv2d, reads_gaps
from torchrelay.optim.update import Update, alone
from torchrelay.tasks.task import Task, held_modules, loss_and_outputs, total
from torchrelay.train.record import log
from torchrelay.train.step import TrainStep

# What free memory is filled with before each pass: bytes that are large as numbers of any type, and then no numbers.
FILLINGS = (0x7E, 0xFF)
_MOST = 64 * 2**20  # bytes to fill, which takes some 20 ms
_GROSS = 0.1  # of a gradient's largest element, by which no two orders of the same sums differ
# Nodes that only hand a parameter on; the kernel is behind them.
_HANDS_ON = ("ToCopy", "T", "View", "Transpose", "Permute", "Reshape", "Expand", "UnsafeView", "Clone", "Slice")


def self_check(train_step: TrainStep, batch: Batch, step: int, *, exact: bool = True) -> str:
    """Compute the gradients of a batch's first replica twice; return what is to be noted in the run's log.

    Weights, gradients, buffers, attributes of the model and the task, and all random numbers stay as they are.

    Args:
        train_step: whose task and model compute them.
        batch: this process's part of the first global batch.
        step: its number, counted from 0.
        exact: whether their bits must be the same; otherwise, they may differ by rounding.

    Raises:
        RelayError: they differ, or one isn't finite though the loss is; the text names the layer and the kernel.
    """
    strategy = train_step.strategy
    if strategy.collective_forward or (strategy.group.size > 1 and not exact):
        return "self-check: left out, as all processes would have to take part"
    first = next((replica for replica in batch.replicas() if replica.samples), None)
    if first is None:
        return "self-check: left out, as this process has no sample"
    _refuse_overrun(train_step)
    began = time.perf_counter()
    gaps: list[str] = []
    for update in train_step.updates:
        with alone(update, train_step.updates) if len(train_step.updates) > 1 else nullcontext():
            comparison = Comparison(exact)
            try:
                with _noting_gaps(train_step, gaps):
                    losses = [_pass(train_step, update, first, step, filling, comparison.take) for filling in FILLINGS]
            except Exception as error:  # noqa: BLE001 - the first step meets it too, and names its sample
                return f"self-check: left out, after {type(error).__name__}: {error}"
        if gaps:
            raise RelayError(
                f"{gaps[0]}, whose gradient oneDNN computes from memory that it didn't write "
                "(docs/evidence/kernels.md): set device.precision=float32, use torchrelay.models.convolution.Conv2d, "
                "or take larger images"
            )
        if all(loss.isfinite() for loss, _ in losses):  # otherwise it's a loss spike, which the step sees
            _judge(train_step, comparison, *losses[0])
    took = 1000 * (time.perf_counter() - began)
    return f"self-check: the first batch's gradients are the same twice ({took:.0f} ms)"


class Comparison:
    """Compares the gradients of two passes, each as soon as it is known: one set is held, and shrinks.

    Args:
        exact: whether their bits must be the same.
    """

    def __init__(self, exact: bool) -> None:
        self.other = ""  # the first parameter whose gradient is other the second time
        self.not_finite = ""  # the first one whose gradient isn't finite
        self._exact = exact
        self._first: dict[str, Tensor] = {}

    def take(self, name: str, gradient: Tensor) -> None:
        """Keep a gradient of the first pass, or compare one of the second.

        Gradients come from the last layer to the first, so the first one that is wrong is where it begins.
        """
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        before = self._first.pop(name, None)
        if before is None:
            self._first[name] = gradient
            self.not_finite = self.not_finite or name * (not gradient.isfinite().all())
        elif not self.other and not self._are_same(before, gradient):
            self.other = name

    def _are_same(self, first: Tensor, second: Tensor) -> bool:
        if torch.equal(first, second):
            return True
        first, second = first.nan_to_num(), second.nan_to_num()
        if self._exact:
            return torch.equal(first, second)
        return bool((first - second).abs().max() <= _GROSS * torch.maximum(first.abs(), second.abs()).max())


def _pass(
    train_step: TrainStep, update: Update, batch: Batch, step: int, filling: int, take: Callable[[str, Tensor], None]
) -> tuple[Tensor, dict[str, str]]:
    """Compute a batch's gradients and hand each on by name; return the loss, and each parameter's kernel."""
    model, task, device = train_step.strategy.model, train_step.task, train_step.device
    named = {name: each for name, each in model.named_parameters() if each.requires_grad}
    with unchanged(model, task), rng.kept(device.device), log.muted():
        rng.reseed(rng.step_seed(train_step.seed, update.stream, step, batch.first_replica), device.device)
        fill_free_memory(filling, min(_MOST, 4 * sum(each.nbytes for each in named.values())), device.device)
        with device.autocast():
            loss = total(loss_and_outputs(task, train_step.model, batch, update.name)[0], task)
        kernels = kernels_of(loss, named)
        hooks = [each.register_hook(partial(_hand_on, take, name)) for name, each in named.items()]  # type: ignore[no-untyped-call]
        try:
            torch.autograd.grad(loss / batch.samples, list(named.values()), allow_unused=True)
        finally:
            for hook, parameter in zip(hooks, named.values(), strict=True):
                hook.remove()
                forget_removed_hooks(parameter)
    return loss.detach(), kernels


def _hand_on(take: Callable[[str, Tensor], None], name: str, gradient: Tensor) -> Tensor:
    """Hand a gradient on, and return one in its place that takes no memory."""
    take(name, gradient)
    return gradient.new_zeros(()).expand(gradient.shape)


def _judge(train_step: TrainStep, comparison: Comparison, loss: Tensor, kernels: dict[str, str]) -> None:
    here = f"{train_step.device.describe()}; torch {torch.__version__}"
    name = comparison.other or comparison.not_finite
    where = f"the gradient of {name} (by {kernels.get(name, 'unknown')}; {here})"
    if comparison.other:
        raise RelayError(f"{where} isn't the same twice for the same batch: {_remedy(train_step)}")
    if comparison.not_finite and not (train_step.watch_norm and train_step.detector.norms):
        raise RelayError(
            f"{where} isn't finite in the first batch, though the loss is {loss.item():.4g}: look for a root of 0 or a "
            f"division by 0 after that layer; otherwise {_remedy(train_step)}"
        )


@contextmanager
def _noting_gaps(train_step: TrainStep, found: list[str]) -> Iterator[None]:
    """Note layers that read memory which isn't written, whatever it holds: what they add may be 0 in a first batch.

    A last BatchNorm that begins with 0 hides it, as timm's residual blocks have. A compiled model isn't looked into.
    """
    device, hooks = train_step.device, []
    settings = device.settings
    if device.device.type == "cpu" and settings.precision == "bf16" and not settings.compile and not has_only_avx2():

        def note(layer: nn.Module, inputs: tuple[Any, ...], outputs: Any, *, name: str) -> None:
            maps = outputs if isinstance(layer, nn.ConvTranspose2d) else inputs[0]
            if reads_gaps(layer, maps.shape[-1]):
                found.append(f"{name} is {layer}, on maps that are narrower than its stride")

        # Other layers can't be affected, with maps of any width.
        layers = [(name, each) for name, each in train_step.strategy.model.named_modules() if reads_gaps(each, 0)]
        for name, each in layers:
            if not isinstance(each, Conv2d) and each.weight.requires_grad:
                hooks.append(each.register_forward_hook(partial(note, name=name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_overrun(train_step: TrainStep) -> None:
    found = overrun_layer(train_step.strategy.model, train_step.device)
    if found is not None:
        raise RelayError(
            f"{found}, whose gradient writes past its memory on a processor without AVX-512 (oneDNN issue 6035): set "
            "device.channels_last=false, or give it 8 channels or more"
        )


def overrun_layer(model: nn.Module, device: Device) -> str | None:
    """Return a convolution whose weight gradient corrupts memory: oneDNN issue 6035, seen with torch 2.15 (AVX2)."""
    is_affected = device.device.type == "cpu" and device.settings.channels_last and has_only_avx2()
    is_affected = is_affected and device.settings.precision == "float32"
    for name, layer in model.named_modules() if is_affected else ():
        is_strided = isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1} and set(layer.stride) != {1}
        if is_strided and layer.groups == 1 and 2 < layer.in_channels < 8:
            return f"{name} is {layer}"
    return None


def _remedy(train_step: TrainStep) -> str:
    reduced = train_step.device.settings.precision != "float32"
    return (
        f"{'set device.precision=float32, or ' * reduced}replace the layer or the version of torch, or what draws "
        "from a random generator of its own (torchrelay doctor --deep RECIPE tries each layer alone); run.exact=false "
        "trains all the same"
    )


def fill_free_memory(byte: int, size: int, device: torch.device) -> None:
    """Leave a value in so many bytes of the memory that the allocator will hand out next, in blocks of all sizes.

    Nothing of it is sure: it depends on the allocator's own order. On the CPU it needs `keep_freed_memory`.
    """
    sizes = [2**power for power in range(8, max(size, 256).bit_length())]
    share = size // len(sizes)
    counts = {each: min(max(share // each, 1), 64) for each in sizes}
    blocks = [torch.full((n,), byte, dtype=torch.uint8, device=device) for n in sizes for _ in range(counts[n])]
    blocks.clear()


@contextmanager
def unchanged(model: nn.Module, task: Task | None = None) -> Iterator[None]:
    """Leave a model, a task and what that holds as they were: weights, buffers and attributes.

    Some models write to their weights in a forward pass, to normalize them.
    """
    held = [] if task is None else held_modules(task)
    modules = [part for each in (model, *held) for part in each.modules()]
    places: list[dict[str, Any]] = [*map(vars, modules), *(each._buffers for each in modules)]
    places += [] if task is None else [vars(task)]
    before = [(place, dict(place)) for place in places]
    tensors = [value for _, values in before for value in values.values() if isinstance(value, Tensor)]
    tensors += [parameter for each in modules for parameter in each._parameters.values() if parameter is not None]
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for place, values in before:
            place.clear()
            place.update(values)
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)


def kernels_of(loss: Tensor, named: dict[str, nn.Parameter]) -> dict[str, str]:
    """Return the name of the operation that uses each parameter, from the graph of a loss: its last one, if several."""
    names = {id(parameter): name for name, parameter in named.items()}
    kernels, seen, nodes = dict[str, str](), set[Any](), [(loss.grad_fn, "")]
    while nodes:
        node, kernel = nodes.pop()
        if node is None or (node, kernel) in seen:
            continue
        seen.add((node, kernel))
        parameter = names.get(id(getattr(node, "variable", None)))
        if parameter is not None:
            kernels.setdefault(parameter, kernel)
        own = node.name().split("Backward")[0].rpartition("::")[2]
        nodes += [(each, kernel if own in _HANDS_ON else own) for each, _ in node.next_functions]
    return kernels
