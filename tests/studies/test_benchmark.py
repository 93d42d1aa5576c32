"""What the benchmark derives from times, and what it counts."""

import pytest
import torch
from torch import nn

from mpqlib.studies.benchmark import exponent, parts_of_step, ratios, saved_bytes, summary


def test_exponent_is_the_power_of_a_power_law():
    assert exponent([2, 3, 7], [5 * n**1.7 for n in (2, 3, 7)]) == pytest.approx(1.7)


def test_saved_bytes_counts_each_activation_once_and_no_parameter():
    x = torch.randn(10, 4)  # the linear keeps x; the product keeps y, twice the same

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x):
            y = self.linear(x)
            return (y * y).sum()

    assert saved_bytes(Squares(), x) == 4 * (10 * 4 + 10 * 6)


def test_ratios_are_of_repeated_calls_after_a_warm_up():
    calls = []
    found = ratios(lambda: calls.append("task"), lambda: calls.append("base"), 3)
    assert len(found) == 3 and calls.count("task") == calls.count("base") == 5
    assert summary([3, 1, 2]) == {"median": 2, "least": 1, "most": 3, "n": 3}


def test_parts_of_a_step_add_up():
    shares = parts_of_step("test_resnet", size=32, batch=4)
    assert sum(shares.values()) == pytest.approx(100)
    assert all(share > 0 for share in shares.values())
