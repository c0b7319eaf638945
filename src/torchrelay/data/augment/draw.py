"""A batch's randomness: what a transform may draw from, and nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrelay import rng

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Draw:
    """Numbers that belong to the samples of a batch, not to the batch: each is a pure function of its names.

    The numbers are made on the CPU, which knows the places without asking the device, and moved to it: one small copy
    is faster than the generator's 160 kernels on a GPU, and nothing waits for it.
    """

    seed: int
    epoch: int
    positions: Tensor  # (batch,) int64 on the CPU: each sample's place in the epoch
    indices: Tensor  # (batch,) int64 on the CPU: which sample of the source it is
    stream: str  # what the numbers are for, such as "augment.0.flip"; a transform has one to itself
    device: torch.device = _CPU

    def uniform(self, draws: int = 1, *, cpu: bool = False) -> Tensor:
        """Return float32 (batch, draws) in [0, 1), by place in the epoch, on the device or on the CPU.

        A second call returns the same numbers: a transform draws once, as many as it needs.
        `(number * n).long()` is below n for every n up to 2**24: the largest number is 1 - 2**-24.
        """
        return self._uniform(self.stream, self.epoch, self.positions, draws, cpu)

    def by_sample(self, draws: int = 1, *, cpu: bool = False) -> Tensor:
        """Return the like by sample: the same numbers in every epoch."""
        return self._uniform(f"{self.stream}.by_sample", 0, self.indices, draws, cpu)

    def _uniform(self, stream: str, epoch: int, index: Tensor, draws: int, cpu: bool) -> Tensor:
        numbers = rng.uniform(self.seed, stream, epoch, index, draws)
        return numbers if cpu else numbers.to(self.device, non_blocking=True)
