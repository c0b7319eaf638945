"""Formulas for an all-reduce of gradients: messages and bytes per process, bytes that leave a host, and the time.

Every algorithm is a list of phases. In a phase each process sends a number of messages of one size, all at once or
one after another. Ranks are numbered host by host, as torchrun does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Phase:
    """A part of an all-reduce, in which all processes do the same."""

    messages: int  # that a process sends
    size: int  # bytes of each
    in_turn: bool  # whether a message waits for the one before, as in a ring
    leaving: int  # bytes that leave a host, summed over its processes

    @property
    def bytes(self) -> int:
        """What a process sends."""
        return self.messages * self.size


@dataclass(frozen=True)
class Links:
    """Assumed link speeds; a table must name them."""

    name: str
    inside: float  # bytes per second that a process sends to others on its host
    between: float  # bytes per second that a host sends to others, over all its network cards
    latency_inside: float  # seconds until a message arrives
    latency_between: float
    gap: float  # seconds from the start of one message to the start of the next


FAST = Links("450 GB/s, 8 x 50 GB/s", 450e9, 400e9, 3e-6, 10e-6, 1e-6)
SLOW = Links("450 GB/s, 12.5 GB/s", 450e9, 12.5e9, 3e-6, 30e-6, 3e-6)


def chunk(elements: int, processes: int, item: int = 4) -> int:
    """Return the bytes of one process's chunk of a vector that is padded to equal chunks."""
    return -(-elements // processes) * item


def tree(elements: int, levels: Sequence[int], on_host: int, backend: str = "nccl") -> list[Phase]:
    """Return the phases of the fixed tree: all_to_all from the inside out, then sums passed on from the outside in.

    Args:
        elements: length of the float32 vector.
        levels: sizes of the groups, from inside a host outwards; (processes,): flat.
        on_host: how many processes share a host.
        backend: how sums are passed on: with "gloo" from each to all others, otherwise by an all_gather around a ring.
    """
    own, processes = chunk(elements, prod(levels)), prod(levels)
    there, back = [], []
    for level, size in enumerate(levels):
        stride = prod(levels[:level])  # distance in ranks between neighbors in a group
        message = own * (processes // (stride * size))
        together = max(1, min(size, on_host // stride))  # members of a group on one host
        crossing = size > together
        away = on_host * (size - together) * message if crossing else 0
        there.append(Phase(size - 1, message, False, away))
        # In a ring, the last member on a host sends out of it; with one member per host, every member does.
        around = (on_host // together) * (size - 1) * message if crossing else 0
        back.append(Phase(size - 1, message, backend != "gloo", away if backend == "gloo" else around))
    return [*there, *reversed(back)]


def ring(elements: int, processes: int, on_host: int) -> list[Phase]:
    """Return the phases of a ring all-reduce over all processes: reduce-scatter, all-gather."""
    message = chunk(elements, processes)
    leaving = (processes - 1) * message if processes > on_host else 0
    return [Phase(processes - 1, message, True, leaving)] * 2


def hierarchical(elements: int, on_host: int, hosts: int) -> list[Phase]:
    """Return the phases of a hierarchical all-reduce: rings inside hosts, around a ring between hosts."""
    own = chunk(elements, on_host * hosts)
    inside = Phase(on_host - 1, own * hosts, True, 0)
    between = Phase(hosts - 1, own, True, on_host * (hosts - 1) * own)
    return [inside, between, between, inside]


def messages(phases: Sequence[Phase]) -> int:
    """Return how many messages a process sends."""
    return sum(phase.messages for phase in phases)


def sent(phases: Sequence[Phase]) -> int:
    """Return how many bytes a process sends."""
    return sum(phase.bytes for phase in phases)


def leaving(phases: Sequence[Phase]) -> int:
    """Return how many bytes leave a host."""
    return sum(phase.leaving for phase in phases)


def seconds(phases: Sequence[Phase], links: Links) -> float:
    """Return how long an all-reduce takes if nothing else uses the links and no process is late."""
    total = 0.0
    for phase in phases:
        if not phase.messages:
            continue
        latency = links.latency_between if phase.leaving else links.latency_inside
        begun = phase.messages * max(latency, links.gap) if phase.in_turn else latency + phase.messages * links.gap
        total += begun + max(phase.bytes / links.inside, phase.leaving / links.between)
    return total


def forms(elements: int, processes: int, on_host: int) -> Iterator[tuple[str, list[Phase]]]:
    """Yield each algorithm's name and phases, for hosts of `on_host` processes (one host if there are fewer)."""
    on_host = min(on_host, processes)
    hosts = processes // on_host
    yield "flat", tree(elements, (processes,), on_host)
    yield "two levels", tree(elements, (on_host, hosts) if 1 < on_host < processes else (processes,), on_host)
    yield "ring", ring(elements, processes, on_host)
    yield "hierarchical", hierarchical(elements, on_host, hosts)


def three(elements: int, processes: int, on_host: int) -> list[Phase]:
    """Return the phases of a tree in three levels; the outer two are as equal as powers of two allow."""
    on_host = min(on_host, processes)
    hosts = processes // on_host
    near = 1 << (hosts.bit_length() // 2)
    return tree(elements, (on_host, near, hosts // near), on_host)


# ------------------------------------------------------------------------------------------------ other things


def evaluation_rounds(batches: int, processes: int) -> int:
    """Return the number of forward passes of every process in an evaluation."""
    return -(-batches // processes)


def evaluation_bytes(batches: int, processes: int, batch: int, classes: int) -> int:
    """Return the bytes that rank 0 receives in an evaluation: all outputs and targets but its own.

    Args:
        batches: number of full batches.
        processes: the world size; processes take batches in turn.
        batch: samples per batch.
        classes: float32 outputs per sample; a target is an int64.
    """
    of_others = batches - -(-batches // processes)
    heads = 2 * 8 * 10  # dtype and shape precede each tensor
    return of_others * (batch * (4 * classes + 8) + heads)


def saved_bytes(parameters: int, states: int, averaged: bool = False) -> int:
    """Return the size of a checkpoint.

    Args:
        parameters: number of float32 parameters of the model.
        states: optimizer state per parameter: 1 for momentum, 2 for AdamW.
        averaged: whether averaged weights are saved too.
    """
    return 4 * parameters * (1 + states + averaged)
