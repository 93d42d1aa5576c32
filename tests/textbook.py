"""Statistics written from the textbook's formulas, one number at a time."""

import math
from collections.abc import Mapping, Sequence

from scipy.stats import t


def textbook_t_interval(
    values: Sequence[float], covariance: float = 0.0
) -> tuple[float, float, float]:
    """Mean of at least two values with the bounds of its 95% t-interval.

    `covariance`: of any two values; then by Hillis, see `mpqlib.report.intervals.t_interval`.
    """
    n = len(values)
    mean = math.fsum(values) / n
    alone = math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n
    whole = alone + max(covariance, 0)
    freedom = (n - 1) * (whole / alone) ** 2 if alone else math.inf
    half = t.ppf(0.975, freedom) * math.sqrt(whole)
    return mean, mean - half, mean + half


def textbook_image_covariance(differences: Sequence[Mapping[int, float]]) -> float:
    """Mean covariance of two seeds' means. `differences`: of each seed, by image that it tests."""
    means = [math.fsum(seed.values()) / len(seed) for seed in differences]
    found = []
    for i, one in enumerate(differences):
        for j, other in enumerate(differences[:i]):
            products = [(one[k] - means[i]) * (other[k] - means[j]) for k in one if k in other]
            found.append(math.fsum(products) / (len(one) * (len(other) - 1)))
    return math.fsum(found) / len(found)


def textbook_wilson(share: float, n: int) -> tuple[float, float]:
    """Bounds of Wilson's 95% interval of a share of n."""
    z2 = 1.959963984540054**2
    centre = share + z2 / (2 * n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
