"""The studies of 04_search on a tiny network."""

import itertools
from types import SimpleNamespace

import torch
from conftest import images

from mpqlib.network.cost import bitops_at
from mpqlib.search.error import batch_error
from mpqlib.search.greedy import greedy
from mpqlib.studies.search import (
    VARIANTS,
    compare_rules,
    compare_speed,
    literal_error,
    measure_front,
)


def test_rows_of_a_study_hold_every_arm_at_every_level(supernet):
    splits = SimpleNamespace(calibration=images(32), search=images(16, 1), test=images(16, 2))
    x, y = images(32, seed=2).tensors
    levels, error = [3, 3.5], batch_error(supernet, x, y)
    rows = measure_front(supernet, error, levels, splits, {}, 0, torch.device("cpu"), 32)
    searched = [row for row in rows if row["arm"] != "uniform"]
    expected = set(itertools.product(["greedy", "random", "evolution"], levels))
    assert {(row["arm"], row["level"]) for row in searched} == expected
    for row in searched:
        assert row["bitops_g"] * 1e9 <= bitops_at(supernet.table, row["level"])


def test_every_variant_of_the_rule_is_judged_on_images_that_no_search_has_seen(supernet):
    x, y = images(32, seed=2).tensors
    rows = compare_rules(supernet, x, y, 16, 1, [3, 3.5], VARIANTS)
    assert [(r["arm"], r["level"]) for r in rows] == list(itertools.product(VARIANTS, [3, 3.5]))
    budget = bitops_at(supernet.table, 3.5)
    error = batch_error(supernet, x[:16], y[:16])
    found = greedy(supernet, error, budget, rule="paper")[-1].config
    assert rows[1]["judged"] == batch_error(supernet, x[16:], y[16:])(found)


def test_literal_search_scores_alike_and_counts_what_it_asks(supernet):
    x, y = images(16, seed=3).tensors
    config = supernet.uniform(3)
    assert literal_error(supernet, x, y)(config) == batch_error(supernet, x, y)(config)
    rows = compare_speed(supernet, x, y, 12, [3])
    assert [row["arm"] for row in rows] == ["fast", "literal"]
    for row in rows:
        assert row["judged"] > 0
        assert row["passes"] > row["steps"] > 0
