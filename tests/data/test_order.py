"""The order of samples: a permutation of each epoch, computed place by place."""

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
    """Chi-square over (sample, place) of 20 samples in 8,000 epochs: 361 degrees of freedom, 5 deviations allowed."""
    counts = np.zeros((20, 20))
    for epoch in range(8000):
        counts[np.arange(20), order(5, epoch, np.arange(20), 20)] += 1
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert abs(chi_square - 361) < 5 * np.sqrt(2 * 361)


def test_neighbours_of_one_epoch_are_no_neighbours_in_the_next():
    samples = 4096
    first, second = (np.argsort(order(0, epoch, np.arange(samples), samples)) for epoch in (0, 1))
    stay = (np.abs(np.diff(first)) == 1) & (np.abs(np.diff(second)) == 1)
    assert stay.sum() < 10
