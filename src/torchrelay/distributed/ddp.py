"""Step 4: PyTorch's DistributedDataParallel, for runs that aren't exact: gradients are added in the backend's order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchrelay.distributed.process_group import DistributedGroup
from torchrelay.distributed.replicas import GradientTree
from torchrelay.distributed.single import Strategy
from torchrelay.errors import RelayError

# By its name in this PyTorch: the older one is deprecated.
_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class DDP(Strategy):
    """Runs a model's replicas in DistributedDataParallel, which adds their gradients bucket by bucket.

    Args:
        model: whose gradients are added.
        group: the processes.
        dummy_loss: goes through this object with any samples and returns their loss: for a process without samples.
        forward: the model, or the same compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        group: DistributedGroup,
        dummy_loss: Callable[[], Tensor] | None,
        *,
        forward: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(model, group, exact=False, forward=forward)
        self._several, self._dummy_loss = group, dummy_loss
        self._went_forward = False
        self._wrapped = DistributedDataParallel(
            forward if isinstance(forward, nn.Module) else model,
            device_ids=[group.device] if group.device.type == "cuda" else None,
            process_group=group.exchanges,
            gradient_as_bucket_view=True,
            **{_SYNC: False},  # type: ignore[arg-type]  # of buffers: `reduce` does it
        )
        self._wrapped.register_comm_hook(group.exchanges, _sum)

    def __call__(self, inputs: Any) -> Any:
        """Return the model's outputs."""
        self._went_forward = True
        if not self.model.training:
            return super().__call__(inputs)
        return self._wrapped(inputs)

    @contextmanager
    def no_sync(self, tree: GradientTree) -> Iterator[None]:  # noqa: ARG002 - gradients add up where they are
        """A context for a replica's passes, whose gradients are added to those of this process."""
        with self._wrapped.no_sync(), _explained():  # which DistributedDataParallel says at the next passes
            yield

    @contextmanager
    def sync(self, tree: GradientTree) -> Iterator[None]:  # noqa: ARG002 - gradients add up where they are
        """A context for the last replica's passes; after it, and `reduce`, gradients are the sums of all replicas'.

        Raises:
            RelayError: a parameter was not used, or another process ended.
        """
        self._went_forward = False
        with self._several.named("added gradients"), _explained():
            yield
            if (
                not self._went_forward and self._dummy_loss is not None
            ):  # no samples: the others wait for zeros all the same
                (0.0 * self._dummy_loss()).backward()  # type: ignore[no-untyped-call]


def _sum(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Add a bucket, undivided: the loss was divided by the weight of the whole batch."""
    future = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    sums: torch.futures.Future[Tensor] = future.then(lambda done: done.value()[0])
    return sums


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "finished reduction" not in str(error):
            raise
        raise RelayError(
            "a parameter of the model was not used in a step, for which DistributedDataParallel waits: keep the run "
            "exact, which can do that, or freeze what isn't used"
        ) from error
