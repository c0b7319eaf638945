"""The random numbers of a batch: all that a transform may draw from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrelay import rng

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Draw:
    """Random numbers that belong to the samples of a batch, not to the batch: pure functions of the fields below.

    They are drawn on the CPU, which knows the positions without synchronizing, and moved to the device: one small copy
    is faster than the generator's 160 kernels on a GPU, and nothing waits for it.
    """

    seed: int
    epoch: int
    positions: Tensor  # (batch,) int64 on the CPU: each sample's position in the epoch
    indices: Tensor  # (batch,) int64 on the CPU: each sample's index in the source
    stream: str  # the purpose of the numbers, such as "augment.0.flip"; each transform has a stream of its own
    device: torch.device = _CPU

    def uniform(self, draws: int = 1, *, cpu: bool = False) -> Tensor:
        """Return float32 (batch, draws) in [0, 1) by (epoch, position), on the device or on the CPU.

        A second call returns the same numbers, so a transform draws all that it needs in one call.
        `(number * n).long()` is below n for every n up to 2**24, as the largest number is 1 - 2**-24.
        """
        return self._uniform(self.stream, self.epoch, self.positions, draws, cpu)

    def by_sample(self, draws: int = 1, *, cpu: bool = False) -> Tensor:
        """Return float32 (batch, draws) in [0, 1) by sample index: the same numbers in every epoch."""
        return self._uniform(f"{self.stream}.by_sample", 0, self.indices, draws, cpu)

    def _uniform(self, stream: str, epoch: int, index: Tensor, draws: int, cpu: bool) -> Tensor:
        numbers = rng.uniform(self.seed, stream, epoch, index, draws)
        return numbers if cpu else numbers.to(self.device, non_blocking=True)
