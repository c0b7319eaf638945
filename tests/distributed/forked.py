"""Several processes, forked from one that has imported PyTorch; and what a forked process needs."""

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable


def preload() -> None:
    """Import what a training imports later, which would take seconds in each process."""
    import tensorboard.compat.proto.summary_pb2
    import torch._inductor
    import torch.distributed.fsdp
    import torch.utils.tensorboard

    torch.use_deterministic_algorithms(True)  # so that what it imports is imported
    torch.use_deterministic_algorithms(False)
    assert tensorboard


def forget(*libraries: str) -> None:
    """Let this process import these libraries anew, as if it had not imported them."""
    for name in [*sys.modules]:
        if any(name == each or name.startswith(f"{each}.") for each in libraries):
            parent, _, own = name.rpartition(".")
            if parent in sys.modules:  # a parent may be forgotten already
                vars(sys.modules[parent]).pop(own, None)
            del sys.modules[name]


def fork(size: int, run: Callable[[int], None]) -> None:
    """Run `run(rank)` in `size` processes, and exit if one of them fails."""
    preload()
    started = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            code = 1
            faulthandler.enable()  # a crash of PyTorch's own tells its place
            try:
                run(rank)
                code = 0
            except BaseException:  # noqa: BLE001 - a test's child must not go on
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        started.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]
    if any(codes):
        sys.exit(f"of {size} processes, the exit codes were {codes}")
