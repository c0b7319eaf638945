"""How sure a metric is that was measured on so many samples: 95% confidence intervals."""

import math

import numpy as np
import numpy.typing as npt

_Z = 1.959963984540054  # the normal distribution's 97.5% quantile
RESAMPLES = 1000
_BLOCK = 2**22  # random indices that are drawn at once

Floats = npt.NDArray[np.float64]


def wilson(correct: int, samples: int) -> tuple[float, float]:
    """Return the interval of a share of independent samples: Wilson's score interval.

    It holds for shares near 0 and 1 and for few samples as well, where the usual normal approximation leaves [0, 1].
    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (JASA 22, 1927).

    Args:
        correct: samples that count.
        samples: all of them, at least 1.
    """
    share, weight = correct / samples, _Z**2 / samples
    middle = share + weight / 2
    half = _Z * math.sqrt(share * (1 - share) / samples + weight / (4 * samples))
    low, high = (middle - half) / (1 + weight), (middle + half) / (1 + weight)
    # The bounds are exactly 0 and 1 there, which rounding misses.
    return (0.0 if correct == 0 else low), (1.0 if correct == samples else high)


def bootstrap(sums: Floats, weights: Floats, seed: int = 0) -> tuple[float, float]:
    """Return the interval of a weighted mean, sum(sums) / sum(weights): the percentile bootstrap over samples.

    The samples are drawn again with replacement, 1,000 times; the interval holds the middle 95% of the means. Efron and
    Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.

    Args:
        sums: (samples,) what each sample contributes.
        weights: (samples,) what it is divided by, such as the number of its tokens.
        seed: of the draws.
    """
    generator, count = np.random.default_rng(seed), len(sums)
    means: list[Floats] = []
    for start in range(0, RESAMPLES, step := max(_BLOCK // count, 1)):
        drawn = generator.integers(count, size=(min(step, RESAMPLES - start), count))
        means.append(sums[drawn].sum(1) / weights[drawn].sum(1))
    low, high = np.nanpercentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
