"""95% confidence intervals: of a mean (Student's t) and of an accuracy (Wilson)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, sem, t
from torch import Tensor


class Interval(NamedTuple):
    """A mean and the bounds of its 95% interval."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of `values` with its 95% t-interval; the bounds of a single value are NaN.

    Raises ValueError if there is no value, or if one is NaN. Source: Student's t, scipy.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise ValueError(f"values={values.tolist()} are not allowed: at least one, none NaN")
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(t.ppf(0.975, len(values) - 1) * sem(values))
    return Interval(mean, mean - half, mean + half)


def t_bounds(values: Sequence[float]) -> tuple[float, float]:
    """Low and high end of `t_interval`, as seaborn's `errorbar=t_bounds` expects them."""
    return t_interval(values)[1:]


def top1_interval(correct: Tensor) -> dict[str, float]:
    """Top-1 in % with its 95% binomial interval: keys `top1`, `top1_low`, `top1_high`.

    `correct`: which images were classified correctly, bool (N,). Raises ValueError if it is empty.
    Source: Wilson's score interval, scipy.
    """
    hits, n = int(correct.sum()), len(correct)
    if n == 0:
        raise ValueError("correct is empty: there is no image to take a top-1 of")
    low, high = binomtest(hits, n).proportion_ci(0.95, "wilson")
    percent = {"top1": hits / n, "top1_low": low, "top1_high": high}
    return {name: float(100 * share) for name, share in percent.items()}
