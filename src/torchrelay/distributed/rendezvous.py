"""Step 4: the rendezvous: how the processes of one attempt find each other, through a store of torch.distributed.

torchrun and our launcher keep one store while they restart the processes, again and again. torch.distributed would read
in it the addresses of an earlier attempt's processes, which no longer exist. The number of the restart doesn't tell the
attempts apart, since it doesn't count hosts that come and go. So rank 0 gives each attempt a name.
"""

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

_PAUSE = 0.01  # seconds between rank 0's looks at who has come


def rendezvous(timeout: timedelta) -> tuple[Any, int, int]:
    """Return a store that the processes of this attempt share, this process's rank, and the world size.

    Args:
        timeout: how long to wait for the other processes.

    Raises:
        RuntimeError: the others didn't come.
        ValueError: the environment doesn't say where to find them.
    """
    store, rank, size = next(torch_rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        prefix_store: Callable[[str, Any], Any] = dist.PrefixStore  # type: ignore[attr-defined]
        store = prefix_store(name_attempt(prefix_store("torchrelay", store), rank, size, timeout), store)
    return store, rank, size


def name_attempt(store: Any, rank: int, size: int, timeout: timedelta) -> str:
    """Return a name that all processes of this attempt agree on, whatever earlier attempts have left in the store.

    Every other rank leaves a token. Rank 0 answers each token that it finds with the name. The processes of an earlier
    attempt don't read the answer; those that live confirm it.

    Raises:
        RuntimeError: some rank didn't confirm the name in time.
    """
    token = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", token)
        name: str = store.get(token).decode()
        store.set(f"{name}/{rank}", "")
        return name
    name, answered = token, dict[int, bytes]()
    missing, end = list(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]) and (theirs := store.get(f"here/{other}")) != answered.get(other):
                store.set(theirs.decode(), name)
                answered[other] = theirs
        missing = [other for other in missing if not store.check([f"{name}/{other}"])]
        if time.monotonic() > end:
            raise RuntimeError(f"process {missing[0]} has not come within {timeout.total_seconds():g} s")
        time.sleep(_PAUSE * bool(missing))
    return name
