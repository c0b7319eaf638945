"""Count what an all-reduce of gradients sends: in a simulation of any size, and by the kernel for real processes.

The simulation runs the all-reduce code, one thread per process, over mailboxes that count. For real processes, the
kernel reports how many bytes each connection has carried.
"""

import json
import os
import socket
import struct
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from unittest.mock import patch

import torch
from torch import Tensor

from torchrelay.distributed import all_reduce
from torchrelay.distributed.all_reduce import Levels

Link = tuple[int, int]  # from, to
# Offsets in Linux's struct tcp_info: bytes_sent, bytes_retrans (subtracted from it) and bytes_received.
_SENT_AT, _AGAIN_AT, _RECEIVED_AT = 200, 208, 128
_TCP_INFO_SIZE = 256


class Wire:
    """Mailboxes between simulated processes, and counts of what went through each.

    Args:
        size: the world size.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._boxes: dict[Link, SimpleQueue[Tensor]] = {}
        self.messages: list[dict[int, int]] = [defaultdict(int) for _ in range(size)]  # by sender, then by receiver
        self.bytes: list[dict[int, int]] = [defaultdict(int) for _ in range(size)]

    def send(self, source: int, target: int, content: Tensor) -> None:
        """Put a copy into the mailbox from `source` to `target`, and count it."""
        self.messages[source][target] += 1
        self.bytes[source][target] += content.nbytes
        self._box(source, target).put(content.clone())

    def receive(self, source: int, target: int) -> Tensor:
        """Wait for the next message from `source` to `target`."""
        return self._box(source, target).get(timeout=60)

    def _box(self, source: int, target: int) -> "SimpleQueue[Tensor]":
        return self._boxes.setdefault((source, target), SimpleQueue())  # atomic: either side may come first

    def run(self, process: Callable[[int], Tensor]) -> list[Tensor]:
        """Run all processes, and return the result of each."""
        results: dict[int, Tensor] = {}
        threads = [
            threading.Thread(target=lambda rank=rank: results.update({rank: process(rank)}), daemon=True)
            for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return [results[rank] for rank in range(self.size)]

    def leaving(self, on_host: int) -> int:
        """Return the most bytes that left any host."""
        away = [0] * -(-self.size // on_host)
        for source, targets in enumerate(self.bytes):
            away[source // on_host] += sum(n for to, n in targets.items() if to // on_host != source // on_host)
        return max(away)


@dataclass(frozen=True)
class Group:
    """A process group of simulated processes, as one member sees it."""

    wire: Wire
    ranks: Sequence[int]
    place: int  # of this one, among them

    def send(self, place: int, content: Tensor) -> None:
        self.wire.send(self.ranks[self.place], self.ranks[place], content)

    def receive(self, place: int) -> Tensor:
        return self.wire.receive(self.ranks[place], self.ranks[self.place])


@dataclass(frozen=True)
class Arrival:
    """A message on its way to a simulated process."""

    target: Tensor
    group: Group
    place: int  # where it comes from

    def wait(self, _patience: object) -> None:
        self.target.copy_(self.group.receive(self.place))


class Simulated:
    """Replaces `torch.distributed` in the all-reduce code.

    Args:
        backend: "gloo": each process sends its chunk to every other one; otherwise an all_gather, here around a ring,
            as NCCL may do it.
    """

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def get_backend(self, _group: Group) -> str:
        return self._backend

    @staticmethod
    def get_world_size(group: Group) -> int:
        return len(group.ranks)

    @staticmethod
    def get_rank(group: Group) -> int:
        return group.place

    @staticmethod
    def isend(content: Tensor, group: Group, group_dst: int) -> None:
        """Send immediately; there is nothing to wait for."""
        group.send(group_dst, content)

    @staticmethod
    def irecv(target: Tensor, group: Group, group_src: int) -> Arrival:
        return Arrival(target, group, group_src)

    @staticmethod
    def all_to_all_single(received: Tensor, flat: Tensor, group: Group) -> None:
        """Send each process its chunk, all at once."""
        size = len(group.ranks)
        own, theirs = flat.view(size, -1), received.view(size, -1)
        theirs[group.place] = own[group.place]
        for step in range(1, size):
            place = (group.place + step) % size
            group.send(place, own[place])
        for step in range(1, size):
            place = (group.place - step) % size
            theirs[place] = group.receive(place)

    @staticmethod
    def all_gather_into_tensor(flat: Tensor, chunk: Tensor, group: Group) -> None:
        """Pass chunks around a ring."""
        size = len(group.ranks)
        parts = flat.view(size, -1)
        parts[group.place] = chunk
        for step in range(size - 1):
            group.send((group.place + 1) % size, parts[(group.place - step) % size])
            parts[(group.place - step - 1) % size] = group.receive((group.place - 1) % size)


def reduce_scatter(parts: Tensor, group: Group) -> Tensor:
    """Add chunks around a ring, each in a different order; return this process's sum."""
    size = len(group.ranks)
    for step in range(1, size):
        group.send((group.place + 1) % size, parts[(group.place - step) % size])
        parts[(group.place - step - 1) % size] += group.receive((group.place - 1) % size)
    return parts[group.place]


def groups_of(wire: Wire, rank: int, sizes: Sequence[int]) -> list[tuple[Group, int]]:
    """Return the groups in which a process exchanges chunks, from inside a host outwards."""
    found, stride = [], 1
    for size in sizes:
        place = rank // stride % size
        first = rank - place * stride
        found.append((Group(wire, [first + stride * i for i in range(size)], place), size))
        stride *= size
    return found


def padded(values: Tensor) -> list[Tensor]:
    """Return each process's vector, padded as the all-reduce pads it."""
    return list(torch.nn.functional.pad(values, (0, -values.shape[1] % len(values))).clone().unbind())


def simulate_tree(values: Tensor, levels: Sequence[int], backend: str = "nccl") -> tuple[Wire, list[Tensor]]:
    """Add vectors with the all-reduce code.

    Args:
        values: (processes, elements).
        levels: sizes of the groups, from inside a host outwards.
        backend: "gloo", or any other name for an all_gather around a ring.

    Returns:
        The counts, and each process's result with its padding.
    """
    wire, own = Wire(len(values)), padded(values)
    with patch.object(all_reduce, "dist", Simulated(backend)):
        return wire, wire.run(lambda rank: all_reduce.all_reduce(own[rank], groups_of(wire, rank, levels)))


def simulate_rings(values: Tensor, levels: Sequence[int]) -> tuple[Wire, list[Tensor]]:
    """Add vectors by nested rings: (processes,) is a ring all-reduce, (on a host, hosts) a hierarchical one."""
    wire, own = Wire(len(values)), padded(values)

    def add(flat: Tensor, groups: Levels) -> Tensor:
        if not groups:
            return flat
        (group, size), *outer = groups
        total = add(reduce_scatter(flat.view(size, -1), group).clone(), outer)
        Simulated.all_gather_into_tensor(flat, total, group)
        return flat

    return wire, wire.run(lambda rank: add(own[rank], groups_of(wire, rank, levels)))


# ------------------------------------------------------------------------------------------------ real processes

Ports = tuple[int, int]  # here, there


def connections() -> dict[Ports, tuple[int, int]]:
    """Return the bytes that each TCP connection of this process has sent and received since it began."""
    found = {}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - only the names are needed
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):  # noqa: PTH115
                continue
            copy = os.dup(int(name))
        except OSError:
            continue  # closed by now, as the folder's own is
        try:
            with socket.socket(fileno=copy) as one:
                if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                    continue
                here, there = one.getsockname()[1], one.getpeername()[1]
                facts = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
        except OSError:
            continue  # it listens
        sent, again, received = (struct.unpack_from("Q", facts, at)[0] for at in (_SENT_AT, _AGAIN_AT, _RECEIVED_AT))
        found[here, there] = (sent - again, received)
    return found


def since(before: dict[Ports, tuple[int, int]], only: set[Ports] | None = None) -> dict[Ports, tuple[int, int]]:
    """Return what all or some connections have sent and received since an earlier reading."""
    return {
        ports: (sent - before.get(ports, (0, 0))[0], received - before.get(ports, (0, 0))[1])
        for ports, (sent, received) in connections().items()
        if only is None or ports in only
    }


def by_link(found: Sequence[dict[Ports, tuple[int, int]]]) -> dict[Link, int]:
    """Return bytes by sender and receiver, from every process's counts of its own connections.

    Both ends of a connection name the same two ports.
    """
    owner = {ports: rank for rank, own in enumerate(found) for ports in own}
    links: dict[Link, int] = defaultdict(int)
    for source, own in enumerate(found):
        for (here, there), (sent, _) in own.items():
            links[source, owner[there, here]] += sent
    return dict(links)


def fork(size: int, run: Callable[[int], object], folder: Path) -> list[object]:
    """Run `run(rank)` in `size` real processes of one process group, and return each result (JSON).

    Raises:
        ChildProcessError: one of them failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            code = 1
            try:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in places.items()}
                (folder / f"{size}-{rank}.json").write_text(json.dumps(run(rank)))
                code = 0
            except BaseException:  # noqa: BLE001 - a child must not continue the parent's work
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        started.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
    if any(codes):
        raise ChildProcessError(f"of {size} processes, the exit codes were {codes}")
    return [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
