"""Step 2: the order of samples: a keyed permutation that needs no table.

The sample at position i of an epoch is computed from (seed, epoch, i) alone, so starting in the middle of an epoch
costs nothing, and 10**12 samples need no more memory than 10**3. A Feistel network permutes the numbers below the next
power of two. A result beyond the data is permuted again until it falls inside ("cycle walking": Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002), which keeps it a permutation.
"""

import numpy as np
import numpy.typing as npt

from torchrelay.rng import seed_for

Positions = npt.NDArray[np.int64]  # (n,) positions in an epoch, or sample indices
_ROUNDS = 8  # pairs of half-rounds; four leave a pattern in the orders of five samples, six none that we found


def order(seed: int, epoch: int, positions: Positions, samples: int) -> Positions:
    """Return the index of the sample at each position of an epoch.

    Args:
        seed: the run's seed.
        epoch: counted from 0; each has its own permutation.
        positions: int64 of shape (n,), each in [0, samples).
        samples: the number of samples.

    Returns:
        int64 of shape (n,): sample indices; over all positions, each sample exactly once.
    """
    if samples < 2:
        return np.zeros_like(positions)
    bits = (samples - 1).bit_length()
    keys = np.random.Philox(key=seed_for(seed, "order", epoch)).random_raw(2 * _ROUNDS)
    values = _permute(positions.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(values >= samples)).size:
        values[outside] = _permute(values[outside], bits, keys)
    return values.astype(np.int64)


def _permute(values: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Permute [0, 2**bits): each half in turn is XORed with a keyed hash of the other."""
    low_bits = np.uint64(bits // 2)
    high_mask, low_mask = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1)
    high, low = values >> low_bits, values & low_mask
    for round_key_high, round_key_low in keys.reshape(-1, 2):
        high = high ^ (_hash(low ^ round_key_high) & high_mask)
        low = low ^ (_hash(high ^ round_key_low) & low_mask)
    return (high << low_bits) | low


def _hash(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64 bits: the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
