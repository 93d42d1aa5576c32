"""The t-interval and the binomial interval against the textbook's formulas."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from textbook import textbook_t_interval

from mpqlib.report.intervals import (
    correct_shares,
    correct_text,
    covariance_bound,
    image_count,
    image_covariance,
    t_bounds,
    t_interval,
    top1_interval,
)

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20)


@given(NUMBERS)
def test_t_interval_is_the_textbook_s(values):
    expected = textbook_t_interval(values)
    scale = max(map(abs, values))
    assert t_interval(values) == pytest.approx(expected, rel=1e-9, abs=1e-9 * scale + 1e-300)


def test_t_interval_of_two_values_by_hand():
    # mean 2, standard error 1, t(0.975, 1 degree of freedom) = 12.706
    assert t_interval([1.0, 3.0]) == pytest.approx((2, 2 - 12.7062, 2 + 12.7062), abs=1e-4)


def test_equal_values_have_an_interval_of_no_width():
    assert t_interval([0.1] * 3) == pytest.approx((0.1, 0.1, 0.1))


def test_bounds_of_a_single_value_are_unknown():
    mean, low, high = t_interval([3.0])
    assert mean == 3 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0, 2.0], [3.0, 4.0]]])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(ValueError, match="values="):
        t_interval(values)


def drawn(generator, seeds=5, images=200, by_seed=0.02, by_image=0.4, noise=0.3):
    """Differences (seeds, images) around zero, with three sources of chance."""
    found = generator.normal(0, by_seed, (seeds, 1)) + generator.normal(0, by_image, images)
    return found + generator.normal(0, noise, (seeds, images))


def anova_interval(differences):
    """Hillis's interval from the three mean squares of a table (seeds, images), in loops."""
    seeds, images = len(differences), len(differences[0])
    mean = math.fsum(map(math.fsum, differences)) / (seeds * images)
    rows = [math.fsum(row) / images for row in differences]
    columns = [math.fsum(column) / seeds for column in zip(*differences, strict=True)]
    by_seed = images * math.fsum((r - mean) ** 2 for r in rows) / (seeds - 1)
    by_image = seeds * math.fsum((c - mean) ** 2 for c in columns) / (images - 1)
    rest = math.fsum(
        (differences[s][i] - rows[s] - columns[i] + mean) ** 2
        for s in range(seeds)
        for i in range(images)
    ) / ((seeds - 1) * (images - 1))
    whole = by_seed + max(by_image - rest, 0)
    freedom = whole**2 / (by_seed**2 / (seeds - 1))
    half = student.ppf(0.975, freedom) * math.sqrt(whole / (seeds * images))
    return mean, mean - half, mean + half


@pytest.mark.parametrize("by_image", [0, 0.1, 1])
def test_interval_over_seeds_and_images_is_that_of_the_mean_squares(by_image):
    differences = drawn(np.random.default_rng(1), by_image=by_image)
    found = t_interval(differences.mean(1), image_covariance(differences))
    assert found == pytest.approx(anova_interval(differences.tolist()))


@pytest.mark.parametrize("tested", [200, 100])
def test_interval_over_seeds_and_images_covers_95_percent_and_that_over_seeds_does_not(tested):
    generator, covered = np.random.default_rng(0), {"seeds": 0, "both": 0}
    for _ in range(400):
        differences = drawn(generator, noise=0.2)
        for row in differences:
            row[generator.permutation(200)[tested:]] = np.nan  # each seed tests some of them
        means = np.nanmean(differences, 1)
        both = t_interval(means, image_covariance(differences))
        for name, interval in {"seeds": t_interval(means), "both": both}.items():
            covered[name] += interval.low <= 0 <= interval.high
    assert 0.92 <= covered["both"] / 400 <= 0.98
    assert covered["seeds"] / 400 < 0.88


def test_seeds_that_agree_have_the_interval_of_their_images():
    # The same differences in all seeds: the normal interval of one mean over images
    row = np.random.default_rng(0).normal(1, 1, 50)
    found = t_interval([row.mean()] * 3, image_covariance(np.stack([row] * 3)))
    half = 1.959964 * row.std(ddof=1) / 50**0.5
    assert found == pytest.approx((row.mean(), row.mean() - half, row.mean() + half))


def test_seeds_without_a_common_image_are_independent():
    differences = np.full((2, 6), np.nan)
    differences[0, :3], differences[1, 3:] = [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]
    assert image_covariance(differences) == 0


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.integers(2, 60))
def test_no_covariance_of_answers_exceeds_its_bound(seed, arm, base, images):
    generator = np.random.default_rng(seed)
    # All seeds agree, and an image is right in one arm alone wherever this is possible
    order = generator.permutation(images)
    rights = np.zeros((2, images))
    rights[0, order[: round(arm * images)]] = 1
    rights[1, order[::-1][: round(base * images)]] = 1
    differences = rights[0] - rights[1]
    largest = differences.var() / images
    bound = covariance_bound(*rights.mean(1), images)
    assert largest <= bound + 1e-12
    assert bound == pytest.approx(largest)  # so no smaller bound is right


def test_seaborn_draws_the_t_interval():
    rows = pd.DataFrame({"x": ["a"] * 3, "y": [1.0, 2.0, 4.0]})
    _, axis = plt.subplots()
    sns.pointplot(rows, x="x", y="y", errorbar=t_bounds, ax=axis)
    drawn = max(axis.lines, key=lambda line: np.ptp(line.get_ydata().astype(float)))
    assert (min(drawn.get_ydata()), max(drawn.get_ydata())) == pytest.approx(t_bounds(rows["y"]))
    plt.close()


def test_top1_interval_is_wilson_s():
    # p = 0.8, n = 50, z = 1.96: centre (p + z^2/2n) / (1 + z^2/n), the textbook's formula
    found = top1_interval(torch.tensor([True] * 40 + [False] * 10))
    z2 = 1.959964**2
    centre, half = (0.8 + z2 / 100) / (1 + z2 / 50), (z2 * (0.16 / 50 + z2 / 1e4)) ** 0.5
    assert found["top1"] == pytest.approx(80)
    assert found["top1_low"] == pytest.approx(100 * (centre - half / (1 + z2 / 50)), abs=1e-4)
    assert found["top1_high"] == pytest.approx(100 * (centre + half / (1 + z2 / 50)), abs=1e-4)


def test_top1_of_no_image_is_refused():
    with pytest.raises(ValueError, match="correct is empty"):
        top1_interval(torch.tensor([], dtype=torch.bool))


@given(st.integers(1, 20_000), st.floats(0, 1))
def test_the_number_of_images_follows_from_the_binomial_interval(images, share):
    correct = torch.arange(images) < round(share * images)
    assert image_count(
        **{k.replace("top1_", ""): v for k, v in top1_interval(correct).items()}
    ) == (images)


def test_answers_are_written_and_read_image_by_image():
    one, other = torch.tensor([True, False, True]), torch.tensor([True, False, False])
    assert correct_text(one) == "101"
    assert correct_text(one, torch.tensor([4, 0, 2])) == "0-1-1"
    shares = correct_shares([correct_text(c, [4, 0, 2]) for c in (one, other)])
    assert shares.tolist() == pytest.approx([0, math.nan, 0.5, math.nan, 1], nan_ok=True)
