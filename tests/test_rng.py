"""Named randomness: published test vectors, and numbers that depend only on their names."""

import numpy as np
import pytest
import torch
from scipy import stats

from torchrelay import rng

POSITIONS = torch.arange(100_000)
# The known answers that Random123 publishes for philox4x32-10: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
@pytest.mark.parametrize("kind", ["tensors", "arrays"])
def test_philox_gives_the_published_words(counter, key, words, kind):
    make = torch.tensor if kind == "tensors" else np.array
    found = rng.philox4x32(tuple(make([word]) for word in _numbers(counter)), tuple(_numbers(key)))
    assert [int(word[0]) for word in found] == _numbers(words)


def test_tensors_and_arrays_give_the_same_words():
    generator = np.random.default_rng(0)
    counter = tuple(generator.integers(0, 2**32, 1000) for _ in range(4))
    key = (0x12345678, 0x9ABCDEF0)
    arrays = rng.philox4x32(counter, key)
    tensors = rng.philox4x32(tuple(torch.from_numpy(word) for word in counter), key)
    assert all(np.array_equal(a, t.numpy()) for a, t in zip(arrays, tensors, strict=True))


def test_words_are_philox_at_the_counter_of_position_epoch_and_block():
    position, epoch = 2**40 + 5, 3
    expected = [
        int(word[0])
        for block in range(2)
        for word in rng.philox4x32(
            tuple(torch.tensor([word]) for word in (5, 2**8, epoch, block)), rng.key(7, "augment.0.flip")
        )
    ]
    assert rng.words(7, "augment.0.flip", epoch, torch.tensor([position]), 8).tolist() == [expected]


def test_the_numbers_of_a_position_do_not_depend_on_other_positions():
    together = rng.words(1, "a", 2, POSITIONS[:50], 6)
    assert torch.equal(rng.words(1, "a", 2, POSITIONS[20:30], 6), together[20:30])
    assert torch.equal(rng.words(1, "a", 2, POSITIONS[:50], 3), together[:, :3])


@pytest.mark.parametrize("draws", [1, 4, 5])
def test_numbers_are_uniform(draws):
    numbers = rng.uniform(0, "uniformity", 0, POSITIONS, draws)
    assert numbers.dtype == torch.float32
    assert numbers.shape == (len(POSITIONS), draws)
    assert 0 <= float(numbers.min()) <= float(numbers.max()) < 1
    for column in numbers.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3


def test_numbers_keep_24_bits_of_the_word():
    words = rng.words(0, "bits", 0, POSITIONS[:1000])
    assert torch.equal(rng.uniform(0, "bits", 0, POSITIONS[:1000]).double() * 2**24, (words // 256).double())


@pytest.mark.parametrize(
    "other",
    [(1, "flip", 0), (0, "crop", 0), (0, "flip", 1)],
    ids=["another seed", "another stream", "another epoch"],
)
def test_different_streams_give_independent_numbers(other):
    one = rng.uniform(0, "flip", 0, POSITIONS)[:, 0].numpy()
    two = rng.uniform(*other, POSITIONS)[:, 0].numpy()
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / len(POSITIONS) ** 0.5


def test_neighboring_positions_and_draws_are_uncorrelated():
    numbers = rng.uniform(0, "neighbours", 0, POSITIONS, 5).numpy()
    limit = 5 / len(POSITIONS) ** 0.5
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < limit
    assert np.abs(np.corrcoef(numbers.T) - np.eye(5)).max() < limit


def test_seeds_are_63_bits_and_differ_by_position():
    seeds = {rng.seed_for(0, "dropout", step, replica) for step in range(100) for replica in range(4)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61


def test_seeds_of_steps_are_63_bits_and_differ_by_seed_stream_step_and_replica():
    seeds = [
        rng.step_seed(seed, stream, step, replica)
        for seed in (0, 1)
        for stream in ("model", "other")
        for step in (*range(300), 10**9)
        for replica in range(3)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert rng.step_seed(1, "model", 299, 2) == rng.step_seed(1, "model", 299, 2)


def test_reseeding_repeats_what_pytorch_draws():
    rng.reseed(5, torch.device("cpu"))
    first = torch.rand(4)
    rng.reseed(5, torch.device("cpu"))
    assert torch.equal(torch.rand(4), first)


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_words():
    assert torch.equal(rng.words(3, "a", 4, POSITIONS.cuda(), 6).cpu(), rng.words(3, "a", 4, POSITIONS, 6))
