"""What an exchange of gradients sends, in formulas: messages and bytes, of a process and out of a host; and how long.

Every form of exchange is a list of phases. In a phase each process sends so many messages of one size, all at once or
one after another. Processes are numbered host by host, as torchrun does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Phase:
    """A part of an exchange, in which all processes do the same."""

    messages: int  # that a process sends
    size: int  # bytes of each
    in_turn: bool  # whether a message waits for the one before, as in a ring
    leaving: int  # bytes that leave a host, of all its processes together

    @property
    def bytes(self) -> int:
        """What a process sends."""
        return self.messages * self.size


@dataclass(frozen=True)
class Links:
    """What a time is computed from; assumptions, which a table must name."""

    name: str
    inside: float  # bytes a second that a process sends to others of its host
    between: float  # bytes a second that a host sends to others, over all its network cards
    latency_inside: float  # seconds until a message that nobody waited for has arrived
    latency_between: float
    gap: float  # seconds from the beginning of one message to the beginning of the next one


FAST = Links("450 GB/s, 8 x 50 GB/s", 450e9, 400e9, 3e-6, 10e-6, 1e-6)
SLOW = Links("450 GB/s, 12.5 GB/s", 450e9, 12.5e9, 3e-6, 30e-6, 3e-6)


def chunk(elements: int, processes: int, item: int = 4) -> int:
    """Return the bytes of a process's part of a vector, which is padded so that all parts are alike."""
    return -(-elements // processes) * item


def tree(elements: int, levels: Sequence[int], on_host: int, backend: str = "nccl") -> list[Phase]:
    """Return the phases of the fixed tree: all_to_all from the inside out, and sums handed round from the outside in.

    Args:
        elements: numbers in the vector, of four bytes each.
        levels: sizes of the groups, from inside a host outwards; (processes,): flat.
        on_host: how many processes share a host.
        backend: how sums are handed round: over "gloo" from each to all others, else by an all_gather around a ring.
    """
    own, processes = chunk(elements, prod(levels)), prod(levels)
    there, back = [], []
    for level, size in enumerate(levels):
        stride = prod(levels[:level])  # from a member of a group to the next one
        message = own * (processes // (stride * size))
        together = max(1, min(size, on_host // stride))  # members of a group that share a host
        crossing = size > together
        away = on_host * (size - together) * message if crossing else 0
        there.append(Phase(size - 1, message, False, away))
        # In a ring, the last one of a host sends out of it; every one does where each is alone there.
        around = (on_host // together) * (size - 1) * message if crossing else 0
        back.append(Phase(size - 1, message, backend != "gloo", away if backend == "gloo" else around))
    return [*there, *reversed(back)]


def ring(elements: int, processes: int, on_host: int) -> list[Phase]:
    """Return the phases of a ring all-reduce over all processes: reduce-scatter, all-gather."""
    message = chunk(elements, processes)
    leaving = (processes - 1) * message if processes > on_host else 0
    return [Phase(processes - 1, message, True, leaving)] * 2


def hierarchical(elements: int, on_host: int, hosts: int) -> list[Phase]:
    """Return the phases of a hierarchical all-reduce: rings inside a host, around a ring between hosts."""
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
    """Return how long an exchange takes if nothing else is on the links and nobody comes late."""
    total = 0.0
    for phase in phases:
        if not phase.messages:
            continue
        latency = links.latency_between if phase.leaving else links.latency_inside
        begun = phase.messages * max(latency, links.gap) if phase.in_turn else latency + phase.messages * links.gap
        total += begun + max(phase.bytes / links.inside, phase.leaving / links.between)
    return total


def forms(elements: int, processes: int, on_host: int) -> Iterator[tuple[str, list[Phase]]]:
    """Yield every form of exchange by its name, for hosts of so many processes (one host, if there are fewer)."""
    on_host = min(on_host, processes)
    hosts = processes // on_host
    yield "flat", tree(elements, (processes,), on_host)
    yield "two levels", tree(elements, (on_host, hosts) if 1 < on_host < processes else (processes,), on_host)
    yield "ring", ring(elements, processes, on_host)
    yield "hierarchical", hierarchical(elements, on_host, hosts)


def three(elements: int, processes: int, on_host: int) -> list[Phase]:
    """Return the phases of a tree in three levels, of which the outer two are as alike as powers of two can be."""
    on_host = min(on_host, processes)
    hosts = processes // on_host
    near = 1 << (hosts.bit_length() // 2)
    return tree(elements, (on_host, near, hosts // near), on_host)


# ------------------------------------------------------------------------------------------------ other things


def evaluation_rounds(batches: int, processes: int) -> int:
    """Return how often every process goes through the model in an evaluation."""
    return -(-batches // processes)


def evaluation_bytes(batches: int, processes: int, batch: int, classes: int) -> int:
    """Return the bytes that the first process receives in an evaluation: outputs and targets of all but its own.

    Args:
        batches: of the data; full ones.
        processes: which take them in turn.
        batch: samples in each.
        classes: numbers that the model gives for a sample, of four bytes; a target has eight.
    """
    of_others = batches - -(-batches // processes)
    heads = 2 * 8 * 10  # type and shape go before each tensor
    return of_others * (batch * (4 * classes + 8) + heads)


def saved_bytes(parameters: int, states: int, averaged: bool = False) -> int:
    """Return the size of a checkpoint.

    Args:
        parameters: float32 numbers of the model.
        states: numbers that the optimizer keeps for each: 1 with momentum, 2 with AdamW.
        averaged: whether there is an average of the weights.
    """
    return 4 * parameters * (1 + states + averaged)
