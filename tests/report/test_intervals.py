"""The t-interval and the binomial interval against the textbook's formulas."""

import math

import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from hypothesis import given
from hypothesis import strategies as st
from textbook import textbook_t_interval

from mpqlib.report.intervals import t_bounds, t_interval, top1_interval

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


def test_seaborn_draws_the_t_interval():
    rows = pd.DataFrame({"x": ["a"] * 3, "y": [1.0, 2.0, 4.0]})
    axis = sns.pointplot(rows, x="x", y="y", errorbar=t_bounds)
    drawn = max(axis.lines, key=lambda line: np.ptp(line.get_ydata().astype(float)))
    assert (min(drawn.get_ydata()), max(drawn.get_ydata())) == pytest.approx(t_bounds(rows["y"]))


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
