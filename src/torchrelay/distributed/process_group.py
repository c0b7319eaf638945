"""Step 4: the processes that train together, and how they speak.

One process alone needs no store, no rendezvous and no socket: its methods return what they are given. Several are
joined by torch.distributed, from the environment that torchrun (or our own launcher) sets. Only tensors are sent, never
pickles.
"""

import atexit
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _get_default_store

from torchrelay.distributed.rendezvous import meet
from torchrelay.errors import RelayError

# Newer releases of PyTorch have a public name for it.
_set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_GRACE = 3.0  # seconds within which processes that wait for the same one notice it
_FIRST_CALLS = 3  # of `agree`: a step has been made then
_DIMENSIONS = 8  # of a tensor that is sent with its shape, at most


class ProcessGroup:
    """The processes that train together; one of them, as it stands.

    Args:
        rank: which of them this is.
        size: how many there are.
        device: where this one computes.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))

    @property
    def main(self) -> bool:
        """Whether this is the first process, which writes the run's folder and speaks to people."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """Return (size, …) the values of all processes in their order; they have one shape and type."""
        return values[None]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy the first process's contents into the tensors of all."""

    def broadcast_bytes(self, content: bytes | None) -> bytes:
        """Return the first process's bytes; what the others give is not looked at."""
        return content or b""

    def send_to_main(self, tensor: Tensor | None, source: int) -> Tensor | None:  # noqa: ARG002
        """Hand the tensor of the process `source`, of any shape, to the first one; all others get None."""
        return tensor

    def agree(self, flags: int) -> int:
        """Hand in bits, and return those that any process handed in at the call before; alone: at this one."""
        return flags

    def barrier(self, what: str) -> None:
        """Wait for all processes."""


class DistributedGroup(ProcessGroup):
    """Several processes, joined by torch.distributed.

    Attributes:
        patience: how long one waits for a message of another.
        lost: whether another process was lost, or didn't come in time: then nobody waits for it any more.
    """

    def __init__(self, rank: int, size: int, device: torch.device, timeout: float) -> None:
        super().__init__(rank, size, device)
        self.lost = False
        self._timeout = timeout
        self.patience = first_patience(timeout)
        self._groups: list[Any] = [dist.group.WORLD]
        self._agreed = 0  # how often
        self._host = self.new_group("gloo")  # of tensors in the host's memory
        self._votes = self.new_group("gloo")  # so that nothing else waits for them
        self.exchanges = self.new_group()  # of gradients, while the backward pass runs
        self._asked: tuple[Tensor, Any] | None = None
        atexit.register(self._leave)

    def _leave(self) -> None:
        """Leave the others in order: gloo's threads must have ended before the interpreter does, or they abort it."""
        if dist.is_initialized() and not self.lost:
            self._groups.clear()
            self._host = self._votes = self.exchanges = self._asked = None
            dist.destroy_process_group()

    def new_group(self, backend: str | None = None, ranks: Sequence[int] | None = None) -> Any:
        """Return a group of some or all processes, in which messages don't wait for those of other groups."""
        group = dist.new_group(None if ranks is None else list(ranks), backend=backend, timeout=self.patience)
        self._groups += [] if group is dist.GroupMember.NON_GROUP_MEMBER else [group]
        return group

    def _hasten(self) -> None:
        """Wait less from now on: what a first step takes long for, such as compiling, is done."""
        self.patience = timedelta(seconds=self._timeout)
        for group in self._groups:
            _set_timeout(self.patience, group)

    def _group(self, tensor: Tensor) -> Any:
        return self._host if tensor.device.type == "cpu" else dist.group.WORLD

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Say which exchange failed, and where.

        Raises:
            RelayError: another process ended, or didn't come in time.
        """
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            text = str(error).lower()
            if "timed out" in text or "timeout" in text:
                raise RelayError(self._who_is_late(what)) from error
            raise RelayError(
                f"process {self.rank} of {self.size} lost another process while it {what}: look for the first error in "
                "the logs of the others, then resume the run"
            ) from error

    def _who_is_late(self, what: str) -> str:
        """Say which process didn't come: the one that doesn't say so itself within a while."""
        waited = f"process {self.rank} of {self.size} {what} and waited {self.patience.total_seconds():g} s"
        others = self._silent_ones(what)
        if others is None:
            return (
                f"{waited}, and can't reach the store of process 0 either: this host may be cut off from the network; "
                "resume the run when it is back"
            )
        if not others:
            return (
                f"{waited} for the others, which waited, too: the network between them may be cut; then resume the run"
            )
        if len(others) == 1:
            names, verbs, logs = f"process {others[0]}", "hangs or needs", "its log"
        else:
            names, verbs, logs = f"processes {', '.join(map(str, others))}", "hang or need", "their logs"
        return (
            f"{waited} for {names}, which {verbs} longer than parallel.timeout: look into {logs}, then resume the run"
        )

    def _silent_ones(self, what: str) -> list[int] | None:
        """Return the processes that don't say that they wait, too; None if the store can't be reached."""
        found: list[list[int]] = []

        def ask() -> None:  # in a thread: a store doesn't give up on a dead network
            with suppress(RuntimeError):
                store = dist.PrefixStore("late", _get_default_store())  # type: ignore[attr-defined]
                store.set(str(self.rank), what)
                time.sleep(_GRACE)
                found.append([r for r in range(self.size) if r != self.rank and not store.check([str(r)])])

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(3 * _GRACE)
        return found[0] if found else None

    def gather(self, values: Tensor) -> Tensor:
        """Return (size, …) the values of all processes in their order."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        with self.named("gathered values"):
            dist.all_gather(found, values.contiguous(), group=self._group(values))
        return torch.stack(found)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy the first process's contents into the tensors of all, in one message for each type."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            kinds[tensor.dtype, tensor.device].append(tensor)
        for parts in kinds.values():
            flat = torch.cat([part.detach().reshape(-1) for part in parts])
            with self.named("broadcast tensors"):
                dist.broadcast(flat, 0, group=self._group(flat))
            if not self.main:
                for part, content in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
                    part.detach().copy_(content.view(part.shape))

    def broadcast_bytes(self, content: bytes | None) -> bytes:
        """Return the first process's bytes."""
        given = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)
        size = torch.tensor([len(content or b"")])
        with self.named("broadcast text"):
            dist.broadcast(size, 0, group=self._host)
            text = given[: int(size)] if self.main else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(text, 0, group=self._host)
        return text.numpy().tobytes()

    def send_to_main(self, tensor: Tensor | None, source: int) -> Tensor | None:
        """Hand a tensor to the first process: its type and shape go before it."""
        if self.rank not in (0, source):
            return None
        if source == 0:
            return tensor
        with self.named("shared an evaluation"):
            if tensor is not None and self.rank == source:
                head = [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
                self._end(dist.isend(torch.tensor(head + [0] * (2 + _DIMENSIONS - len(head))), 0, group=self._host))
                self._end(dist.isend(tensor.detach().cpu().contiguous(), 0, group=self._host))
                return None
            received = torch.empty(2 + _DIMENSIONS, dtype=torch.int64)
            self._end(dist.irecv(received, source, group=self._host))
            dtype, dimensions, *shape = received.tolist()
            content = torch.empty(shape[:dimensions], dtype=_DTYPES[dtype])
            self._end(dist.irecv(content, source, group=self._host))
        return content.to(self.device)

    def _end(self, work: Any) -> None:
        """Wait for a message; gloo's own patience with these is that of its beginning."""
        work.wait(self.patience)

    def agree(self, flags: int) -> int:
        """Hand in bits, and return those of all processes at the call before; nobody waits for an answer at once."""
        before = 0
        self._agreed += 1
        if self._agreed == _FIRST_CALLS:
            self._hasten()
        if self._asked is not None:
            votes, work = self._asked
            with self.named("agreed on what comes next"):
                work.wait()
            before = int(votes)
        votes = torch.tensor(flags)
        with self.named("agreed on what comes next"):
            self._asked = votes, dist.all_reduce(votes, dist.ReduceOp.BOR, group=self._votes, async_op=True)
        return before

    def barrier(self, what: str) -> None:
        """Wait for all processes."""
        with self.named(f"waited for {what}"):
            dist.all_reduce(torch.zeros(1), group=self._host)


def first_patience(timeout: float) -> timedelta:
    """Return how long processes wait for each other until they have made a step."""
    return timedelta(seconds=max(timeout, 600.0))


def join(device: torch.device, timeout: float = 300.0) -> ProcessGroup:
    """Return the processes that the environment speaks of, joined; alone if it speaks of none.

    Args:
        device: where this process computes.
        timeout: seconds that one waits for another once they train; before that it is ten minutes at least.

    Raises:
        RelayError: the others can't be found.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ProcessGroup(0, 1, device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            patience = first_patience(timeout)
            store, rank, size = meet(patience)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RelayError(
                f"process {os.environ.get('RANK')} of {size} can't meet the others at {where}: "
                f"{str(error).splitlines()[0]}; start all of them, or choose another port"
            ) from error
    return DistributedGroup(dist.get_rank(), size, device, timeout)
