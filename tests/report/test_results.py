"""The table of results on the first page."""

import pandas as pd
import pytest

from mpqlib.report.results import searched_beside_uniform


def front(seed, greedy, uniform):
    """Made-up rows: a search with the budget of level 3, and uniform bits by cost and top-1."""
    rows = [
        dict(arm="greedy", level=3, budget_g=2.0, bitops_g=1.9, search_top1=0, top1=greedy),
        dict(arm="greedy", level=4, budget_g=4.0, bitops_g=3.9, search_top1=0, top1=0),
    ]
    for cost, search_top1, top1 in uniform:
        rows.append(
            dict(arm="uniform", level=cost, budget_g=cost, bitops_g=cost)
            | dict(search_top1=search_top1, top1=top1)
        )
    return pd.DataFrame(rows).assign(seed=seed)


def test_uniform_bits_are_chosen_on_the_search_split_within_the_budget():
    # On the test split the second one is better, on the search split the first; the third costs
    # more than the budget.
    uniform = [(1.0, 60, 50.0), (2.0, 55, 70.0), (3.0, 99, 99.0)]
    rows = pd.concat([front(0, 52.0, uniform), front(1, 54.0, uniform)])
    found = searched_beside_uniform(rows, 3)
    assert found["searched"].tolist() == [52.0, 54.0]
    assert found["uniform"].tolist() == [50.0, 50.0]
    assert found["budget_g"].tolist() == [2.0, 2.0]


def test_a_budget_below_all_uniform_bits_has_no_comparison():
    with pytest.raises(ValueError):
        searched_beside_uniform(front(0, 52.0, [(3.0, 60, 50.0)]), 3)
