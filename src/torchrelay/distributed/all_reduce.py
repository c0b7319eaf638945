"""Step 4: the all-reduce whose sum has the same bits on any number of processes, and how it runs in the background.

Each process enters the sum of its own replicas, which is a node of the fixed tree. `all_reduce` adds the nodes in three
steps: each process receives its chunk of all vectors (all_to_all), adds the chunks pairwise, and sends the sum to the
others (all_gather). That sends as many bytes as a ring all-reduce. With several hosts this happens inside each host
first, and then between the hosts with the sums: the tree is the same.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchrelay.distributed.process_group import DistributedGroup
from torchrelay.distributed.replicas import add_neighbors

_TIMEOUT = timedelta(minutes=10)

Levels = list[tuple[Any, int]]  # torch process groups and their sizes, from inside a host outwards


def all_reduce(flat: Tensor, levels: Levels, scratch: Tensor | None = None, timeout: timedelta = _TIMEOUT) -> Tensor:
    """Add a vector over all processes in the fixed tree.

    Args:
        flat: (elements,) this process's vector, which is overwritten; a multiple of the number of processes.
        levels: the groups to add within, one after another.
        scratch: (at least 2 * elements,) memory to receive in; allocated if not given.
        timeout: how long to wait for another process's chunk.

    Returns:
        (elements,) the sum, the same in all processes.
    """
    if not levels:
        return flat
    (group, size), *outer = levels
    scratch = flat.new_empty(2 * len(flat)) if scratch is None else scratch
    received = scratch[: len(flat)]
    dist.all_to_all_single(received, flat, group=group)
    chunk = all_reduce(add_neighbors(received.view(size, -1).unbind()), outer, scratch[len(flat) :], timeout)
    _all_gather(flat, chunk, group, timeout)
    return flat


def _all_gather(flat: Tensor, chunk: Tensor, group: Any, timeout: timedelta) -> None:
    """Put all processes' chunks together in `flat`."""
    if dist.get_backend(group) != "gloo":
        dist.all_gather_into_tensor(flat, chunk, group=group)
        return
    # Gloo's all_gather allocates memory for all chunks at each call, which takes longer than sending them.
    chunks, rank = flat.view(dist.get_world_size(group), -1), dist.get_rank(group)
    others = [other for other in range(len(chunks)) if other != rank]
    works = [dist.irecv(chunks[other], group=group, group_src=other) for other in others]
    works += [dist.isend(chunk, group=group, group_dst=other) for other in others]
    chunks[rank].copy_(chunk)
    for work in filter(None, works):
        work.wait(timeout)  # the default is the timeout that the group was created with


def host_levels(group: DistributedGroup, local_size: int) -> Levels:
    """Return the groups for `all_reduce`: hosts, then the same chunk on all hosts; or all processes in one group.

    There are two levels if there are several hosts, each a node of the tree: with the same number of processes, a power
    of two, and consecutive ranks, as torchrun assigns them.

    Args:
        group: all processes, which call this together.
        local_size: the number of processes on this host.
    """
    regular = group.rank % local_size == group.local_rank % local_size
    expected = torch.tensor([local_size, True])
    same = bool((group.gather(torch.tensor([local_size, regular])) == expected).all())
    hosts = group.size // local_size
    if not same or local_size & (local_size - 1) or local_size in (1, group.size) or hosts * local_size != group.size:
        return [(group.gradient_group, group.size)]
    inside = [list(range(host * local_size, (host + 1) * local_size)) for host in range(hosts)]
    between = [list(range(local_rank, group.size, local_size)) for local_rank in range(local_size)]
    host, local_rank = divmod(group.rank, local_size)
    inner = [group.new_group(ranks=ranks) for ranks in inside][host]  # every process creates all groups
    outer = [group.new_group(ranks=ranks) for ranks in between][local_rank]
    return [(inner, local_size), (outer, hosts)]


class Background:
    """Runs pieces of work one after another, in a thread or on a CUDA stream, while the caller continues.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pieces: SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]]] = SimpleQueue()
        if self._stream is None:
            # A daemon, as it may wait for a process that no longer exists and must not keep this one from exiting.
            threading.Thread(target=self._work, name="all-reduce", daemon=True).start()

    def run(self, piece: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Start a piece of work; return a function that waits for it and returns its result or raises its error."""
        if self._stream is None:
            future: Future[Tensor] = Future()
            self._pieces.put((piece, future))
            return future.result
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            result = piece()

        def wait() -> Tensor:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
            return result

        return wait

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            piece, future = self._pieces.get()
            try:
                future.set_result(piece())
            except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
                future.set_exception(error)
