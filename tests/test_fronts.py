"""Search baselines against what must hold of them, and against every configuration there is."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import images
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import SMALL_STANDS, STANDS, Stand, made_up_error

from mpqlib import batch_error, bitops, bitops_at, greedy, largest, smallest
from mpqlib.fronts import (
    evolution,
    exhaustive,
    fitted,
    front,
    random_search,
    regrets,
    restricted,
)
from mpqlib.moves import moves
from mpqlib.rules import VARIANTS, judged, literal_error, side_by_side
from mpqlib.supernet import sample


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(STANDS, st.integers(0, 999), st.floats(0, 1))
def test_fitted_uses_the_budget_up(layers, seed, share):
    stand = Stand(*zip(*layers, strict=True))
    ends = [bitops(stand.table, end(stand.candidates)) for end in (smallest, largest)]
    budget = ends[0] + share * (ends[1] - ends[0])
    config = fitted(stand, sample(stand.candidates, seeded(seed)), budget, seeded(seed))
    assert bitops(stand.table, config) <= budget
    for move in moves(config, stand.candidates, ("weight", "act")):
        assert move.after < move.before or bitops(stand.table, move.of(config)) > budget


@settings(max_examples=20, deadline=None)
@given(SMALL_STANDS, st.integers(0, 999), st.floats(0, 1))
def test_exhaustive_is_every_configuration_and_nothing_beats_it(layers, seed, share):
    stand, error = Stand(*zip(*layers, strict=True)), made_up_error(seed)
    everything = exhaustive(stand, error)
    assert everything == {config: error(config) for config in stand.every()}
    ends = [bitops(stand.table, end(stand.candidates)) for end in (smallest, largest)]
    rows = regrets(stand, error, [3, 4], {}, seed) if ends[0] <= bitops_at(stand.table, 3) else []
    for row in rows:
        assert row["regret"] >= 0 and row["of"] == len(everything)


@pytest.mark.parametrize("search", [random_search, evolution])
def test_searches_keep_the_budget_and_the_number_of_evaluations(search):
    stand, error, calls = Stand((5, 20, 10, 7), [((2, 3, 4, 5, 6),) * 2] * 4), made_up_error(0), []
    budget = bitops_at(stand.table, 3.5)
    found = [
        search(stand, lambda c: calls.append(c) or error(c), budget, 60, seeded(seed))
        for seed in (0, 0, 1)
    ]
    assert len(calls) == 180 and len(set(calls[:60])) == 60
    assert found[0] == found[1] != found[2]
    for step in found:
        assert step.bitops == bitops(stand.table, step.config) <= budget
        assert step.error == error(step.config)
    assert found[0].error == min(map(error, calls[:60]))


def test_evolution_beats_random_search_on_average():
    gains = []
    for seed in range(8):
        stand, error = Stand(range(5, 14), [((2, 3, 4, 5, 6),) * 2] * 9), made_up_error(seed)
        budget, errors = bitops_at(stand.table, 3), []
        for search in (random_search, evolution):
            errors.append(search(stand, error, budget, 120, seeded(seed)).error)
        gains.append(errors[0] - errors[1])
    assert sum(gains) > 0 and sum(gain > 0 for gain in gains) > 5


def test_a_restricted_network_shares_all_but_the_choices(supernet):
    view = restricted(supernet, 2, (2, 4), rest=3)
    whole = supernet.candidates
    free = {name: c for name, c in view.candidates.items() if len(whole[name].weight) > 1}
    assert list(free.values()) == [((4,), (4,)), ((2, 4), (2, 4))]  # depth-wise: no 2 bits
    assert {n: c for n, c in whole.items() if n not in free}.items() <= view.candidates.items()
    x, y = images(16, seed=1).tensors
    config = smallest(view.candidates)
    assert torch.equal(view(x, config), supernet(x, config))
    assert len(exhaustive(view, batch_error(view, x, y))) == 4


def test_rows_of_a_study_hold_every_arm_at_every_level(supernet):
    splits = SimpleNamespace(calibration=images(32), search=images(16, 1), test=images(16, 2))
    x, y = images(32, seed=2).tensors
    levels, error = [3, 3.5], batch_error(supernet, x, y)
    rows = front(supernet, error, levels, splits, {}, 0, torch.device("cpu"))
    searched = [row for row in rows if row["arm"] != "uniform"]
    expected = set(itertools.product(["greedy", "random", "evolution"], levels))
    assert {(row["arm"], row["level"]) for row in searched} == expected
    for row in searched:
        assert row["bitops_g"] * 1e9 <= bitops_at(supernet.table, row["level"])


def test_every_variant_of_the_rule_is_judged_on_images_that_no_search_has_seen(supernet):
    x, y = images(32, seed=2).tensors
    rows = judged(supernet, x, y, 16, 1, [3, 3.5], VARIANTS)
    assert [(r["arm"], r["level"]) for r in rows] == list(itertools.product(VARIANTS, [3, 3.5]))
    budget = bitops_at(supernet.table, 3.5)
    error = batch_error(supernet, x[:16], y[:16])
    found = greedy(supernet, error, budget, rule="paper")[-1].config
    assert rows[1]["judged"] == batch_error(supernet, x[16:], y[16:])(found)


def test_literal_search_scores_alike_and_counts_what_it_asks(supernet):
    x, y = images(16, seed=3).tensors
    config = supernet.uniform(3)
    assert literal_error(supernet, x, y)(config) == batch_error(supernet, x, y)(config)
    rows = side_by_side(supernet, x, y, 12, [3])
    assert [row["arm"] for row in rows] == ["fast", "literal"]
    for row in rows:
        assert row["judged"] > 0
        assert row["passes"] > row["steps"] > 0
