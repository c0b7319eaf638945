"""Step 4: the process group: the processes that train together, and what they send each other.

One process alone needs no store, no rendezvous and no socket: `ProcessGroup`'s methods return what they are given.
Several processes use torch.distributed, configured by the environment that torchrun or our own launcher sets. They send
tensors only, never pickles.
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

from torchrelay.device import private
from torchrelay.distributed.rendezvous import rendezvous
from torchrelay.errors import RelayError

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
_GRACE = 3.0  # seconds within which processes that wait for the same one report that they wait
_FIRST_CALLS = 3  # of `agree`, after which a step has been taken
_DIMENSIONS = 8  # at most, of a tensor that `send_to_main` sends


class ProcessGroup:
    """The processes that train together; this class is for one process alone.

    Args:
        rank: of this process.
        size: the world size.
        device: where this process computes.

    Attributes:
        main: whether this is rank 0, which writes the run folder and has the terminal.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.main = rank == 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))

    def gather(self, values: Tensor) -> Tensor:
        """Return (size, …) the values of all processes by rank; their shapes and dtypes must be the same."""
        return values[None]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy rank 0's values into the tensors of all processes."""

    def broadcast_bytes(self, content: bytes | None) -> bytes:
        """Return rank 0's bytes; what the other processes pass is ignored."""
        return content or b""

    def send_to_main(self, tensor: Tensor | None, source: int) -> Tensor | None:  # noqa: ARG002
        """Send the tensor of rank `source`, of any shape, to rank 0, which gets it; the others get None."""
        return tensor

    def agree(self, flags: int) -> int:
        """Pass bits, and return the bits that any process passed at the previous call; one process alone: its own."""
        return flags

    def barrier(self, what: str) -> None:
        """Wait until all processes have called this."""


class DistributedGroup(ProcessGroup):
    """Several processes, connected by torch.distributed.

    Args:
        rank: of this process.
        size: the world size.
        device: where this process computes.
        timeout: seconds to wait for another process's message, once the first steps are done.

    Attributes:
        timeout: how long a process waits for a message at present.
        gradient_group: the torch process group for gradients, which are sent while the backward pass runs.
        lost: whether another process failed or timed out, after which nothing waits for it.
    """

    def __init__(self, rank: int, size: int, device: torch.device, timeout: float) -> None:
        super().__init__(rank, size, device)
        self.lost = False
        self._step_timeout = timedelta(seconds=timeout)
        self.timeout = first_timeout(timeout)
        self._groups: list[Any] = [dist.group.WORLD]
        self._calls = 0  # of `agree`
        self._cpu_group = self.new_group("gloo")
        self._flags_group = self.new_group("gloo")  # a group of its own, so that nothing else waits for the flags
        self.gradient_group = self.new_group()
        self._pending: tuple[Tensor, Any] | None = None  # flags, and the all-reduce of them
        atexit.register(self._destroy)

    def _destroy(self) -> None:
        """Destroy the groups before the interpreter exits, which gloo's threads would otherwise abort."""
        if dist.is_initialized() and not self.lost:
            self._groups.clear()
            self._cpu_group = self._flags_group = self.gradient_group = self._pending = None
            dist.destroy_process_group()

    def new_group(self, backend: str | None = None, ranks: Sequence[int] | None = None) -> Any:
        """Return a torch process group of some or all processes, whose messages don't wait for other groups'."""
        group = dist.new_group(None if ranks is None else list(ranks), backend=backend, timeout=self.timeout)
        self._groups += [] if group is dist.GroupMember.NON_GROUP_MEMBER else [group]
        return group

    def _shorten_timeout(self) -> None:
        """Wait less from now on: what makes the first step slow, such as compiling, is done."""
        self.timeout = self._step_timeout
        for group in self._groups:
            private.set_timeout(self.timeout, group)

    def _group_of(self, tensor: Tensor) -> Any:
        return self._cpu_group if tensor.device.type == "cpu" else dist.group.WORLD

    @contextmanager
    def explain_failure(self, what: str) -> Iterator[None]:
        """Say which communication failed, and where to look.

        Args:
            what: what this process did, in the past tense.

        Raises:
            RelayError: another process ended, or timed out.
        """
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            text = str(error).lower()
            if "timed out" in text or "timeout" in text:
                raise RelayError(self._explain_timeout(what)) from error
            raise RelayError(
                f"process {self.rank} of {self.size} lost another process while it {what}: look for the first error in "
                "the logs of the others, then resume the run"
            ) from error

    def _explain_timeout(self, what: str) -> str:
        """Name the processes that didn't come: those that don't report within a while that they wait, too."""
        waited = f"process {self.rank} of {self.size} {what} and waited {self.timeout.total_seconds():g} s"
        missing = self._missing_ranks(what)
        if missing is None:
            return (
                f"{waited}, and can't reach the store of process 0 either: this host may be cut off from the network; "
                "resume the run when it is back"
            )
        if not missing:
            return f"{waited} for the others, which waited, too: check the network between them, then resume the run"
        if len(missing) == 1:
            names, verbs, logs = f"process {missing[0]}", "hangs or needs", "its log"
        else:
            names, verbs, logs = f"processes {', '.join(map(str, missing))}", "hang or need", "their logs"
        return f"{waited} for {names}, which {verbs} longer than parallel.timeout: see {logs}, then resume the run"

    def _missing_ranks(self, what: str) -> list[int] | None:
        """Return the ranks that don't report that they wait, too; None if the store can't be reached."""
        answers: list[list[int]] = []

        def ask() -> None:  # in a thread: a store never gives up on a dead network
            with suppress(RuntimeError):
                store = dist.PrefixStore("late", private.default_store())  # type: ignore[attr-defined]
                store.set(str(self.rank), what)
                time.sleep(_GRACE)
                answers.append([r for r in range(self.size) if r != self.rank and not store.check([str(r)])])

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(3 * _GRACE)
        return answers[0] if answers else None

    def gather(self, values: Tensor) -> Tensor:
        """Return (size, …) the values of all processes by rank."""
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        with self.explain_failure("gathered values"):
            dist.all_gather(gathered, values.contiguous(), group=self._group_of(values))
        return torch.stack(gathered)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy rank 0's values into the tensors of all processes, in one message per dtype and device."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            kinds[tensor.dtype, tensor.device].append(tensor)
        for parts in kinds.values():
            flat = torch.cat([part.detach().reshape(-1) for part in parts])
            with self.explain_failure("broadcast tensors"):
                dist.broadcast(flat, 0, group=self._group_of(flat))
            if not self.main:
                for part, content in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
                    part.detach().copy_(content.view(part.shape))

    def broadcast_bytes(self, content: bytes | None) -> bytes:
        """Return rank 0's bytes."""
        values = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)
        size = torch.tensor([len(content or b"")])
        with self.explain_failure("broadcast text"):
            dist.broadcast(size, 0, group=self._cpu_group)
            values = values[: int(size)] if self.main else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(values, 0, group=self._cpu_group)
        return values.numpy().tobytes()

    def send_to_main(self, tensor: Tensor | None, source: int) -> Tensor | None:
        """Send a tensor to rank 0, after a header with its dtype and shape."""
        if self.rank not in (0, source):
            return None
        if source == 0:
            return tensor
        with self.explain_failure("shared an evaluation"):
            if tensor is not None and self.rank == source:
                header = [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
                header += [0] * (2 + _DIMENSIONS - len(header))
                self._wait(dist.isend(torch.tensor(header), 0, group=self._cpu_group))
                self._wait(dist.isend(tensor.detach().cpu().contiguous(), 0, group=self._cpu_group))
                return None
            received = torch.empty(2 + _DIMENSIONS, dtype=torch.int64)
            self._wait(dist.irecv(received, source, group=self._cpu_group))
            dtype, dimensions, *shape = received.tolist()
            content = torch.empty(shape[:dimensions], dtype=_DTYPES[dtype])
            self._wait(dist.irecv(content, source, group=self._cpu_group))
        return content.to(self.device)

    def _wait(self, work: Any) -> None:
        """Wait for a message; by default gloo would wait as long as when the group was created."""
        work.wait(self.timeout)

    def agree(self, flags: int) -> int:
        """Pass bits, and return those of all processes at the previous call, which have usually arrived by now."""
        previous = 0
        self._calls += 1
        if self._calls == _FIRST_CALLS:
            self._shorten_timeout()
        with self.explain_failure("agreed on what comes next"):
            if self._pending is not None:
                bits, work = self._pending
                work.wait()
                previous = int(bits)
            bits = torch.tensor(flags)
            self._pending = bits, dist.all_reduce(bits, dist.ReduceOp.BOR, group=self._flags_group, async_op=True)
        return previous

    def barrier(self, what: str) -> None:
        """Wait until all processes have called this."""
        with self.explain_failure(f"waited for {what}"):
            dist.all_reduce(torch.zeros(1), group=self._cpu_group)


def first_timeout(timeout: float) -> timedelta:
    """Return how long processes wait for each other until they have taken a step."""
    return timedelta(seconds=max(timeout, 600.0))


def init_process_group(device: torch.device, timeout: float = 300.0) -> ProcessGroup:
    """Return the process group that the environment describes; one process alone if it describes none.

    Args:
        device: where this process computes.
        timeout: seconds to wait for another process once training runs; until then at least ten minutes.

    Raises:
        RelayError: the other processes can't be reached.
    """
    joined = dist.is_available() and dist.is_initialized()  # by the caller's own script
    size = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ProcessGroup(0, 1, device)
    if not joined:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            first = first_timeout(timeout)
            store, rank, size = rendezvous(first)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=first)
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RelayError(
                f"process {os.environ.get('RANK')} of {size} can't meet the others at {address}: "
                f"{str(error).splitlines()[0]}; start all of them, or choose another port"
            ) from error
    return DistributedGroup(dist.get_rank(), size, device, timeout)
