"""Statistics written from the textbook's formulas, one number at a time."""

import math
from collections.abc import Sequence

from scipy.stats import t


def textbook_t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of at least two values with the bounds of its 95% t-interval."""
    n = len(values)
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = t.ppf(0.975, n - 1) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half
