"""Intervals: published values, coverage, and the bounds at 0 and 1."""

import numpy as np
import pytest

from torchrelay.report.export.intervals import bootstrap, wilson


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.883, 1),
    ],
)
def test_wilson_gives_the_published_intervals(correct, samples, low, high):
    assert wilson(correct, samples) == pytest.approx((low, high), abs=5e-5)


def test_the_bootstrap_is_as_wide_as_the_normal_interval_of_a_mean_and_the_same_each_time():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    low, high = bootstrap(values, np.ones(2000))
    half = 1.96 * values.std() / 2000**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 8)
    assert bootstrap(values, np.ones(2000)) == (low, high)


def test_the_bootstrap_weighs_samples_by_what_they_count():
    sums, weights = np.array([10.0, 0.0] * 500), np.array([10.0, 1.0] * 500)
    low, high = bootstrap(sums, weights)
    assert low < 10 / 11 < high < 0.95
