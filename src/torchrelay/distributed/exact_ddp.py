"""Step 4: gradients of several processes, added in the one fixed tree while the backward pass still runs.

Each process adds its own replicas' gradients, which gives a node of the tree. The nodes are added by sending each
process its chunk of all of them (all_to_all), adding the chunks pairwise, and handing the sums round (all_gather): as
many bytes as a ring all-reduce moves, and the same bits however many processes share the replicas. Where there are
several hosts, this is done inside each host first, and then between hosts with what a host has added: the same tree.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrelay.distributed.background import Beside
from torchrelay.distributed.process_group import DistributedGroup
from torchrelay.distributed.replicas import GradientTree, add_neighbours
from torchrelay.distributed.single import Strategy

_BUCKET, _FIRST_BUCKET = 25 * 2**20, 2**20  # bytes, as DistributedDataParallel has them: the first one leaves early

_PATIENCE = timedelta(minutes=10)

Levels = list[tuple[Any, int]]  # groups of processes and their sizes, from inside a host outwards


@dataclass
class Bucket:
    """Parameters whose gradients travel together, and the memory in which they do."""

    places: list[int]  # among the model's
    flat: Tensor  # (elements,) a multiple of the number of processes
    views: list[Tensor]  # of each parameter's part, laid out as its gradient
    tail: Tensor  # what is behind them


class ExactDDP(Strategy):
    """Adds the gradients of all processes' replicas.

    Args:
        model: whose gradients are added.
        group: the processes.
        forward: the model, or the same compiled.
        on_host: how many processes a host has; unset: what the launcher says.
    """

    def __init__(
        self,
        model: nn.Module,
        group: DistributedGroup,
        *,
        forward: Callable[[Any], Any] | None = None,
        on_host: int | None = None,
    ) -> None:
        super().__init__(model, group, exact=True, forward=forward)
        self._several = group
        self._levels = levels(group, on_host or group.local_size)
        self._beside = Beside(group.device)
        divided = divide(self.parameters)
        tails = [0] * (len(divided) - 1) + [1 + len(self.parameters)]  # the loss, and which parameters are used
        self._buckets = [self._bucket(places, tail) for places, tail in zip(divided, tails, strict=True)]
        self._scratch: dict[torch.dtype, Tensor] = {}  # one for all buckets, which travel one after another
        for flat in sorted((bucket.flat for bucket in self._buckets), key=len):
            self._scratch[flat.dtype] = flat.new_empty(2 * len(flat))
        self._tree: GradientTree | None = None  # while the last replica's gradients come
        self._sums: list[Callable[[], Tensor]] = []  # of the buckets that have left
        self._used = [False] * len(self.parameters)
        self._shared_buffers: Callable[[], Tensor] | None = None
        for places in divided:  # the backward pass comes to a bucket's last place last, as a rule
            self.parameters[places[-1]].register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def __call__(self, inputs: Any) -> Any:
        """Return the model's outputs."""
        outputs = super().__call__(inputs)
        if self._tree is not None:
            self._send_buffers()
        return outputs

    @contextmanager
    def sync(self, tree: GradientTree) -> Iterator[None]:
        """A context for the last replica's passes, whose gradients leave as soon as they are there; then `reduce`."""
        self._tree, self._sums, self._shared_buffers = tree, [], None
        for parameter in self.parameters:
            parameter.grad = None  # what is there from now on is the last replica's
        yield

    def reduce(self, loss: Tensor) -> Tensor:
        """Wait for the sums, after which gradients and buffers are those of one process; return the loss's sum."""
        self._send_buffers()
        while len(self._sums) < len(self._buckets) - 1:
            self._start(self._buckets[len(self._sums)])
        last = self._buckets[-1]
        self._take(last)
        tail = torch.tensor([0.0, *map(float, self._used)], dtype=loss.dtype, device=loss.device)
        tail[0] = loss
        if alike := tail.dtype == last.flat.dtype:  # then it travels along
            last.tail[: len(tail)] = tail
        else:
            tail = nn.functional.pad(tail, (0, -len(tail) % self.group.size))
            self._sums.append(self._beside.run(lambda: add(tail, self._levels, patience=self._several.patience)))
        self._leave(last.flat)
        self._tree = None
        with self._several.named("added gradients"):
            for wait in self._sums:
                wait()
            self._take_buffers()
        told = last.tail.clone() if alike else tail  # the bucket's memory is used again
        self._give((told[1:] > 0).tolist())
        return told[0]

    def _arrived(self, _parameter: Tensor) -> None:
        """Send what is complete; in the one order of the buckets, lest processes wait for different ones."""
        while self._tree is not None and len(self._sums) < len(self._buckets) - 1:
            bucket = self._buckets[len(self._sums)]
            if any(self.parameters[place].grad is None for place in bucket.places):
                return
            self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        """Begin to add a bucket's gradients over the processes."""
        self._take(bucket)
        self._leave(bucket.flat)

    def _leave(self, flat: Tensor) -> None:
        """Begin to add a vector over the processes."""
        scratch, patience = self._scratch[flat.dtype], self._several.patience
        self._sums.append(self._beside.run(lambda: add(flat, self._levels, scratch, patience)))

    def _take(self, bucket: Bucket) -> None:
        """Move this process's sum of a bucket's gradients to where it travels."""
        assert self._tree is not None  # noqa: S101 - `sync` came before
        gradients = self._tree.closing(bucket.places, [self.parameters[place].grad for place in bucket.places])
        there: list[tuple[Tensor, Tensor]] = []
        for place, view, gradient in zip(bucket.places, bucket.views, gradients, strict=True):
            self.parameters[place].grad = None
            self._used[place] = gradient is not None
            if gradient is None:
                view.zero_()
            else:
                there.append((view, gradient))
        if there:
            views, parts = zip(*there, strict=True)
            torch._foreach_copy_(views, parts)

    def _give(self, used: Sequence[bool]) -> None:
        """Set the gradients; None where no process has used a parameter."""
        for bucket in self._buckets:
            for place, view in zip(bucket.places, bucket.views, strict=True):
                self.parameters[place].grad = view if used[place] else None

    def _bucket(self, places: list[int], tail: int) -> Bucket:
        """Return a bucket, with memory that is used again each step."""
        parameters = [self.parameters[place] for place in places]
        elements = sum(parameter.numel() for parameter in parameters)
        flat = parameters[0].new_zeros(elements + tail + -(elements + tail) % self.group.size)
        views, start = [], 0
        for parameter in parameters:
            # As the backward pass lays gradients out in memory. A norm's bits depend on it.
            strides = torch.empty_like(parameter, device="meta").stride()
            views.append(flat.as_strided(parameter.shape, strides, start))
            start += parameter.numel()
        return Bucket(places, flat, views, flat[elements:])

    def _send_buffers(self) -> None:
        """Begin to hand the first process's buffers round: they are ready when the last replica went forward."""
        if not self.buffers or self._shared_buffers is not None:
            return
        content = torch.cat([buffer.detach().reshape(-1).view(torch.uint8) for buffer in self.buffers])

        def broadcast() -> Tensor:
            dist.broadcast(content, 0, group=self._several.exchanges)
            return content

        self._shared_buffers = self._beside.run(broadcast)

    def _take_buffers(self) -> None:
        """Take the first process's buffers over; not earlier, as the backward pass may look at its own."""
        if self._shared_buffers is None or self.group.main:
            return
        start, content = 0, self._shared_buffers()
        for buffer in self.buffers:
            part = content[start : start + buffer.nbytes]
            buffer.detach().copy_(part.clone().view(buffer.dtype).view(buffer.shape))
            start += buffer.nbytes


def add(flat: Tensor, groups: Levels, scratch: Tensor | None = None, patience: timedelta = _PATIENCE) -> Tensor:
    """Add a vector over all processes in the fixed tree.

    Args:
        flat: (elements,) of this process; a multiple of the number of processes. It is overwritten.
        groups: inside this host first, and then with the same chunks of other hosts; or all processes at once.
        scratch: (at least twice as many elements,) memory to receive in; unset: it is made.
        patience: how long to wait for another process's chunk.

    Returns:
        (elements,) the sum, the same in all processes.
    """
    if not groups:
        return flat
    (group, size), *outer = groups
    scratch = flat.new_empty(2 * len(flat)) if scratch is None else scratch
    received = scratch[: len(flat)]
    dist.all_to_all_single(received, flat, group=group)
    chunk = add(add_neighbours(received.view(size, -1).unbind()), outer, scratch[len(flat) :], patience)
    _hand_round(flat, chunk, group, patience)
    return flat


def _hand_round(flat: Tensor, chunk: Tensor, group: Any, patience: timedelta) -> None:
    """Put every process's chunk together."""
    if dist.get_backend(group) != "gloo":
        dist.all_gather_into_tensor(flat, chunk, group=group)
        return
    # Gloo's all_gather makes new memory for all of it at each call, which costs more than sending it.
    parts, rank = flat.view(dist.get_world_size(group), -1), dist.get_rank(group)
    others = [place for place in range(len(parts)) if place != rank]
    works = [dist.irecv(parts[place], group=group, group_src=place) for place in others]
    works += [dist.isend(chunk, group=group, group_dst=place) for place in others]
    parts[rank].copy_(chunk)
    for work in filter(None, works):
        work.wait(patience)  # without it, as long as was allowed when the group was made


def levels(group: DistributedGroup, on_host: int) -> Levels:
    """Return with whom this process exchanges chunks: in two levels if there are several hosts of several processes.

    The hosts must be nodes of the tree: as many processes on each, a power of two, numbered one after another, as
    torchrun does. Otherwise all exchange with all.
    """
    told = torch.tensor([on_host, group.rank % on_host == group.local_rank % on_host])
    alike = bool((group.gather(told) == torch.tensor([on_host, 1])).all())
    hosts = group.size // on_host
    if not alike or on_host & (on_host - 1) or on_host in (1, group.size) or hosts * on_host != group.size:
        return [(group.exchanges, group.size)]
    inside = [list(range(host * on_host, (host + 1) * on_host)) for host in range(hosts)]
    between = [list(range(place, group.size, on_host)) for place in range(on_host)]
    host, place = divmod(group.rank, on_host)
    inner = [group.new_group(ranks=ranks) for ranks in inside][host]  # every process makes all groups
    outer = [group.new_group(ranks=ranks) for ranks in between][place]
    return [(inner, on_host), (outer, hosts)]


def divide(parameters: Sequence[nn.Parameter]) -> list[list[int]]:
    """Return the places of parameters, last ones first as the backward pass comes to them, by bucket and type."""
    found: list[list[int]] = []
    begun: dict[torch.dtype, tuple[list[int], int]] = {}  # a bucket and its bytes
    for place in reversed(range(len(parameters))):
        parameter = parameters[place]
        if parameter.dtype not in begun:
            found.append([])
            begun[parameter.dtype] = found[-1], 0
        bucket, size = begun[parameter.dtype]
        bucket.append(place)
        begun[parameter.dtype] = bucket, size + parameter.nbytes
        if size + parameter.nbytes >= (_FIRST_BUCKET if bucket is found[0] else _BUCKET):
            del begun[parameter.dtype]
    return found
