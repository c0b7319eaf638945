"""Step 4: how processes find each other: by a store of PyTorch's, of which only this attempt's words may be read.

torchrun and our launcher keep one store while they start the processes again and again. PyTorch would then read there
where the processes of an earlier attempt, which are dead, could be reached; and the number of the restart doesn't tell
the attempts apart, since hosts come and go without counting it. So the first process gives each attempt a name.
"""

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_PAUSE = 0.01  # seconds between two looks of the first process at who has come


def meet(timeout: timedelta) -> tuple[Any, int, int]:
    """Return a store that all processes of this attempt share, this one's rank, and how many they are.

    Args:
        timeout: how long to wait for the others.

    Raises:
        RuntimeError: they can't be found.
        ValueError: the environment doesn't say where to look.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        own: Callable[[str, Any], Any] = dist.PrefixStore  # type: ignore[attr-defined]
        store = own(attempt(own("torchrelay", store), rank, size, timeout), store)
    return store, rank, size


def attempt(store: Any, rank: int, size: int, timeout: timedelta) -> str:
    """Return a name that all processes of this attempt have agreed on, whatever earlier ones have left in the store.

    Each of the others leaves a token. The first process answers every token that it finds with the name; those of the
    dead hear no answer, and only who lives confirms it.

    Raises:
        RuntimeError: not all of the others have come in time.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", own)
        name: str = store.get(own).decode()
        store.set(f"{name}/{rank}", "")
        return name
    answered: dict[int, bytes] = {}
    missing, end = list(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]) and (token := store.get(f"here/{other}")) != answered.get(other):
                store.set(token.decode(), own)
                answered[other] = token
        missing = [other for other in missing if not store.check([f"{own}/{other}"])]
        if time.monotonic() > end:
            raise RuntimeError(f"process {missing[0]} has not come within {timeout.total_seconds():g} s")
        time.sleep(_PAUSE * bool(missing))
    return own
