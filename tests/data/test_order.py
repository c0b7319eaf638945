"""The order of samples: a permutation of each epoch, computed place by place."""

import tracemalloc

import numpy as np
import pytest

from torchrelay.data.order import order


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 16, 17, 100, 1797, 4096, 50_000])
def test_each_sample_stands_in_an_epoch_exactly_once(samples):
    found = order(3, 1, np.arange(samples), samples)
    assert np.array_equal(np.sort(found), np.arange(samples))


def test_a_place_is_computed_without_those_before_it():
    whole = order(0, 2, np.arange(1000), 1000)
    assert np.array_equal(order(0, 2, np.arange(700, 750), 1000), whole[700:750])
    assert order(0, 2, np.array([999]), 1000)[0] == whole[999]


def test_epochs_and_seeds_have_orders_of_their_own():
    places = np.arange(10_000)
    first = order(0, 0, places, 10_000)
    for other in (order(0, 1, places, 10_000), order(1, 0, places, 10_000)):
        assert abs((first == other).sum() - 1) < 8  # about one place in common, by chance
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.05


def test_an_order_is_written_down():
    """The numbers of the first release: a change of them would change every run."""
    assert order(0, 0, np.arange(8), 8).tolist() == [1, 0, 3, 4, 5, 2, 6, 7]
    assert order(7, 3, np.array([0, 10**11, 10**12 - 1]), 10**12).tolist() == [692522230711, 553978872022, 239000098406]


def test_every_sample_stands_at_every_place_equally_often():
    """Chi-square over (sample, place) of 20 samples in 4,000 epochs: 361 degrees of freedom, 5 deviations allowed."""
    counts = np.zeros((20, 20))
    for epoch in range(4000):
        counts[np.arange(20), order(5, epoch, np.arange(20), 20)] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert abs(chi_square - 361) < 5 * np.sqrt(2 * 361)


def test_neighbours_of_one_epoch_are_no_neighbours_in_the_next():
    samples = 4096
    first, second = (np.argsort(order(0, epoch, np.arange(samples), samples)) for epoch in (0, 1))
    stay = (np.abs(np.diff(first)) == 1) & (np.abs(np.diff(second)) == 1)
    assert stay.sum() < 10


@pytest.mark.parametrize("samples", [5, 97, *(pytest.param(size, marks=pytest.mark.slow) for size in (7, 16, 1000))])
def test_places_and_samples_go_together_evenly(samples):
    """Chi-square over (place, sample), both in up to 20 classes: six deviations allowed, for several sizes."""
    epochs, classes = 3000, min(samples, 20)
    places = np.arange(samples)
    counts = np.zeros((classes, classes))
    for epoch in range(epochs):
        np.add.at(counts, (places * classes // samples, order(11, epoch, places, samples) * classes // samples), 1)
    size = np.bincount(places * classes // samples)
    expected = epochs * np.outer(size, size) / samples
    freedom = (classes - 1) ** 2
    # Without replacement, the statistic has this mean: samples / (samples - 1) times the degrees of freedom.
    chi_square = ((counts - expected) ** 2 / expected).sum() * (samples - 1) / samples
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


def test_pairs_of_neighbours_are_as_common_as_any_other_pair():
    """Which sample follows which, over 4,000 epochs of 12 samples: 132 ordered pairs, each as often."""
    counts = np.zeros((12, 12))
    for epoch in range(4000):
        found = order(2, epoch, np.arange(12), 12)
        np.add.at(counts, (found[:-1], found[1:]), 1)
    expected = 4000 * 11 / 132
    chi_square = ((counts[~np.eye(12, dtype=bool)] - expected) ** 2 / expected).sum()
    assert abs(chi_square - 131) < 6 * np.sqrt(2 * 131)


def test_epochs_have_no_structure_in_common():
    """What stands at a place says nothing of what stands there in the next epoch, nor of how far it moved."""
    samples, epochs = 101, 2000
    orders = np.array([order(1, epoch, np.arange(samples), samples) for epoch in range(epochs)])
    moved = (orders[1:] - orders[:-1]) % samples
    counts = np.bincount(moved.ravel(), minlength=samples)
    expected = counts.sum() / samples
    assert abs(((counts - expected) ** 2 / expected).sum() - (samples - 1)) < 6 * np.sqrt(2 * (samples - 1))
    fixed = (orders[1:] == orders[:-1]).sum(1)
    assert abs(fixed.mean() - 1) < 6 / np.sqrt(epochs), "one sample stays by chance, on average"


def test_a_bad_order_would_be_noticed():
    """The tests above see the order that a shift of one fixed permutation gives."""
    base = order(0, 0, np.arange(20), 20)
    counts = np.zeros((20, 20))
    for epoch in range(3000):
        counts[np.arange(20), np.roll(base, epoch % 10)] += 1
    assert ((counts - 150) ** 2 / 150).sum() > 361 + 6 * np.sqrt(2 * 361)


def test_a_place_among_a_trillion_costs_no_table():
    tracemalloc.start()
    found = order(0, 0, np.arange(10**12 - 256, 10**12), 10**12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 256
    assert peak < 200_000
