"""Whether one recipe is better than another, from runs over seeds; or whether two networks differ on the same samples.

A difference of a few seeds is easily luck, so what is claimed has to pass two tests: Student's interval of the mean
difference, which is honest for few seeds, and the bootstrap over seeds, which assumes no distribution.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_DRAWS = 10_000
# Student's 97.5% quantiles with 1, 2, 3… degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """How much larger the second of two recipes' metric is, over seeds.

    Attributes:
        mean: the mean difference.
        half: half of its 95% interval, by Student's distribution; infinite for less than two seeds.
        low: the lower bound of the bootstrap's 95% interval.
        high: its upper bound.
        seeds: of each recipe; one number if they are paired.
        is_paired: whether both have the same seeds.
    """

    mean: float
    half: float
    low: float
    high: float
    seeds: tuple[int, ...]
    is_paired: bool

    @property
    def is_clear(self) -> bool:
        """Whether both intervals leave out 0."""
        outside = self.low > 0 or self.high < 0
        return outside and abs(self.mean) > self.half


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """Compare two recipes by a metric over seeds.

    Seeds that both have are compared in pairs: such runs have the same initial weights and order of the data, as far as
    their recipes allow it. Without a common seed, means are compared (Welch, "The Generalization of 'Student's' Problem
    when Several Different Population Variances are Involved", Biometrika 34, 1947).

    Args:
        one: the metric by the seed of each run.
        other: likewise of the second recipe.
    """
    common = sorted(one.keys() & other.keys())
    if common and len(common) == min(len(one), len(other)):
        pairs = np.array([other[seed] - one[seed] for seed in common])
        low, high = _bootstrap([pairs], lambda drawn: drawn[0])
        return Difference(float(pairs.mean()), _half([pairs]), low, high, (len(pairs),), True)
    samples = [np.array([*other.values()]), np.array([*one.values()])]
    low, high = _bootstrap(samples, lambda drawn: drawn[0] - drawn[1])
    mean = float(samples[0].mean() - samples[1].mean())
    return Difference(mean, _half(samples), low, high, (len(one), len(other)), False)


def _half(samples: Sequence[Floats]) -> float:
    """Return half of Student's 95% interval of a mean, or of the difference of two."""
    if any(len(each) < 2 for each in samples):
        return math.inf
    parts = [float(each.var(ddof=1)) / len(each) for each in samples]
    if not sum(parts):
        return 0.0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(each) - 1) for part, each in zip(parts, samples, strict=True))
    return student(int(freedom)) * math.sqrt(sum(parts))


def student(freedom: int) -> float:
    """Return the 97.5% quantile of Student's distribution with at least one degree of freedom, to three digits.

    Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), table 26.10 and formula 26.7.5.
    """
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _bootstrap(samples: Sequence[Floats], combine: Callable[[Sequence[Floats]], Floats]) -> tuple[float, float]:
    """Return the middle 95% of what is computed from the means of seeds that are drawn again, always the same ones.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.
    """
    generator = np.random.default_rng(0)
    means = [each[generator.integers(len(each), size=(_DRAWS, len(each)))].mean(1) for each in samples]
    low, high = np.percentile(combine(means), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class SameSamples:
    """Two networks on the same samples.

    Attributes:
        samples: all of them.
        only_one: those that only the first got right.
        only_other: those that only the second did.
        p: how likely at least such an imbalance is if both are equally good (McNemar's exact test).
    """

    samples: int
    only_one: int
    only_other: int
    p: float


def mcnemar(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> SameSamples:
    """Compare which samples two networks got right.

    McNemar, "Note on the Sampling Error of the Difference between Correlated Proportions or Percentages" (Psychometrika
    12, 1947), in its exact form.

    Args:
        one: (samples,) whether the first network got each right.
        other: (samples,) likewise the second.
    """
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    parted = only_one + only_other
    tail = sum(math.comb(parted, count) for count in range(min(only_one, only_other) + 1))
    return SameSamples(len(one), only_one, only_other, min(2 * tail / 2**parted, 1.0))
