"""Step 3: an exponential moving average of the weights, used for evaluation in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchrelay.errors import RelayError


class EMA:
    """The moving average of a model's parameters; buffers, such as BatchNorm's statistics, are the model's latest.

    After each optimizer step, average += (1 - d) · (weights - average) with d = min(decay, (1 + step) / (10 + step)).
    This warm-up, that of TensorFlow's ExponentialMovingAverage, lets the initial weights fade quickly. It
    depends on the step alone, so the average keeps no counter.

    Create it when the model is on its device with its initial weights. Half-precision weights would average
    badly (small changes round away); torchrelay keeps weights in float32 and lowers the precision by autocast.

    Args:
        model: the model whose weights are averaged.
        decay: in [0, 1), the factor of the previous average, such as 0.999.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = [value.detach().clone() for value in model.parameters()]
        self._buffers = [value.detach().clone() for value in model.buffers()]
        sources = [*model.parameters(), *model.buffers()]
        averages = dict(zip(map(id, sources), [*self._parameters, *self._buffers], strict=True))
        state = model.state_dict(keep_vars=True)
        self._by_name = {name: averages[id(value)] for name, value in state.items() if id(value) in averages}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights of `model` after optimizer step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._parameters, list(model.parameters()), 1 - decay)
        if self._buffers:
            torch._foreach_copy_(self._buffers, list(model.buffers()))

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Start again from the weights and buffers of `model`."""
        _copy([*self._parameters, *self._buffers], [*model.parameters(), *model.buffers()])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights and the buffers under the model's names, as its `load_state_dict` takes them."""
        return dict(self._by_name)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the averages.

        Raises:
            RelayError: names or shapes differ from the model's; nothing was loaded.
        """
        wrong = sorted(self._by_name.keys() ^ state.keys())
        wrong += [name for name, value in self._by_name.items() if name in state and state[name].shape != value.shape]
        if wrong:
            raise RelayError(f"the averaged weights are another model's: {len(wrong)} differ, such as '{wrong[0]}'")
        for name, value in self._by_name.items():
            value.copy_(state[name])

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Put the averages into `model` for the block, then restore its own weights bit for bit."""
        values = [*model.parameters(), *model.buffers()]
        saved = [value.detach().clone() for value in values]
        try:
            _copy(values, [*self._parameters, *self._buffers])
            yield
        finally:
            _copy(values, saved)


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    # One by one: torch._foreach_copy_ doesn't accept sharded tensors.
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
