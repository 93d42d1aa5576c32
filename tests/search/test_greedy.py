"""The search against a literal reading of its rule, and against every configuration there is."""

import itertools
import random
import re
import statistics
import warnings
from math import inf, isfinite, nan

import pytest
import torch
from conftest import images
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stand import SMALL_STANDS, STANDS, Stand, made_up_error

from mpqlib.network.bits import BitConfig, largest, smallest
from mpqlib.network.cost import bitops
from mpqlib.search.error import batch_error
from mpqlib.search.greedy import greedy, weight_target
from mpqlib.search.moves import possible_moves


def literal_greedy(stand, error, budget, rule):
    """A rule read word by word, on plain dicts, every quantity computed anew."""

    def cost(bits):
        return sum(i.macs * bits[i.name][0] * bits[i.name][1] for i in stand.table)

    def value(bits):
        return error(BitConfig.of(bits))

    bits = {i.name: (max(i.candidates.weight), max(i.candidates.act)) for i in stand.table}
    fixed = sum(
        i.macs * bits[i.name][0] * bits[i.name][1]
        for i in stand.table
        if len(i.candidates.weight) == len(i.candidates.act) == 1
    )
    half_way = fixed + (max(budget - fixed, 0) * (cost(bits) - fixed)) ** 0.5
    path = [dict(bits)]
    for kinds, target in (([0], half_way), ([1], budget), ([0, 1], budget)):
        while cost(bits) > target:
            tries = []
            for info in stand.table:
                for kind in kinds:
                    offered = list(info.candidates[kind])
                    place = offered.index(bits[info.name][kind])
                    for other in (place - 1, place + 1):
                        if 0 <= other < len(offered):
                            pair = list(bits[info.name])
                            pair[kind] = offered[other]
                            changed = {**bits, info.name: tuple(pair)}
                            tries.append(changed)
            downwards = [t for t in tries if cost(t) < cost(bits)]
            if not downwards:
                break
            if rule == "ratio":

                def price(t, now=bits):
                    return (value(t) - value(now)) / (cost(now) - cost(t))

                bits = min(downwards, key=price)
                path.append(dict(bits))
                continue

            def scale(v, all_of_them):
                low, high = min(all_of_them), max(all_of_them)
                return (v - low) / (high - low) if high > low else 0.0

            while True:
                errors, costs = [value(t) for t in tries], [cost(t) for t in tries]
                scores = [
                    1.5 * scale(e, errors) + scale(c, costs)
                    for e, c in zip(errors, costs, strict=True)
                ]
                best = tries[scores.index(min(scores))]
                met = [value(p) <= value(best) and cost(p) <= cost(best) for p in path]
                if cost(best) <= cost(bits) or not any(met):  # up, only to what is new
                    break
                tries.remove(best)
            bits = best
            path.append(dict(bits))
    return path + (literal_exchanges(stand, error, budget, bits) if rule == "ratio" else [])


def literal_exchanges(stand, error, budget, bits):
    """One bit-width up, or one up and another down, while that promises and brings less error."""

    def cost(bits):
        return sum(i.macs * bits[i.name][0] * bits[i.name][1] for i in stand.table)

    def value(bits):
        return error(BitConfig.of(bits))

    def moved(bits, name, kind, way):
        offered = list(stand.candidates[name][kind])
        pair = list(bits[name])
        pair[kind] = dict(enumerate(offered)).get(offered.index(pair[kind]) + way)
        return {**bits, name: tuple(pair)} if pair[kind] else None

    path, places = [], [(name, kind) for name in bits for kind in (0, 1)]
    while True:
        offers = []
        for place in places:
            if raised := moved(bits, *place, +1):
                gain = value(raised) - value(bits)
                offers.append((gain, raised))
                for other in places:
                    if other != place and (lowered := moved(bits, *other, -1)):
                        both = moved(raised, *other, -1)
                        offers.append((gain + (value(lowered) - value(bits)), both))
        offers = [(promise, b) for promise, b in offers if promise < 0 and cost(b) <= budget]
        if not offers:
            return path
        best = min(offers, key=lambda offer: offer[0])[1]
        if value(best) >= value(bits):
            return path
        bits = best
        path.append(dict(bits))


@settings(max_examples=60, deadline=None)
@given(STANDS, st.integers(0, 999), st.floats(0, 1), st.sampled_from(["paper", "ratio"]))
def test_greedy_is_its_literal_rule_and_keeps_the_budget(layers, seed, share, rule):
    stand, error = Stand(*zip(*layers, strict=True)), made_up_error(seed)
    ends = [bitops(stand.table, end(stand.candidates)) for end in (smallest, largest)]
    budget = ends[0] + share * (ends[1] - ends[0])
    path = greedy(stand, error, budget, rule=rule, exact=True)
    literal = literal_greedy(stand, error, budget, rule)
    assert [dict(step.config) for step in path] == literal
    assert path[-1].bitops <= budget
    for step in path:
        assert step.bitops == bitops(stand.table, step.config)
        assert step.error == error(step.config)
    for a, b in itertools.pairwise(path):
        changed = sum(a.config[n][k] != b.config[n][k] for n in a.config for k in (0, 1))
        assert changed == 1 or (rule == "ratio" and changed == 2 and a.bitops <= budget)


@pytest.mark.parametrize("rule", ["paper", "ratio"])
def test_greedy_comes_near_the_best_of_all_configurations(rule):
    ranks = []  # share of feasible configurations that are better than what was found
    for seed, share in itertools.product(range(10), (0.3, 0.5, 0.7)):
        stand, error = Stand((5, 20, 10), [((2, 3, 4, 5),) * 2] * 3), made_up_error(seed)
        budget = share * bitops(stand.table, largest(stand.candidates))
        feasible = [error(c) for c in stand.every() if bitops(stand.table, c) <= budget]
        found = greedy(stand, error, budget, rule=rule)[-1].error
        assert found >= min(feasible)
        ranks.append(sum(e < found for e in feasible) / len(feasible))
    assert statistics.median(ranks) < 0.03


def test_greedy_on_a_network_against_exhaustion(supernet):
    x, y = images(32, seed=2).tensors
    error = batch_error(supernet, x, y)
    stand = Stand([], [])
    stand.table, stand.candidates = supernet.table, supernet.candidates
    ends = [bitops(supernet.table, end(supernet.candidates)) for end in (smallest, largest)]
    budget = (ends[0] + ends[1]) / 2
    path = greedy(supernet, error, budget)
    feasible = [error(c) for c in stand.every() if bitops(supernet.table, c) <= budget]
    assert path[-1].bitops <= budget
    assert min(feasible) <= path[-1].error
    assert path[-1].error == error(path[-1].config)  # scoring leaves no trace


@settings(max_examples=60, deadline=None)
@given(STANDS, st.integers(0, 999), st.floats(0, 1), st.sampled_from(["paper", "ratio"]))
def test_fast_search_keeps_the_budget_and_its_errors_are_measured(layers, seed, share, rule):
    stand, error = Stand(*zip(*layers, strict=True)), made_up_error(seed)
    ends = [bitops(stand.table, end(stand.candidates)) for end in (smallest, largest)]
    budget = ends[0] + share * (ends[1] - ends[0])
    path = greedy(stand, error, budget, rule=rule)
    assert path[-1].bitops <= budget
    for step in path:
        assert (step.error, step.bitops) == (error(step.config), bitops(stand.table, step.config))
    down = greedy(stand, error, budget, rule=rule, up=False)
    assert all(a.bitops > b.bitops for a, b in itertools.pairwise(down))
    if rule == "ratio":  # exchanges follow on the same way down, each to a lower error
        assert path[: len(down)] == down
        errors = [step.error for step in path[len(down) - 1 :]]
        assert errors == sorted(set(errors), reverse=True)


@pytest.mark.parametrize("rule", ["paper", "ratio"])
def test_fast_search_takes_the_exact_decisions_where_moves_do_not_interact(rule):
    def error(config):  # a sum over layers: what a move changes never changes
        rows = enumerate(config.values(), 2)  # roots, so that no two moves score alike
        return sum(i**0.5 * 2.0**-b.weight + i**0.3 * 2.0**-b.act for i, b in rows)

    calls = []
    stand = Stand((5, 20, 10, 7, 13, 9, 17, 11), [((2, 3, 4, 5, 6),) * 2] * 8)
    budget = 0.4 * bitops(stand.table, largest(stand.candidates))
    fast = greedy(stand, lambda c: calls.append(c) or error(c), budget, rule=rule)
    measured = len(calls)
    exact = greedy(stand, lambda c: calls.append(c) or error(c), budget, rule=rule, exact=True)
    assert [s.config for s in fast] == [s.config for s in exact]
    assert measured < (len(calls) - measured) / 2


@settings(max_examples=20, deadline=None)
@given(SMALL_STANDS, st.integers(0, 999), st.floats(0, 1))
def test_ratio_of_weights_and_activations_jointly_is_its_literal_rule(layers, seed, share):
    stand, error = Stand(*zip(*layers, strict=True)), made_up_error(seed)
    ends = [bitops(stand.table, end(stand.candidates)) for end in (smallest, largest)]
    budget = ends[0] + share * (ends[1] - ends[0])
    options = dict(rule="ratio", weights_first=False, up=False)
    path = greedy(stand, error, budget, exact=True, **options)
    assert path[-1].bitops <= budget
    for a, b in itertools.pairwise(path):
        best = min(
            (error(c) - a.error) / (a.bitops - cost)
            for c in stand.neighbours(a.config)
            if (cost := bitops(stand.table, c)) < a.bitops
        )
        assert (b.error - a.error) / (a.bitops - b.bitops) == pytest.approx(best)
    assert greedy(stand, error, budget, **options)[-1].bitops <= budget


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule='best' is not allowed"):
        greedy(Stand((5,), [((2, 3),) * 2]), made_up_error(0), 1e9, rule="best")


def test_moves_are_all_neighbours_in_one_bit_width():
    stand = Stand((1, 1), [((2, 3, 4), (2, 4)), ((8,), (8,))])
    config = BitConfig.of({"l0": (3, 2), "l1": (8, 8)})
    found = list(possible_moves(config, stand.candidates, ["weight", "act"]))
    assert {move.apply(config)["l0"] for move in found} == {(2, 2), (4, 2), (3, 4)}
    assert all(move.apply(config)["l1"] == (8, 8) for move in found)
    weights = possible_moves(config, stand.candidates, ["weight"])
    assert {move.apply(config)["l0"] for move in weights} == {(2, 2), (4, 2)}


def test_weights_go_half_of_the_way():
    stand = Stand((7, 3, 2), [((2, 4, 6),) * 2, ((2, 4, 6),) * 2, ((8,), (8,))])
    start, four = largest(stand.candidates), {"l0": (4, 4), "l1": (4, 4), "l2": (8, 8)}
    half = {"l0": (4, 6), "l1": (4, 6), "l2": (8, 8)}
    budget = bitops(stand.table, BitConfig.of(four))
    expected = bitops(stand.table, BitConfig.of(half))
    assert weight_target(stand.table, start, budget) == pytest.approx(expected)


def test_a_budget_out_of_reach_is_refused():
    stand = Stand((1, 1), [((2, 4),) * 2] * 2)
    with pytest.raises(ValueError, match=r"budget=7\.9 .* is not allowed: at least 8 "):
        greedy(stand, lambda config: 0.0, 7.9)


@settings(max_examples=40, deadline=None)
@given(STANDS, st.integers(0, 999), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_size_alone_and_both_limits_are_kept(layers, seed, share, size_share, weights_first):
    stand, error = Stand(*zip(*layers, strict=True)), made_up_error(seed)
    small, large = (end(stand.candidates) for end in (smallest, largest))
    low, high = bitops(stand.table, small), bitops(stand.table, large)
    least, most = (sum(i.weights * c[i.name].weight for i in stand.table) for c in (small, large))
    budget = low + share * (high - low)
    size = (least + size_share * (most - least)) / 8 * (1 + 1e-12)
    for limits in ({"budget": budget, "size": size}, {"size": size}):
        config = greedy(stand, error, **limits, weights_first=weights_first)[-1].config
        assert bitops(stand.table, config) <= limits.get("budget", high)
        assert sum(i.weights * config[i.name].weight for i in stand.table) / 8 <= size
    assert [bits.act for bits in config.values()] == [bits.act for bits in large.values()]


def test_a_size_out_of_reach_is_refused():
    stand = Stand((1_000_000,), [((2, 4),) * 2])
    with pytest.raises(ValueError, match=r"size=200000\.0 \(0\.2 MB\) is not allowed"):
        greedy(stand, made_up_error(0), size=0.2e6)


def test_batch_error_is_the_cross_entropy_with_the_batch_s_statistics(supernet):
    x, y = images(32, seed=2).tensors
    config = supernet.uniform(3)
    supernet.train()
    logits = supernet(x, config).detach()  # in training mode norms use the batch
    expected = -logits.log_softmax(1)[torch.arange(32), y].mean()
    assert batch_error(supernet, x, y)(config) == pytest.approx(expected.item(), rel=1e-5)


def spoiled_error(seed, kind):
    """Made-up errors of which some, or all, are no finite numbers, or differ when asked again."""
    rng, error = random.Random(seed), made_up_error(seed)
    bad = {"nan": [nan], "infinite": [inf], "minus infinite": [-inf], "mixed": [nan, inf, -inf]}

    def spoiled(config):
        if kind == "noise":
            return rng.random()
        if kind == "all nan":
            return nan
        # The same configuration is always bad, or never.
        own = random.Random(f"{seed} {sorted(config.items())}")
        return own.choice(bad[kind]) if own.random() < 0.3 else error(config)

    return spoiled


@settings(max_examples=60, deadline=None)
@given(
    STANDS,
    st.integers(0, 999),
    st.sampled_from(["nan", "infinite", "minus infinite", "mixed", "noise", "all nan"]),
    st.sampled_from(["paper", "ratio"]),
    st.booleans(),
)
def test_every_search_ends_within_the_budget_or_says_why(layers, seed, kind, rule, exact):
    stand, error, calls = Stand(*zip(*layers, strict=True)), spoiled_error(seed, kind), []
    low, high = (bitops(stand.table, end(stand.candidates)) for end in (smallest, largest))
    assume(low < high)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the number of exchanges is bounded, with a warning
            path = greedy(
                stand,
                lambda config: calls.append(config) or error(config),
                (low + high) / 2,
                rule=rule,
                exact=exact,
            )
    except ValueError as reason:
        assert kind != "noise" and re.search("NaN or infinite", str(reason))
    else:
        assert kind != "all nan"
        assert isfinite(path[-1].error) and path[-1].bitops <= (low + high) / 2
    moves = sum(len(choices) for pair in stand.candidates.values() for choices in pair)
    assert len(calls) <= 20 * moves * (moves + moves**2)


@pytest.mark.parametrize("rule", ["paper", "ratio"])
def test_a_layer_whose_small_bits_give_nan_keeps_its_bits(rule):
    stand = Stand((10, 10), [((2, 4, 6),) * 2] * 2)
    error = made_up_error(0)

    def nan_below_four_bits(config):
        return nan if config["l0"].weight < 4 else error(config)

    found = greedy(stand, nan_below_four_bits, 300, rule=rule)[-1]
    assert found.config["l0"].weight >= 4 and isfinite(found.error) and found.bitops <= 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "papers"}, "rule='papers'"),
        ({"budget": "3.0"}, "budget='3.0'"),
        ({"budget": nan}, "budget=nan"),
        ({"size": -1}, "size=-1"),
        ({"size": "2"}, "size='2'"),
        ({"exact": "no"}, "exact='no'"),
    ],
)
def test_options_that_are_not_allowed_are_named(options, message):
    stand = Stand((1, 1), [((2, 4),) * 2] * 2)
    with pytest.raises(ValueError, match=message):
        greedy(stand, made_up_error(0), **({"budget": 20} | options))


@pytest.mark.parametrize("seed", range(12))
def test_an_exchange_is_measured_before_it_is_taken(seed):
    stand, error = Stand((5, 20, 10, 7), [((2, 3, 4, 5, 6),) * 2] * 4), made_up_error(seed)
    asked = set()
    low, high = (bitops(stand.table, end(stand.candidates)) for end in (smallest, largest))
    budget = (2 * low + high) / 3
    path = greedy(stand, lambda config: asked.add(config) or error(config), budget)
    within = [step.config for step in path if step.bitops <= budget]
    for before, after in itertools.pairwise(within):
        for name in before:
            for part in ("weight", "act"):
                bits = getattr(after[name], part)
                if bits != getattr(before[name], part):
                    assert before.replace(name, before[name]._replace(**{part: bits})) in asked


def test_a_start_that_does_not_fit_is_named():
    stand = Stand([1, 2], [((2, 4), (2, 4))] * 2)
    start, error = largest(stand.candidates), made_up_error(0)
    for wrong in (dict(start), BitConfig.of({"l0": (4, 4)}), start.replace("l1", (4.0, 4))):
        with pytest.raises(ValueError, match=r"^start"):
            greedy(stand, error, 20, start=wrong)
