"""Step 4: one global batch on any number of devices: replicas, and the fixed tree that sums their gradients.

The global batch is divided over `replicas`, a number that belongs to the run and not to the machine. Each replica's
gradient is a leaf of one fixed binary tree, so the sum has the same bits however many devices compute the leaves. On
one device the replicas run one after another, which is known as gradient accumulation.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torchrelay.errors import UsageError
from torchrelay.settings import Settings

Gradients = list[Tensor | None]  # one per parameter; None: the replica didn't use the parameter


class ParallelSettings(Settings):
    """How several devices share a global batch."""

    kind: Literal["none", "dp", "ddp", "fsdp"] = "none"
    """How devices share the work. none, ddp: a process each; fsdp: each holds a shard of the model; dp: one process."""
    replicas: int | None = Field(default=None, ge=1)
    """Parts of a global batch, fixed for the run's life, shared by the devices. Unset: one per device at the start."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds that a process waits for the others in a step, except the first, before the run ends with an error."""


def count_replicas(settings: ParallelSettings, devices: int, exact: bool) -> int:
    """Return the number of replicas of a run.

    Args:
        settings: the number of replicas, if it is set.
        devices: the number of processes that share them.
        exact: whether they are summed in the fixed tree. If not, any number of devices gets as many replicas.

    Raises:
        UsageError: the run is exact and the number isn't a power of two, or the devices can't share it evenly.
    """
    replicas = settings.replicas or devices
    lower = 1 << (replicas.bit_length() - 1)
    if exact and settings.replicas is None and devices > lower:
        raise UsageError(
            f"an exact run can't be spread over {devices} devices: use {lower} or {2 * lower}, or --set run.exact=false"
        )
    if not exact and replicas % devices:
        return devices
    if exact and replicas & (replicas - 1):
        raise UsageError(
            f"parallel.replicas is {replicas}: an exact run needs a power of two such as {lower} or {2 * lower}; "
            "or --set run.exact=false"
        )
    if replicas % devices:
        raise UsageError(
            f"{devices} devices can't share a run of {replicas} replica{'s' * (replicas > 1)}: resume it with "
            f"{device_counts(replicas)}, start one with --set parallel.replicas={1 << (devices - 1).bit_length()}, or "
            "give up exactness by --set run.exact=false"
        )
    return replicas


def device_counts(replicas: int) -> str:
    """Return on how many devices a run of so many replicas can continue, such as "1, 2 or 4"."""
    *others, last = [str(count) for count in range(1, replicas + 1) if replicas % count == 0]
    return f"{', '.join(others)} or {last}" if others else last


class GradientTree:
    """Sums gradients in a fixed binary tree as they arrive, with at most log2(replicas) + 1 partial sums in memory.

    The partial sums are the digits of a binary counter: two sums of equally many leaves are added at once.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[int, Gradients]] = []  # (leaves, sum), fewer leaves towards the end

    @property
    def leaves(self) -> int:
        """The number of leaves added so far."""
        return sum(leaves for leaves, _ in self._sums)

    def add(self, gradients: Gradients) -> None:
        """Add the next leaf. Leaves may come in either direction: the bits of a + b are those of b + a."""
        leaves = 1
        while self._sums and self._sums[-1][0] == leaves:
            gradients = _add(self._sums.pop()[1], gradients)
            leaves *= 2
        self._sums.append((leaves, gradients))

    def total(self) -> Gradients:
        """Return the sum of all leaves."""
        _, total = self._sums[-1]
        for _, other in reversed(self._sums[:-1]):  # only if the number of leaves is no power of two
            total = _add(other, total)
        return total

    def total_with(self, indices: Sequence[int], gradients: Gradients) -> Gradients:
        """Return the sums of all leaves and of a last one, for some parameters; the tree isn't changed.

        Args:
            indices: of the parameters.
            gradients: of these parameters, in the last leaf.
        """
        for _, other in reversed(self._sums):
            gradients = _add([other[index] for index in indices], gradients)
        return gradients


def tree_sum(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of one process's values, in the order in which its replicas ran, as `GradientTree` adds them."""
    tree = GradientTree()
    for value in values:
        tree.add([value])
    (total,) = tree.total()
    assert total is not None  # noqa: S101 - no leaf is
    return total


def add_neighbors(nodes: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors as the tree adds them, neighbors first, in the memory of the first tensor.

    All of them are overwritten. If their number is no power of two, the last one is added when its turn comes.
    """
    while len(nodes) > 1:
        for left, right in zip(nodes[::2], nodes[1::2], strict=False):
            left += right
        nodes = nodes[::2]
    return nodes[0]


def _add(left: Gradients, right: Gradients) -> Gradients:
    """Add two lists of gradients; a missing one counts as zeros, unless it is missing on both sides."""

    def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            present = b if a is None else a
            return None if present is None else present + 0.0  # turns a negative zero into a positive one
        return a + b

    return [add(a, b) for a, b in zip(left, right, strict=True)]


class Buffers:
    """A model's buffers, such as BatchNorm's running statistics, and a copy of them from the start of a step."""

    def __init__(self, model: nn.Module) -> None:
        self.live = list(model.buffers())
        self._copies: list[Tensor] = []

    def keep(self) -> None:
        """Copy the buffers."""
        if not self._copies:  # not earlier: by now they are on their device
            self._copies = [torch.empty_like(buffer) for buffer in self.live]
        if self.live:
            torch._foreach_copy_(self._copies, self.live)

    def restore(self) -> None:
        """Set the buffers to what they were when `keep` was called."""
        if self.live:
            torch._foreach_copy_(self.live, self._copies)


def take_gradients(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Return the parameters' gradients and set `.grad` to None."""
    gradients: Gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def give_gradients(parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    """Set each parameter's gradient."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
