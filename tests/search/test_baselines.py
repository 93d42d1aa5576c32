"""Search baselines against what must hold of them, and against every configuration there is."""

import pytest
import torch
from conftest import images
from hypothesis import given, settings
from hypothesis import strategies as st
from stand import SMALL_STANDS, STANDS, Stand, made_up_error

from mpqlib.network.bits import largest, sample, smallest
from mpqlib.network.cost import bitops, bitops_at
from mpqlib.search.baselines import evaluate_all, evolution, fit_to_budget, random_search, restrict
from mpqlib.search.error import batch_error
from mpqlib.search.moves import possible_moves
from mpqlib.studies.search import measure_regret


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(STANDS, st.integers(0, 999), st.floats(0, 1))
def test_fitted_uses_the_budget_up(layers, seed, share):
    stand = Stand(*zip(*layers, strict=True))
    ends = [bitops(stand.table, end(stand.candidates)) for end in (smallest, largest)]
    budget = ends[0] + share * (ends[1] - ends[0])
    config = fit_to_budget(stand, sample(stand.candidates, seeded(seed)), budget, seeded(seed))
    assert bitops(stand.table, config) <= budget
    for move in possible_moves(config, stand.candidates, ("weight", "act")):
        assert move.after < move.before or bitops(stand.table, move.apply(config)) > budget


@settings(max_examples=20, deadline=None)
@given(SMALL_STANDS, st.integers(0, 999), st.floats(0, 1))
def test_exhaustive_is_every_configuration_and_nothing_beats_it(layers, seed, share):
    stand, error = Stand(*zip(*layers, strict=True)), made_up_error(seed)
    everything = evaluate_all(stand, error)
    assert everything == {config: error(config) for config in stand.every()}
    ends = [bitops(stand.table, end(stand.candidates)) for end in (smallest, largest)]
    rows = (
        measure_regret(stand, error, [3, 4], {}, seed)
        if ends[0] <= bitops_at(stand.table, 3)
        else []
    )
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
    view = restrict(supernet, 2, (2, 4), rest=3)
    whole = supernet.candidates
    free = {name: c for name, c in view.candidates.items() if len(whole[name].weight) > 1}
    assert list(free.values()) == [((4,), (4,)), ((2, 4), (2, 4))]  # depth-wise: no 2 bits
    assert {n: c for n, c in whole.items() if n not in free}.items() <= view.candidates.items()
    x, y = images(16, seed=1).tensors
    config = smallest(view.candidates)
    assert torch.equal(view(x, config), supernet(x, config))
    assert len(evaluate_all(view, batch_error(view, x, y))) == 4


@pytest.mark.parametrize("value", [True, "1", None, -1, 2.5])
def test_what_is_no_number_in_its_limits_is_refused(supernet, value):
    stand, error = Stand((9, 4), [((2, 3, 4),) * 2] * 2), made_up_error(0)
    with pytest.raises(ValueError, match=f"mutation={value!r} is not allowed: a number from 0"):
        evolution(stand, error, 1e9, 10, seeded(0), mutation=value)
    for name in ("evaluations", "population"):
        options = {"evaluations": 10} | {name: value}
        with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed: a whole number"):
            evolution(stand, error, 1e9, generator=seeded(0), **options)
    message = f"layers={value!r} is not allowed: a whole number from 0 to"
    with pytest.raises(ValueError, match=message):
        restrict(supernet, value, (2, 4))
