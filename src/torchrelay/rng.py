"""Randomness with names instead of state.

Every random number of a run is `uniform(seed, stream, epoch, index, draw)`: a pure function of its purpose. So a
checkpoint holds no random state, a resume replays nothing, and the result doesn't depend on the worker or the device.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): it
passes BigCrush, has published test vectors, and needs only 32-bit products, which int64 computes on any device.
On the CPU the same lines run on NumPy arrays: 160 operations on some hundred numbers cost a fifth of those on tensors.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LOW = 0xFFFFFFFF  # the low 32 bits: an int64 holds one unsigned word of the generator
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85  # golden ratio and sqrt(3) - 1: the steps of the key schedule
_ROUNDS = 10
_SEEDS_PER_BLOCK = 256  # steps whose seeds are computed together
Words = TypeVar("Words", Tensor, npt.NDArray[np.int64])


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Encrypt counters with Philox4x32-10.

    Args:
        counter: four int64 tensors or arrays whose shapes broadcast, each word in [0, 2**32).
        key: two words in [0, 2**32).

    Returns:
        Four int64 tensors or arrays of the common shape: the random words, each in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps into the sign bit; an arithmetic shift and a mask still yield its high word.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = ((product_1 >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((product_0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product_1 & _LOW, product_0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


@lru_cache(maxsize=1024)
def key(seed: int, stream: str) -> tuple[int, int]:
    """Return the generator's key for a stream: 64 bits of BLAKE2b over the seed and the stream's name."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def words(seed: int, stream: str, epoch: int, index: Tensor, draws: int = 1) -> Tensor:
    """Return random 32-bit words.

    Args:
        seed: the run's seed.
        stream: the purpose of the numbers, such as ``"augment.0.flip"``; streams are independent of each other.
        epoch: the epoch or the step, below 2**32.
        index: int64 of shape (n,), each sample's position in the epoch, on any device.
        draws: the number of words per sample.

    Returns:
        int64 of shape (n, draws), each in [0, 2**32), on `index`'s device.
    """
    blocks, clock = (draws + 3) // 4, epoch & _LOW
    if index.device.type == "cpu":
        positions = index.numpy()[:, None]
        time_word = np.array([[clock]], dtype=np.int64)
        counter = (positions & _LOW, positions >> 32 & _LOW, time_word, np.arange(blocks)[None])
        encrypted = np.stack(philox4x32(counter, key(seed, stream)), axis=-1)  # (n, blocks, 4)
        return torch.from_numpy(encrypted.reshape(len(index), 4 * blocks)[:, :draws])
    high, low = (index >> 32 & _LOW)[:, None], (index & _LOW)[:, None]
    time = torch.full((1, 1), clock, dtype=torch.int64, device=index.device)
    block = torch.arange(blocks, device=index.device)[None]
    return torch.stack(philox4x32((low, high, time, block), key(seed, stream)), dim=-1).flatten(1)[:, :draws]


def uniform(seed: int, stream: str, epoch: int, index: Tensor, draws: int = 1) -> Tensor:
    """Return float32 numbers in [0, 1) of shape (n, draws): the upper 24 bits of `words`, exact on every device."""
    return (words(seed, stream, epoch, index, draws) >> 8).to(torch.float32) * 2.0**-24


def seed_for(seed: int, stream: str, *position: int) -> int:
    """Return a 63-bit seed for a stateful generator, such as PyTorch's own, at a position in the run."""
    name = "/".join(map(str, (seed, stream, *position)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def step_seed(seed: int, stream: str, step: int, replica: int) -> int:
    """Return a 63-bit seed for a stateful generator, at a step of a replica."""
    return _step_seeds(seed, f"{stream}.{replica}", step // _SEEDS_PER_BLOCK)[step % _SEEDS_PER_BLOCK]


@lru_cache(maxsize=64)
def _step_seeds(seed: int, stream: str, block: int) -> list[int]:
    """Compute the seeds of many steps together: one alone would cost as much."""
    drawn = words(seed, stream, block, torch.arange(_SEEDS_PER_BLOCK), 2)
    seeds: list[int] = ((drawn[:, 0] << 31) | (drawn[:, 1] >> 1)).tolist()
    return seeds


def reseed(seed: int, device: torch.device) -> None:
    """Reseed PyTorch's own generators on the CPU and on `device`, from which dropout, for example, draws.

    `torch.manual_seed` visits every device and costs a hundred times as much as reseeding these directly.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def reseed_everything(seed: int) -> None:
    """Reseed the global generators of PyTorch, NumPy and Python, from which a user's transforms may draw."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & _LOW)
    random.seed(seed)


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Leave the global generators of PyTorch, NumPy and Python as they were, whatever draws from them meanwhile."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
