"""Step 4: `parallel.kind = "ddp"` in an exact run: gradients of all processes are summed in the one fixed tree.

As in DistributedDataParallel, gradients travel in buckets, each as soon as the backward pass has completed it, and the
buckets leave in the same order in every process. `all_reduce` sums them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrelay.distributed.all_reduce import Background, all_reduce, host_levels
from torchrelay.distributed.process_group import DistributedGroup
from torchrelay.distributed.replicas import GradientTree, tree_sum
from torchrelay.distributed.strategy import Strategy

# Bytes, as in DistributedDataParallel. The first bucket is smaller, so that it leaves early.
_BUCKET, _FIRST_BUCKET = 25 * 2**20, 2**20


@dataclass
class Bucket:
    """Parameters whose gradients are sent together, and the memory that they are sent from."""

    indices: list[int]  # among the strategy's parameters
    flat: Tensor  # (elements,) a multiple of the number of processes
    views: list[Tensor]  # each parameter's part of `flat`, with the strides of its gradient
    tail: Tensor  # the rest of `flat`


class ExactDDP(Strategy):
    """Sums the gradients of all processes' replicas in the fixed tree.

    Args:
        model: the model, already on its device.
        group: the process group.
        forward: what computes the outputs, such as the compiled model; the model itself if not given.
        local_size: the number of processes on this host; the launcher's if not given.
    """

    group: DistributedGroup

    def __init__(
        self,
        model: nn.Module,
        group: DistributedGroup,
        *,
        forward: Callable[..., Any] | None = None,
        local_size: int | None = None,
    ) -> None:
        super().__init__(model, group, exact=True, forward=forward)
        self._levels = host_levels(group, local_size or group.local_size)
        self._background = Background(group.device)
        divided = divide(self.parameters)
        tails = [0] * (len(divided) - 1) + [1 + len(self.parameters)]  # the loss, and which parameters were used
        self._buckets = [self._bucket(indices, tail) for indices, tail in zip(divided, tails, strict=True)]
        self._scratch: dict[torch.dtype, Tensor] = {}  # shared by all buckets, which are summed one after another
        for flat in sorted((bucket.flat for bucket in self._buckets), key=len):
            self._scratch[flat.dtype] = flat.new_empty(2 * len(flat))
        self._synced: GradientTree | None = None  # from the last replica's forward pass to `reduce`
        self._sums: list[Callable[[], Tensor]] = []  # wait for the buckets that have left
        self._used = [False] * len(self.parameters)
        self._sent_buffers: Callable[[], Tensor] | None = None
        for indices in divided:  # as a rule, the backward pass reaches a bucket's last parameter last
            hook = self.parameters[indices[-1]].register_post_accumulate_grad_hook
            hook(self._send_complete_buckets)  # type: ignore[no-untyped-call]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the model's outputs; called once for a replica, after which its buffers leave."""
        outputs = super().__call__(*inputs, **named)
        if self._synced is not None:
            self._send_buffers()
        return outputs

    @contextmanager
    def sync(self, tree: GradientTree) -> Iterator[None]:
        """Enclose the last replica's passes, whose gradients are sent as soon as they are complete."""
        self._synced, self._sums, self._sent_buffers = tree, [], None
        for parameter in self.parameters:
            parameter.grad = None  # what it holds from now on is the last replica's
        try:
            yield
        except BaseException:
            self._synced = None
            raise

    def reduce(self, losses: Sequence[Tensor]) -> Tensor:
        """Wait for the sums, after which gradients and buffers are those of one process; return the sum of losses."""
        loss = tree_sum(losses)
        self._send_buffers()
        while len(self._sums) < len(self._buckets) - 1:
            self._send(self._buckets[len(self._sums)])
        last = self._buckets[-1]
        self._fill(last)
        tail = torch.tensor([0.0, *map(float, self._used)], dtype=loss.dtype, device=loss.device)
        tail[0] = loss
        if same_dtype := tail.dtype == last.flat.dtype:
            last.tail[: len(tail)] = tail
        else:
            tail = nn.functional.pad(tail, (0, -len(tail) % self.group.size))
            self._sums.append(self._background.run(lambda: all_reduce(tail, self._levels, timeout=self.group.timeout)))
        self._start_all_reduce(last.flat)
        self._synced = None
        with self.group.explain_failure("added gradients"):
            for wait in self._sums:
                wait()
            self._take_buffers()
        total = last.tail.clone() if same_dtype else tail  # the bucket's memory is used again
        self._set_gradients((total[1:] > 0).tolist())
        return total[0]

    def _send_complete_buckets(self, _parameter: Tensor) -> None:
        """Send the buckets that are complete, in their order, the same in every process."""
        while self._synced is not None and len(self._sums) < len(self._buckets) - 1:
            bucket = self._buckets[len(self._sums)]
            if any(self.parameters[index].grad is None for index in bucket.indices):
                return
            self._send(bucket)

    def _send(self, bucket: Bucket) -> None:
        self._fill(bucket)
        self._start_all_reduce(bucket.flat)

    def _start_all_reduce(self, flat: Tensor) -> None:
        scratch, timeout = self._scratch[flat.dtype], self.group.timeout
        self._sums.append(self._background.run(lambda: all_reduce(flat, self._levels, scratch, timeout)))

    def _fill(self, bucket: Bucket) -> None:
        """Move this process's sum of a bucket's gradients into its memory."""
        assert self._synced is not None  # noqa: S101 - `sync` came before
        last = [self.parameters[index].grad for index in bucket.indices]
        gradients = self._synced.total_with(bucket.indices, last)
        used: list[tuple[Tensor, Tensor]] = []
        for index, view, gradient in zip(bucket.indices, bucket.views, gradients, strict=True):
            self.parameters[index].grad = None
            self._used[index] = gradient is not None
            if gradient is None:
                view.zero_()
            else:
                used.append((view, gradient))
        if used:
            views, parts = zip(*used, strict=True)
            torch._foreach_copy_(views, parts)

    def _set_gradients(self, used: Sequence[bool]) -> None:
        """Set the gradients; None for parameters that no process used."""
        for bucket in self._buckets:
            for index, view in zip(bucket.indices, bucket.views, strict=True):
                self.parameters[index].grad = view if used[index] else None

    def _bucket(self, indices: list[int], tail: int) -> Bucket:
        """Return a bucket with memory that is used again in each step.

        Args:
            indices: of its parameters.
            tail: the number of further elements.
        """
        parameters = [self.parameters[index] for index in indices]
        elements = sum(parameter.numel() for parameter in parameters)
        flat = parameters[0].new_zeros(elements + tail + -(elements + tail) % self.group.size)
        views, start = [], 0
        for parameter in parameters:
            # The strides that the backward pass gives gradients: a norm's bits depend on them.
            strides = torch.empty_like(parameter, device="meta").stride()
            views.append(flat.as_strided(parameter.shape, strides, start))
            start += parameter.numel()
        return Bucket(indices, flat, views, flat[elements:])

    def _send_buffers(self) -> None:
        """Start to broadcast rank 0's buffers: they are final once the last replica's forward pass is done."""
        if not self.buffers.live or self._sent_buffers is not None:
            return
        content = torch.cat([buffer.detach().reshape(-1).view(torch.uint8) for buffer in self.buffers.live])

        def broadcast() -> Tensor:
            dist.broadcast(content, 0, group=self.group.gradient_group)
            return content

        self._sent_buffers = self._background.run(broadcast)

    def _take_buffers(self) -> None:
        """Copy rank 0's buffers; not earlier, since the backward pass may read this process's own."""
        if self._sent_buffers is None or self.group.main:
            return
        start, content = 0, self._sent_buffers()
        for buffer in self.buffers.live:
            part = content[start : start + buffer.nbytes]
            buffer.detach().copy_(part.clone().view(buffer.dtype).view(buffer.shape))
            start += buffer.nbytes


def divide(parameters: Sequence[nn.Parameter]) -> list[list[int]]:
    """Divide parameters into buckets of one dtype, in the order in which the backward pass reaches them.

    Returns:
        The parameters' indices by bucket, the last parameters first.
    """
    buckets: list[list[int]] = []
    open_buckets: dict[torch.dtype, tuple[list[int], int]] = {}  # and their bytes
    for index in reversed(range(len(parameters))):
        parameter = parameters[index]
        if parameter.dtype not in open_buckets:
            buckets.append([])
            open_buckets[parameter.dtype] = buckets[-1], 0
        bucket, size = open_buckets[parameter.dtype]
        bucket.append(index)
        open_buckets[parameter.dtype] = bucket, size + parameter.nbytes
        if size + parameter.nbytes >= (_FIRST_BUCKET if bucket is buckets[0] else _BUCKET):
            del open_buckets[parameter.dtype]
    return buckets
