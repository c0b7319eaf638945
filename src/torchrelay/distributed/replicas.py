"""Step 4: one global batch on any machine: replicas, and the fixed tree that adds their gradients.

The global batch is divided over `replicas`, a number of the run and not of the machine. Each replica's gradient is a
leaf of one fixed binary tree, so the sum has the same bits however many devices compute the leaves. On one device the
replicas run one after another, which is what others call gradient accumulation.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torchrelay.errors import UsageError
from torchrelay.settings import Settings

Gradients = list[Tensor | None]  # one a parameter; None: the parameter was not used


class ParallelSettings(Settings):
    """How a global batch is divided."""

    kind: Literal["none", "dp", "ddp", "fsdp"] = "none"
    """How devices share the work. none, ddp: a process each; fsdp: each holds a part of the model; dp: one process."""
    replicas: int | None = Field(default=None, ge=1)
    """Parts of a global batch, for the run's whole life; devices share them out. Unset: one a device at the start."""
    timeout: float = Field(default=300.0, gt=0)
    """Seconds that a process waits for the others in a step, the first one aside, before the run ends with an error."""


def check_replicas(replicas: int, devices: int, exact: bool) -> None:
    """Refuse numbers that don't go together.

    Args:
        replicas: parts of a global batch.
        devices: processes that share them.
        exact: whether they are added in the fixed tree.

    Raises:
        UsageError: the run is exact and `replicas` isn't a power of two, or isn't a multiple of the devices.
    """
    if exact and replicas & (replicas - 1):
        lower = 1 << (replicas.bit_length() - 1)
        raise UsageError(
            f"parallel.replicas is {replicas}: an exact run needs a power of two such as {lower} or {2 * lower}; "
            "or --set run.exact=false"
        )
    if replicas % devices:
        able = [count for count in range(1, replicas + 1) if replicas % count == 0]
        *others, last = map(str, able)
        counts = f"{', '.join(others)} or {last}" if others else last
        raise UsageError(
            f"{devices} devices can't share a run of {replicas} replica{'s' * (replicas > 1)}: go on with {counts}, "
            f"start one with --set parallel.replicas={1 << (devices - 1).bit_length()}, or give exactness up by "
            "--set run.exact=false"
        )


def replicas_of(settings: ParallelSettings, devices: int, exact: bool) -> int:
    """Return how many replicas a run has on so many devices.

    Raises:
        UsageError: the devices can't share them exactly.
    """
    replicas = settings.replicas or devices
    if not exact and replicas % devices:
        return devices
    check_replicas(replicas, devices, exact)
    return replicas


class GradientTree:
    """Adds gradients in a fixed binary tree, as they come, with log2(replicas) + 1 partial sums in memory.

    The partial sums are the digits of a binary counter: two sums of equally many leaves are added at once.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[int, Gradients]] = []  # (leaves, sum), fewer leaves towards the end

    def add(self, gradients: Gradients) -> None:
        """Add the next leaf. The leaves may come in either direction: a sum of two has the same bits both ways."""
        leaves = 1
        while self._sums and self._sums[-1][0] == leaves:
            gradients = _sum(self._sums.pop()[1], gradients)
            leaves *= 2
        self._sums.append((leaves, gradients))

    def total(self) -> Gradients:
        """Return the sum of all leaves."""
        _, total = self._sums[-1]
        for _, other in reversed(self._sums[:-1]):  # only where the leaves are no power of two
            total = _sum(other, total)
        return total

    def closing(self, places: Sequence[int], gradients: Gradients) -> Gradients:
        """Return the sum of all leaves at some places, with the last leaf's gradients there; the tree isn't changed."""
        for _, other in reversed(self._sums):
            gradients = _sum([other[place] for place in places], gradients)
        return gradients


def add_neighbours(nodes: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors, neighbours first, as the tree adds them, in the memory of the first one.

    All of them are overwritten. Where they are no power of two, the last one waits for its turn.
    """
    while len(nodes) > 1:
        for left, right in zip(nodes[::2], nodes[1::2], strict=False):
            left += right
        nodes = nodes[::2]
    return nodes[0]


def _sum(left: Gradients, right: Gradients) -> Gradients:
    """Add two lists of gradients; a missing one counts as exact zeros, unless it is missing on both sides."""

    def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            there = b if a is None else a
            return None if there is None else there + 0.0  # which makes a negative zero a positive one
        return a + b

    return [add(a, b) for a, b in zip(left, right, strict=True)]


class Buffers:
    """The buffers at the start of a step, such as BatchNorm's running statistics, from which every replica starts."""

    def __init__(self, model: nn.Module) -> None:
        self.live = list(model.buffers())
        self._start = [torch.empty_like(buffer) for buffer in self.live]

    def keep(self) -> None:
        """Remember the buffers as they are."""
        if self.live:
            torch._foreach_copy_(self._start, self.live)

    def restore(self) -> None:
        """Set the buffers back to what was kept."""
        if self.live:
            torch._foreach_copy_(self.live, self._start)


def take_gradients(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Return the gradients and leave none behind."""
    gradients: Gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def give_gradients(parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    """Set each parameter's gradient."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
