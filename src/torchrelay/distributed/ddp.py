"""Step 4: `parallel.kind = "ddp"` in a run that isn't exact: PyTorch's DistributedDataParallel."""

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
from torchrelay.distributed.strategy import OneCall, Strategy
from torchrelay.errors import RelayError

# Newer releases of PyTorch deprecate the second name.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class DDP(Strategy):
    """Runs a model's replicas in DistributedDataParallel, which sums gradients in the backend's order.

    Args:
        model: the model, already on its device.
        group: the process group.
        dummy_loss: runs this strategy on a dummy batch and returns its loss, for a process without samples.
        forward: what computes the outputs, such as the compiled model; the model itself if not given.
    """

    group: DistributedGroup

    def __init__(
        self,
        model: nn.Module,
        group: DistributedGroup,
        dummy_loss: Callable[[], Tensor] | None,
        *,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, group, exact=False, forward=forward)
        self._dummy_loss = dummy_loss
        self._forward_done = False
        self._wrapped = DistributedDataParallel(
            forward if isinstance(forward, nn.Module) else model,
            device_ids=[group.device] if group.device.type == "cuda" else None,
            process_group=group.gradient_group,
            gradient_as_bucket_view=True,
            **{_SYNC_BUFFERS: False},  # type: ignore[arg-type]  # `reduce` does it
        )
        self._wrapped.register_comm_hook(group.gradient_group, _sum)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return the model's outputs."""
        self._forward_done = True
        if not self.model.training:
            return super().__call__(*inputs, **named)
        return self._wrapped(*inputs, **named)

    @property
    def module(self) -> Any:
        """The model, called as a whole: DistributedDataParallel sees nothing else."""
        return OneCall(self, "ddp")

    @contextmanager
    def no_sync(self, tree: GradientTree) -> Iterator[None]:  # noqa: ARG002 - gradients accumulate in `.grad`
        """Enclose a replica's passes, whose gradients accumulate in `.grad`."""
        with self._wrapped.no_sync(), _explain_unused():
            yield

    @contextmanager
    def sync(self, tree: GradientTree) -> Iterator[None]:  # noqa: ARG002 - gradients accumulate in `.grad`
        """Enclose the last replica's passes; after it and `reduce`, `.grad` holds the sum over all replicas.

        Raises:
            RelayError: a parameter was not used, or another process ended.
        """
        self._forward_done = False
        with self.group.explain_failure("added gradients"), _explain_unused():
            yield
            if not self._forward_done and self._dummy_loss is not None:  # no samples: contribute zeros
                (0.0 * self._dummy_loss()).backward()  # type: ignore[no-untyped-call]


def _sum(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """All-reduce a bucket without averaging: the loss was divided by the weight of the whole batch."""
    future = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    sums: torch.futures.Future[Tensor] = future.then(lambda done: done.value()[0])
    return sums


@contextmanager
def _explain_unused() -> Iterator[None]:
    """Say what to do about an unused parameter, which DistributedDataParallel reports at the next forward pass."""
    try:
        yield
    except RuntimeError as error:
        if "finished reduction" not in str(error):
            raise
        raise RelayError(
            "a parameter of the model was not used in a step, for which DistributedDataParallel waits: keep the run "
            "exact, which supports unused parameters, or freeze the parameter"
        ) from error
