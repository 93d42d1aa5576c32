"""The studies of 04_search on a tiny network."""

import itertools
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import images

from mpqlib.network.bits import BitConfig
from mpqlib.network.cost import bitops, bitops_at
from mpqlib.report.plots import COLOURS
from mpqlib.search.baselines import restrict
from mpqlib.search.error import batch_error
from mpqlib.search.greedy import greedy
from mpqlib.search.sensitivity import measure_sensitivity
from mpqlib.studies.search import (
    VARIANTS,
    compare_rules,
    compare_speed,
    front_plot,
    literal_error,
    measure_front,
    measure_regret,
    sensitivity_plot,
    slider,
    time_front,
    time_searches,
)

ARMS = ["assignment", "greedy", "paper", "random", "evolution"]


def measure_rows(supernet, levels, **some):
    splits = SimpleNamespace(train=images(32), search=images(16, 1), test=images(16, 2))
    on = dict(device=torch.device("cpu"), recalibration_images=32)
    x, y = images(32, seed=2).tensors
    return measure_front(supernet, x, y, 16, levels, splits, {}, 0, **some, **on)


@pytest.fixture
def front_rows(supernet):
    return measure_rows(supernet, [3, 3.5], top1=[3.5])


def test_every_arm_searches_at_every_level(front_rows):
    searched = [(row["arm"], row["level"]) for row in front_rows if row["arm"] != "uniform"]
    assert sorted(searched) == sorted(itertools.product(ARMS, [3, 3.5]))


def test_arms_find_the_same_with_and_without_the_others(supernet, front_rows):
    some = measure_rows(supernet, [3], arms=["random", "paper"], top1=[])
    assert [row["arm"] for row in some] == ["paper", "random"]
    at = {(row["arm"], row["level"]): (row["bits"], row["evaluations"]) for row in front_rows}
    for row in some:
        assert at[row["arm"], 3] == (row["bits"], row["evaluations"])


def test_random_and_evolution_evaluate_as_often_as_greedy(supernet, front_rows):
    places = sum(len(choices) > 1 for pair in supernet.candidates.values() for choices in pair)
    counts = {(row["arm"], row["level"]): row["evaluations"] for row in front_rows}
    assert counts["random", 3] == counts["evolution", 3] == counts["greedy", 3]
    assert counts["assignment", 3] == counts["assignment", 3.5] <= 2 * (1 + places) + 2


def test_rows_of_the_front_keep_their_budgets_and_are_judged_on_other_images(supernet, front_rows):
    x, y = images(32, seed=2).tensors
    error, judge = batch_error(supernet, x[:16], y[:16]), batch_error(supernet, x[16:], y[16:])
    for row in front_rows:
        config = BitConfig.from_json(row["bits"])
        assert row["error"] == pytest.approx(error(config), rel=1e-6)
        assert row["judged"] == pytest.approx(judge(config), rel=1e-6)
        assert row["bitops_g"] == bitops(supernet.table, config) / 1e9
        assert row["bitops_g"] <= row["budget_g"] or row["arm"] == "uniform"
        assert ("top1" in row) == (row["level"] == 3.5 or row["arm"] == "uniform")


def test_no_search_is_better_than_the_optimum(supernet):
    small = restrict(supernet, layers=1, bits=[3, 4], rest=3)
    rows = measure_regret(small, batch_error(small, *images(16).tensors), [3.2, 4], {}, 0)
    assert {(row["arm"], row["level"]) for row in rows} == set(itertools.product(ARMS, [3.2, 4]))
    assert all(row["regret"] >= 0 and row["of"] == 4 for row in rows)


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
    *searches, whole = compare_speed(supernet, x, y, 12, [3], [2.5, 3])
    searches += time_searches(supernet, x, y, 12, [3], "literal")
    assert [row["arm"] for row in searches] == ["greedy", "literal"]
    for row in searches:
        assert row["judged"] > 0
        assert row["passes"] > row["steps"] > 0
    assert (whole["arm"], whole["budgets"]) == ("front", 2)


def test_a_whole_front_takes_one_table_and_a_pass_for_each_level(supernet):
    x, y = images(16, seed=3).tensors
    places = sum(len(choices) > 1 for pair in supernet.candidates.values() for choices in pair)
    configs, costs = time_front(supernet, x, y, levels := [2.5, 3, 3.5])
    assert costs["passes"] <= 2 * (1 + places) + len(levels)
    for level, config in zip(levels, configs, strict=True):
        assert bitops(supernet.table, config) <= bitops_at(supernet.table, level)


def test_front_plot_leaves_out_rows_that_were_not_measured():
    rows = pd.DataFrame({"arm": ["greedy"] * 2, "seed": 0, "budget_g": [1.0, 2.0]})
    figure = front_plot(rows.assign(top1=[50.0, float("nan")]), "top1", "top-1 (%)")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [50.0]
    plt.close(figure)


def test_slider_holds_each_figure_and_shows_the_first():
    figures = {f"{text} G": plt.figure() for text in (1, 2, 3)}
    page = slider(figures, "budget")
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<figure hidden>") == 2 and "<figure><figcaption>budget: 1 G" in page
    assert 'max="2"' in page
    plt.close("all")


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
