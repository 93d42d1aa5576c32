"""95% confidence intervals: of a mean (Student's t) and of an accuracy (Wilson).

Networks of several seeds that are tested on the same images share the luck of these images. Their
results are correlated, and an interval over seeds alone is too narrow. `t_interval` takes the
covariance of two seeds: `image_covariance` measures it, `covariance_bound` bounds it.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm, sem, t
from torch import Tensor


class Interval(NamedTuple):
    """A mean and the bounds of its 95% interval."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float], covariance: float = 0.0) -> Interval:
    """Mean of `values` with its 95% t-interval; the bounds of a single value are NaN.

    `covariance`: of any two values, 0 or less if they are independent. The variance of the mean is
    s^2 / n + covariance, where s^2 is the variance of the values. The degrees of freedom grow with
    the known part, the covariance. Raises ValueError if there is no value, or if one is NaN.
    Source: Student's t, scipy; with a covariance, Hillis (Statistics in Medicine 2007, 26:596-619),
    whose readers are our seeds.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise ValueError(f"values={values.tolist()} are not allowed: at least one, none NaN")
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, float("nan"), float("nan"))
    shared, own = max(float(covariance), 0.0), float(sem(values)) ** 2
    freedom = (len(values) - 1) * ((own + shared) / own) ** 2 if own else inf
    half = float(t.ppf(0.975, freedom)) * (own + shared) ** 0.5
    return Interval(mean, mean - half, mean + half)


def image_covariance(differences: np.ndarray) -> float:
    """Covariance of the means of two seeds that comes from their shared images, of all pairs' mean.

    `differences`: of two arms, (seeds, images) with 2 or more seeds; NaN where a seed does not test
    an image. For two seeds, it is the covariance over the images that both test, times their
    number, over the product of the numbers that each tests. Source: Obuchowski and Rockette
    (Communications in Statistics 1995, 24:285-308); seeds may test different images, which is ours.
    """
    tested = ~np.isnan(differences)
    counts = tested.sum(1)
    centred = differences - np.nanmean(differences, axis=1, keepdims=True)
    centred = np.where(tested, centred, 0.0)
    pairs = centred @ centred.T / np.outer(counts, counts - 1)
    seeds = len(differences)
    return float((pairs.sum() - np.trace(pairs)) / (seeds * (seeds - 1)))


def covariance_bound(arm: float, base: float, images: int) -> float:
    """Largest covariance of two seeds' differences in top-1 that `images` shared images allow.

    `arm`, `base`: mean top-1 of both arms, from 0 to 1. An image counts -1, 0 or 1 in the
    difference; it is not 0 for at most min(arm + base, 2 - arm - base) of the images, so its
    variance is at most this less (arm - base)^2. No covariance is larger than the variance.
    """
    return (min(arm + base, 2 - arm - base) - (arm - base) ** 2) / images


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


def image_count(top1: float, low: float, high: float) -> int:
    """Number of images of a `top1_interval`, from its three numbers in %.

    Wilson's bounds b solve n (b - p)^2 = z^2 b (1 - b); the bound farther from p is taken.
    """
    p, bound = top1 / 100, (low if top1 > 50 else high) / 100
    return round(norm.ppf(0.975) ** 2 * bound * (1 - bound) / (bound - p) ** 2)


def correct_text(correct: Tensor, places: Sequence[int] | None = None) -> str:
    """One character for each image: 1 classified correctly, 0 not, - not tested.

    `correct`: bool (N,). `places`: place in the text of each of the N images; None: in their order.
    """
    digits = [str(int(right)) for right in correct]
    places = range(len(digits)) if places is None else places
    found = dict(zip(map(int, places), digits, strict=True))
    return "".join(found.get(place, "-") for place in range(max(found) + 1))


def correct_shares(texts: Sequence[str]) -> np.ndarray:
    """Share of `texts` in which each image is classified correctly, (images,); NaN: not tested.

    `texts`: as `correct_text` writes them, of the same images in the same places.
    """
    values = {"0": 0.0, "1": 1.0, "-": np.nan}
    return np.array([[values[character] for character in text] for text in texts]).mean(0)
