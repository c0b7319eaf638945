"""The order of samples: a permutation per epoch, computed position by position."""

import tracemalloc

import numpy as np
import pytest

from torchrelay.data.order import order


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 16, 17, 100, 1797, 4096, 50_000])
def test_an_epoch_contains_each_sample_exactly_once(samples):
    found = order(3, 1, np.arange(samples), samples)
    assert np.array_equal(np.sort(found), np.arange(samples))


def test_each_position_is_computed_independently():
    whole = order(0, 2, np.arange(1000), 1000)
    assert np.array_equal(order(0, 2, np.arange(700, 750), 1000), whole[700:750])
    assert order(0, 2, np.array([999]), 1000)[0] == whole[999]


def test_each_epoch_and_seed_has_its_own_order():
    positions = np.arange(10_000)
    first = order(0, 0, positions, 10_000)
    for other in (order(0, 1, positions, 10_000), order(1, 0, positions, 10_000)):
        assert abs((first == other).sum() - 1) < 8  # about one position in common by chance
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.05


def test_the_order_equals_recorded_numbers():
    """The numbers of the first release; changing them would change every run."""
    assert order(0, 0, np.arange(8), 8).tolist() == [1, 0, 3, 4, 5, 2, 6, 7]
    assert order(7, 3, np.array([0, 10**11, 10**12 - 1]), 10**12).tolist() == [692522230711, 553978872022, 239000098406]


def test_every_sample_is_at_every_position_equally_often():
    """Chi-square over (sample, position) of 20 samples in 1,200 epochs: 361 degrees of freedom, up to 5 deviations."""
    counts = np.zeros((20, 20))
    for epoch in range(1200):
        counts[np.arange(20), order(5, epoch, np.arange(20), 20)] += 1
    chi_square = ((counts - 60) ** 2 / 60).sum()
    assert abs(chi_square - 361) < 5 * np.sqrt(2 * 361)


def test_neighbors_in_one_epoch_are_not_neighbors_in_the_next():
    samples = 4096
    first, second = (np.argsort(order(0, epoch, np.arange(samples), samples)) for epoch in (0, 1))
    stay = (np.abs(np.diff(first)) == 1) & (np.abs(np.diff(second)) == 1)
    assert stay.sum() < 10


@pytest.mark.parametrize("samples", [5, 97, *(pytest.param(size, marks=pytest.mark.slow) for size in (7, 16, 1000))])
def test_positions_and_samples_are_independent(samples):
    """Chi-square over (position, sample), both in up to 20 classes: six deviations allowed, for several sizes."""
    epochs, classes = 1000, min(samples, 20)
    positions = np.arange(samples)
    counts = np.zeros((classes, classes))
    for epoch in range(epochs):
        np.add.at(
            counts, (positions * classes // samples, order(11, epoch, positions, samples) * classes // samples), 1
        )
    size = np.bincount(positions * classes // samples)
    expected = epochs * np.outer(size, size) / samples
    freedom = (classes - 1) ** 2
    # Without replacement, the statistic has this mean: samples / (samples - 1) times the degrees of freedom.
    chi_square = ((counts - expected) ** 2 / expected).sum() * (samples - 1) / samples
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


def test_all_pairs_of_neighbors_are_equally_common():
    """Pairs of consecutive samples over 1,200 epochs of 12 samples: 132 ordered pairs, equally frequent."""
    counts = np.zeros((12, 12))
    for epoch in range(1200):
        found = order(2, epoch, np.arange(12), 12)
        np.add.at(counts, (found[:-1], found[1:]), 1)
    expected = 1200 * 11 / 132
    chi_square = ((counts[~np.eye(12, dtype=bool)] - expected) ** 2 / expected).sum()
    assert abs(chi_square - 131) < 6 * np.sqrt(2 * 131)


def test_orders_of_different_epochs_are_independent():
    """The sample at a position predicts neither the next epoch's sample there nor how far it moves."""
    samples, epochs = 101, 700
    orders = np.array([order(1, epoch, np.arange(samples), samples) for epoch in range(epochs)])
    moved = (orders[1:] - orders[:-1]) % samples
    counts = np.bincount(moved.ravel(), minlength=samples)
    expected = counts.sum() / samples
    assert abs(((counts - expected) ** 2 / expected).sum() - (samples - 1)) < 6 * np.sqrt(2 * (samples - 1))
    fixed = (orders[1:] == orders[:-1]).sum(1)
    assert abs(fixed.mean() - 1) < 6 / np.sqrt(epochs), "one sample stays by chance, on average"


def test_the_statistics_detect_a_bad_order():
    """The tests above detect an order that only shifts one fixed permutation."""
    base = order(0, 0, np.arange(20), 20)
    counts = np.zeros((20, 20))
    for epoch in range(3000):
        counts[np.arange(20), np.roll(base, epoch % 10)] += 1
    assert ((counts - 150) ** 2 / 150).sum() > 361 + 6 * np.sqrt(2 * 361)


def test_a_position_among_a_trillion_needs_no_table():
    tracemalloc.start()
    found = order(0, 0, np.arange(10**12 - 256, 10**12), 10**12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 256
    assert peak < 200_000
