"""Step 2: which samples an epoch has, and in which order: a function of (seed, epoch) and of the position."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from torchrelay.data.order import Positions, order
from torchrelay.data.sources import ArraySource, Source
from torchrelay.data.stream import StreamSource
from torchrelay.errors import RelayError, UsageError, nearest
from torchrelay.rng import words

OwnSampling = Callable[[int, int], Sequence[int] | Positions]  # from (seed, epoch) to the samples' indices
Sampling = Literal["shuffle", "balanced", "sequential"] | OwnSampling
_NAMES: tuple[str, ...] = get_args(get_args(Sampling)[0])
Sampler = Callable[[int, Positions], Positions]  # from (epoch, positions) to the samples' indices


class Own:
    """The samples that a function of the user's chooses for each epoch.

    Args:
        function: from (seed, epoch), the epoch counted from 0, to the indices of the epoch's samples; it has no state.
        seed: the run's seed.
        source: the samples.

    Attributes:
        samples: of an epoch.

    Raises:
        RelayError: the indices aren't those of samples.
    """

    def __init__(self, function: OwnSampling, seed: int, source: Source) -> None:
        self._function, self._seed, self._source = function, seed, source
        self._epoch, self._indices = 0, self._drawn(0)
        self.samples = len(self._indices)

    def __call__(self, epoch: int, positions: Positions) -> Positions:
        """Return the samples' indices."""
        if epoch != self._epoch:
            self._epoch, self._indices = epoch, self._drawn(epoch)
            if len(self._indices) != self.samples:
                raise RelayError(
                    f"sampling gives {len(self._indices):,} samples in epoch {epoch + 1}, and {self.samples:,} in the "
                    "first: return equally many for every epoch"
                )
        found: Positions = self._indices[positions]
        return found

    def _drawn(self, epoch: int) -> Positions:
        indices = np.asarray(self._function(self._seed, epoch))
        samples = len(self._source)
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not len(indices):
            raise RelayError(
                f"sampling gives {indices.dtype} of shape {indices.shape} for epoch {epoch + 1}: return the indices of "
                "its samples, in their order"
            )
        if indices.min() < 0 or indices.max() >= samples:
            raise RelayError(
                f"sampling gives {indices.min()} to {indices.max()} for epoch {epoch + 1}, and {self._source.name} has "
                f"the samples 0 to {samples - 1}: return indices of its samples"
            )
        return indices.astype(np.int64)


def sampler(source: Source, seed: int, sampling: Sampling) -> Sampler:
    """Return the function from (epoch, positions) to sample indices.

    Raises:
        UsageError: there is no such sampling, or a stream has another order.
        RelayError: there are no classes to balance.
    """
    _check(sampling)
    samples = len(source)
    if isinstance(source, StreamSource) and (sampling == "balanced" or callable(sampling)):
        raise UsageError(f"{source.name} is read in its own order: leave sampling out, and let it yield what is wanted")
    if callable(sampling):
        return Own(sampling, seed, source)
    if sampling == "sequential" or isinstance(source, StreamSource):
        return lambda _epoch, positions: positions
    if sampling == "shuffle":
        return lambda epoch, positions: order(seed, epoch, positions, samples)
    return _balanced(source, seed)


def _check(sampling: Any) -> None:
    """Refuse what is neither a name nor a function."""
    if callable(sampling) or sampling in _NAMES:
        return
    near = nearest(sampling, _NAMES) if isinstance(sampling, str) else ""
    what = repr(sampling) if isinstance(sampling, str) else f"of {type(sampling).__name__}"
    known = ", ".join(_NAMES)
    raise UsageError(
        f"sampling {what} is unknown{near or f'; known: {known}; or a function from (seed, epoch) to sample indices'}"
    )


def _balanced(source: Source, seed: int) -> Sampler:
    if not isinstance(source, ArraySource) or source.targets.ndim != 1 or source.targets.is_floating_point():
        raise RelayError("data.sampling 'balanced' needs one class per sample, held in memory: use 'shuffle'")
    targets = source.targets.numpy()
    members = np.argsort(targets, kind="stable")
    counts = np.bincount(targets)
    present = np.flatnonzero(counts)
    starts = np.cumsum(counts) - counts

    def balanced(epoch: int, positions: Positions) -> Positions:
        drawn = words(seed, "balanced", epoch, torch.from_numpy(positions), 2).numpy()
        chosen = present[drawn[:, 0] * len(present) >> 32]
        indices: Positions = members[starts[chosen] + (drawn[:, 1] * counts[chosen] >> 32)]
        return indices

    return balanced
