"""Step 4: gradients of several processes, added in the one fixed tree while the backward pass still runs.

Each process adds its own replicas' gradients, which gives a node of the tree. The nodes are added by sending each
process its chunk of all of them (all_to_all), adding the chunks pairwise, and handing the sums round (all_gather): as
many bytes as a ring all-reduce moves, and the same bits however many processes share the replicas. Where there are
several hosts, this is done inside each host first, and then between hosts with what a host has added: the same tree.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrelay.beside import Beside
from torchrelay.exchange import Exchange
from torchrelay.parallel import GradientTree, pairwise
from torchrelay.world import ManyProcesses

_BUCKET, _FIRST_BUCKET = 25 * 2**20, 2**20  # bytes, as DistributedDataParallel has them: the first one leaves early

Levels = list[tuple[Any, int]]  # groups of processes and their sizes, from inside a host outwards


@dataclass
class Bucket:
    """Parameters whose gradients travel together."""

    places: list[int] = field(default_factory=list)  # among the model's
    missing: int = 0  # gradients that the running backward pass has not brought yet


class TreeExchange(Exchange):
    """Adds the gradients of all processes' replicas.

    Args:
        model: whose gradients are added.
        world: the processes.
        forward: the model, or the same compiled.
        on_host: how many processes a host has; unset: what the launcher says.
    """

    def __init__(
        self,
        model: nn.Module,
        world: ManyProcesses,
        *,
        forward: Callable[[Any], Any] | None = None,
        on_host: int | None = None,
    ) -> None:
        super().__init__(model, world, exact=True, forward=forward)
        self._several = world
        self._levels = levels(world, on_host or world.local_size)
        self._beside = Beside(world.device)
        # As the backward pass lays gradients out in memory. A norm's bits depend on it.
        self._strides = [torch.empty_like(p, device="meta").stride() for p in self.parameters]
        self._buckets = buckets(self.parameters)
        self._bucket_of = {self.parameters[place]: bucket for bucket in self._buckets for place in bucket.places}
        self._tree: GradientTree | None = None  # while the last replica's gradients come
        self._sums: list[Callable[[], Tensor]] = []  # of the buckets that have left
        self._used = [False] * len(self.parameters)
        self._shared_buffers: Callable[[], Tensor] | None = None
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def __call__(self, inputs: Any) -> Any:
        """Return the model's outputs."""
        outputs = super().__call__(inputs)
        if self._tree is not None:
            self._send_buffers()
        return outputs

    @contextmanager
    def send(self, tree: GradientTree) -> Iterator[None]:
        """A context for the last replica's passes, whose gradients leave as soon as they are there; then call `add`."""
        self._tree, self._sums, self._shared_buffers = tree, [], None
        for bucket in self._buckets:
            bucket.missing = len(bucket.places)
        yield

    def add(self, loss: Tensor) -> Tensor:
        """Wait for the sums, after which gradients and buffers are those of one process; return the loss's sum."""
        self._send_buffers()
        while len(self._sums) < len(self._buckets) - 1:
            self._start(self._buckets[len(self._sums)], [])
        tail = [loss.reshape(1)]  # what all must know travels with the last bucket, if it has the same type
        alike = loss.dtype == self.parameters[self._buckets[-1].places[0]].dtype
        self._start(self._buckets[-1], tail if alike else [])
        if not alike:
            self._sums.append(self._begin(torch.cat([loss.reshape(1), self._flags(loss)])))
        self._tree = None
        with self._several.named("added gradients"):
            *sums, last = [wait() for wait in self._sums]
            self._take_buffers()
        if alike:
            sums.append(last)
            last = last[sum(self.parameters[place].numel() for place in self._buckets[-1].places) :]
        self._give(sums, (last[1 : 1 + len(self.parameters)] > 0).tolist())
        return last[0]

    def _arrived(self, parameter: Tensor) -> None:
        """Send what is complete; in the one order of the buckets, lest processes wait for different ones."""
        if self._tree is None:
            return
        self._bucket_of[parameter].missing -= 1  # type: ignore[index]
        while len(self._sums) < len(self._buckets) - 1 and not self._buckets[len(self._sums)].missing:
            self._start(self._buckets[len(self._sums)], [])

    def _start(self, bucket: Bucket, tail: list[Tensor]) -> None:
        """Begin to add a bucket's gradients over the processes."""
        assert self._tree is not None  # noqa: S101 - `send` came before
        parameters = [self.parameters[place] for place in bucket.places]
        gradients = self._tree.closing(bucket.places, [parameter.grad for parameter in parameters])
        flat = []
        for place, parameter, gradient in zip(bucket.places, parameters, gradients, strict=True):
            parameter.grad = None
            self._used[place] = gradient is not None
            flat.append(parameter.new_zeros(parameter.numel()) if gradient is None else self._flat(gradient, place))
        self._sums.append(self._begin(torch.cat([*flat, *tail, *([self._flags(tail[0])] if tail else [])])))

    def _flags(self, like: Tensor) -> Tensor:
        """Return which parameters this process has used, as numbers."""
        return torch.tensor(self._used, dtype=like.dtype, device=like.device)

    def _flat(self, gradient: Tensor, place: int) -> Tensor:
        """Return a gradient's numbers as they lie in memory."""
        strides = self._strides[place]
        if gradient.stride() != strides:
            gradient = gradient.new_empty_strided(gradient.shape, strides).copy_(gradient)
        return gradient.as_strided((gradient.numel(),), (1,), gradient.storage_offset())

    def _begin(self, flat: Tensor) -> Callable[[], Tensor]:
        size = self.world.size
        padded = nn.functional.pad(flat, (0, -len(flat) % size)) if len(flat) % size else flat
        return self._beside.run(lambda: add(padded, self._levels))

    def _give(self, sums: Sequence[Tensor], used: Sequence[bool]) -> None:
        """Set the gradients; None where no process has used a parameter."""
        for bucket, total in zip(self._buckets, sums, strict=True):
            start = 0
            for place in bucket.places:
                parameter = self.parameters[place]
                if used[place]:
                    parameter.grad = total.as_strided(parameter.shape, self._strides[place], start)
                start += parameter.numel()

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
        if self._shared_buffers is None or self.world.main:
            return
        start, content = 0, self._shared_buffers()
        for buffer in self.buffers:
            part = content[start : start + buffer.nbytes]
            buffer.detach().copy_(part.clone().view(buffer.dtype).view(buffer.shape))
            start += buffer.nbytes


def add(flat: Tensor, groups: Levels) -> Tensor:
    """Add a vector over all processes in the fixed tree.

    Args:
        flat: (elements,) of this process; a multiple of the number of processes. It is overwritten.
        groups: inside this host first, and then with the same chunks of other hosts; or all processes at once.

    Returns:
        (elements,) the sum, the same in all processes.
    """
    if not groups:
        return flat
    (group, size), *outer = groups
    received = torch.empty_like(flat)
    dist.all_to_all_single(received, flat, group=group)
    chunk = add(pairwise(list(received.view(size, -1).unbind())), outer)
    dist.all_gather_into_tensor(flat, chunk, group=group)
    return flat


def levels(world: ManyProcesses, on_host: int) -> Levels:
    """Return with whom this process exchanges chunks: in two levels if there are several hosts of several processes.

    The hosts must be nodes of the tree: as many processes on each, a power of two, numbered one after another, as
    torchrun does. Otherwise all exchange with all.
    """
    told = torch.tensor([on_host, world.rank % on_host == world.local_rank % on_host])
    alike = bool((world.gather(told) == torch.tensor([on_host, 1])).all())
    hosts = world.size // on_host
    if not alike or on_host & (on_host - 1) or on_host in (1, world.size) or hosts * on_host != world.size:
        return [(world.exchanges, world.size)]
    inside = [list(range(host * on_host, (host + 1) * on_host)) for host in range(hosts)]
    between = [list(range(place, world.size, on_host)) for place in range(on_host)]
    host, place = divmod(world.rank, on_host)
    inner = [world.new_group(ranks=ranks) for ranks in inside][host]  # every process makes all groups
    outer = [world.new_group(ranks=ranks) for ranks in between][place]
    return [(inner, on_host), (outer, hosts)]


def buckets(parameters: Sequence[nn.Parameter]) -> list[Bucket]:
    """Divide parameters, last ones first as the backward pass comes to them, into buckets of one type each."""
    open_ones: dict[torch.dtype, Bucket] = {}
    found: list[Bucket] = []
    sizes: dict[int, int] = {}
    for place in reversed(range(len(parameters))):
        parameter = parameters[place]
        bucket = open_ones.get(parameter.dtype)
        if bucket is None:
            bucket = open_ones[parameter.dtype] = Bucket()
            found.append(bucket)
        bucket.places.append(place)
        sizes[id(bucket)] = sizes.get(id(bucket), 0) + parameter.nbytes
        if sizes[id(bucket)] >= (_FIRST_BUCKET if bucket is found[0] else _BUCKET):
            del open_ones[parameter.dtype]
    return found
