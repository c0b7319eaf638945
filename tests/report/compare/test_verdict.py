"""A verdict finds a difference that there is, and seldom one that there isn't."""

import numpy as np
import pytest

from torchrelay.report.compare.verdict import difference, mcnemar, student


def test_students_quantiles_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 40), 100, 1000):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-3)


def test_mcnemars_p_is_that_of_the_exact_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for share in (0.5, 0.6, 0.95):
        one, other = generator.random(2000) < 0.9, generator.random(2000) < 0.9 * share
        found = mcnemar(one, other)
        assert found.only_one == (one & ~other).sum()
        parted = found.only_one + found.only_other
        assert found.p == pytest.approx(stats.binomtest(found.only_one, parted).pvalue, rel=1e-6)
    assert mcnemar(one, one).p == 1.0


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("is_paired", [True, False])
def test_equal_recipes_are_told_apart_in_less_than_one_of_twenty_cases(seeds, is_paired):
    generator = np.random.default_rng(seeds)
    trials, clear = 600, 0
    for _ in range(trials):
        drawn = generator.normal(0.9, 0.01, (2, seeds)).tolist()
        first = 0 if is_paired else 100
        clear += difference(dict(enumerate(drawn[0])), dict(enumerate(drawn[1], first))).is_clear
    assert clear / trials < 0.07  # where 0.05 is meant, 49 of 50 such counts are below


@pytest.mark.parametrize("is_paired", [True, False])
def test_recipes_that_differ_are_told_apart_with_five_seeds(is_paired):
    generator = np.random.default_rng(0)
    one, other = generator.normal(0.90, 0.002, 5).tolist(), generator.normal(0.92, 0.002, 5).tolist()
    found = difference(dict(enumerate(one)), dict(enumerate(other, 0 if is_paired else 9)))
    assert found.is_clear
    assert found.is_paired == is_paired
    assert found.mean == pytest.approx(0.02, abs=0.003)
    assert found.low <= found.mean <= found.high


def test_pairs_see_a_small_difference_beside_a_large_spread_of_seeds():
    values = {0: 0.7, 1: 0.8, 2: 0.9, 3: 0.6}
    better = {seed: value + 0.01 + 0.0001 * seed for seed, value in values.items()}
    assert difference(values, better).is_clear
    assert not difference(values, {seed + 10: value for seed, value in better.items()}).is_clear


def test_a_seed_each_says_nothing():
    found = difference({0: 0.5}, {0: 0.9})
    assert found.half == float("inf")
    assert not found.is_clear


def test_seeds_that_all_gain_the_same_are_clear():
    assert difference({0: 0.5, 1: 0.25}, {0: 0.75, 1: 0.5}).is_clear
    assert not difference({0: 0.5, 1: 0.25}, {0: 0.5, 1: 0.25}).is_clear
