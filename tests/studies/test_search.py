"""The studies of 04_search on a tiny network."""

import itertools
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import images

from mpqlib.network.cost import bitops, bitops_at
from mpqlib.report.plots import COLOURS
from mpqlib.search.error import batch_error
from mpqlib.search.greedy import greedy
from mpqlib.search.sensitivity import measure_sensitivity
from mpqlib.studies.search import (
    VARIANTS,
    compare_rules,
    compare_speed,
    literal_error,
    measure_front,
    sensitivity_plot,
    time_front,
)


def test_rows_of_a_study_hold_every_arm_at_every_level(supernet):
    splits = SimpleNamespace(calibration=images(32), search=images(16, 1), test=images(16, 2))
    x, y = images(32, seed=2).tensors
    levels, error = [3, 3.5], batch_error(supernet, x, y)
    rows = measure_front(supernet, error, levels, splits, {}, 0, torch.device("cpu"), 32)
    searched = [row for row in rows if row["arm"] != "uniform"]
    expected = set(itertools.product(["assignment", "greedy", "random", "evolution"], levels))
    assert {(row["arm"], row["level"]) for row in searched} == expected
    places = sum(len(choices) > 1 for pair in supernet.candidates.values() for choices in pair)
    for row in searched:
        assert row["arm"] != "assignment" or row["evaluations"] <= 2 * (1 + places) + 1
    for level in levels:
        others = [r for r in searched if r["level"] == level and r["arm"] != "assignment"]
        assert len({row["evaluations"] for row in others}) == 1
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
    assert [row["arm"] for row in rows] == ["fast", "literal", "assignment"]
    for row in rows:
        assert row["judged"] > 0
        assert row["passes"] > row["steps"] > 0


def test_a_whole_front_takes_one_table_and_a_pass_for_each_level(supernet):
    x, y = images(16, seed=3).tensors
    places = sum(len(choices) > 1 for pair in supernet.candidates.values() for choices in pair)
    configs, costs = time_front(supernet, x, y, levels := [2.5, 3, 3.5])
    assert costs["passes"] <= 2 * (1 + places) + len(levels)
    for level, config in zip(levels, configs, strict=True):
        assert bitops(supernet.table, config) <= bitops_at(supernet.table, level)


@pytest.mark.parametrize("pairs", ["none", "layers"])
def test_sensitivity_plot_shows_every_change_in_the_colour_of_its_bits(supernet, pairs):
    table = measure_sensitivity(supernet, batch_error(supernet, *images(8).tensors), pairs=pairs)
    figure = sensitivity_plot(table)
    for axis, part in zip(figure.axes, ("weight", "act"), strict=True):
        rows = table.to_frame().query("bits != base_bits")
        rows = rows[rows["part"] == part]
        rows = rows[rows["other_layer"].isna()] if pairs != "none" else rows
        shown = {(line.get_color(), v) for line in axis.lines[:-1] for v in line.get_ydata()}
        assert shown == {(COLOURS[r.bits], r.change) for r in rows.itertuples()}
    plt.close(figure)
