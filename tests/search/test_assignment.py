"""The integer program against all configurations there are; the table, its file and its limits."""

import copy
import ctypes
import itertools
import random
import re
import statistics
from dataclasses import replace
from functools import cache, partial
from math import inf, isclose, isfinite, nan

import numpy
import pandas as pd
import pytest
import torch
from conftest import images
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stand import SMALL_STANDS, STANDS, Stand, made_up_error

from mpqlib.network.bits import BitConfig, largest, smallest
from mpqlib.network.cost import bitops, model_size
from mpqlib.search import assignment as program
from mpqlib.search.assignment import assignment, front, quick_table, silent_c_code, solve
from mpqlib.search.error import batch_error, kl_error
from mpqlib.search.sensitivity import PAIRS, Sensitivity, fit_changes, measure_sensitivity
from mpqlib.training.calibration import fit_steps
from mpqlib.training.evaluation import evaluate, recalibrate

THREE = st.tuples(st.integers(1, 50), st.sampled_from([((2, 3),) * 2, ((2, 4), (2, 6))]))
THREE_LAYERS = st.lists(THREE, min_size=3, max_size=3)


def random_error(seed):
    """An error without any structure, the same whenever a configuration is asked again."""
    return lambda config: random.Random(f"{seed} {config.to_json()}").gauss(0, 1)


def predict_literally(error, base, config, pairs, ties):
    """The error by single changes and by pairs of changes, each computed anew from its meaning."""
    group_of = {name: group for group in ties for name in group}
    names = list(base)
    places = [
        (n, k)
        for n in names
        for k in (0, 1)
        if config[n][k] != base[n][k] and (k == 0 or group_of.get(n, [n])[0] == n)
    ]

    def after(*changed):
        bits = {n: list(pair) for n, pair in base.items()}
        for name, k in changed:
            for member in group_of.get(name, [name]) if k else [name]:
                bits[member][k] = config[name][k]
        return error(BitConfig.of(bits)) - error(base)

    def is_measured(first, second):
        if first[0] == second[0]:
            return pairs != "none"
        apart = names.index(second[0]) - names.index(first[0])
        return pairs == "neighbours" and apart == 1 and first[1] == second[1]

    alone = {place: after(place) for place in places}
    together = [p for p in itertools.combinations(places, 2) if is_measured(*p)]
    mixed = sum(after(a, b) - alone[a] - alone[b] for a, b in together)
    return error(base) + sum(alone.values()) + mixed


def bytes_literally(table, config):
    """Size in bytes: each weight tensor once for each bit-width in use."""
    widths = {}
    for info in table:
        widths.setdefault(info.tied_to or info.name, set()).add(config[info.name].weight)
    weights = {info.name: info.weights for info in table}
    return sum(weights[name] * b / 8 for name, used in widths.items() for b in used)


@settings(max_examples=80, deadline=None)
@given(
    THREE_LAYERS,
    st.integers(0, 999),
    st.sampled_from(PAIRS),
    st.sampled_from([(), (("l0", "l1"),), (("l0", "l2"),), (("l0", "l1", "l2"),)]),
    st.booleans(),
    st.booleans(),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_solution_is_the_best_of_all_configurations(
    layers, seed, pairs, ties, equal_bits, shared, shares
):
    stand, error = Stand(*zip(*layers, strict=True)), random_error(seed)
    if shared:  # the first and the last layer share their weights
        last = replace(stand.table[2], tied_to="l0", weights=stand.table[0].weights)
        stand.table[2] = last
    acts = [stand.candidates[n].act for n in ties[0]] if ties else []
    assume(len(set(acts)) <= 1)
    base = random.Random(seed).choice(
        [c for c in stand.every() if all(len({c[n].act for n in g}) == 1 for g in ties)]
    )
    table = measure_sensitivity(stand, error, base, pairs=pairs, ties=ties)
    limits = []
    for cost, share in zip((bitops, bytes_literally), shares, strict=True):
        low, high = (cost(stand.table, end(stand.candidates)) for end in (smallest, largest))
        limits.append(low + share * (high - low))
    budget, size = random.Random(seed).choice([limits, [limits[0], inf], [inf, limits[1]]])

    def is_allowed(config):
        costs = bitops(stand.table, config) <= budget, bytes_literally(stand.table, config) <= size
        tied = all(len({config[n].act for n in group}) == 1 for group in ties)
        equal = all(b.weight == b.act for b in config.values())
        return all(costs) and tied and (equal or not equal_bits)

    predicted = {
        c: predict_literally(error, base, c, pairs, ties) for c in stand.every() if is_allowed(c)
    }
    found = solve(stand, table, budget, size=size, equal_bits=equal_bits)
    assert isclose(predicted[found], min(predicted.values()), abs_tol=1e-9)
    assert isclose(table.predict(found), predicted[found], abs_tol=1e-9)
    assert solve(stand, table, budget, size=size, equal_bits=equal_bits) == found


@settings(max_examples=60, deadline=None)
@given(
    THREE_LAYERS,
    st.integers(0, 999),
    st.sampled_from(["none", "layers"]),
    st.sampled_from([1e4, 1e7, 1e9]),
    st.sampled_from([0.05, 0.3, 0.8]),
    st.floats(0, 1),
)
def test_huge_errors_do_not_hide_small_ones_from_the_solver(
    layers, seed, pairs, huge, share, place
):
    stand, rng = Stand(*zip(*layers, strict=True)), random.Random(seed)
    places = [(n, k, b) for n in stand.candidates for k in (0, 1) for b in (2, 3, 4, 6)]
    terms = {p: rng.gauss(0, huge if rng.random() < share else 1) for p in places}
    both = {(n, a, b): rng.gauss(0, 1) for n, _, a in places for b in (2, 3, 4, 6)}

    def error(config):
        parts = sum(terms[n, k, config[n][k]] for n in config for k in (0, 1))
        return parts + sum(both[n, *config[n]] for n in config) * (pairs == "layers")

    table = measure_sensitivity(stand, error, rng.choice(stand.every()), pairs=pairs)
    low, high = (bitops(stand.table, end(stand.candidates)) for end in (smallest, largest))
    budget = low + place * (high - low)
    best = min(table.predict(c) for c in stand.every() if bitops(stand.table, c) <= budget)
    assert table.predict(solve(stand, table, budget)) - best <= 1e-9 + 1e-12 * huge


@pytest.mark.parametrize("seed", range(10))
def test_interactions_of_neighbours_lower_and_raise_the_error(seed):
    stand = Stand((9, 4, 6), [((2, 3),) * 2, ((2, 4), (2, 6)), ((2, 3),) * 2])
    error = random_error(seed)
    table = measure_sensitivity(stand, error, largest(stand.candidates), pairs="neighbours")
    best = min(map(table.predict, stand.every()))
    assert isclose(table.predict(solve(stand, table)), best, abs_tol=1e-9)


def test_a_solution_that_the_solver_lets_exceed_a_limit_is_left_out(monkeypatch):
    stand, exact = Stand((9, 4), [((2, 3, 4),) * 2] * 2), program.add_limit

    def loose(program, terms, limit):
        exact(program, terms, 1.3 * limit)

    monkeypatch.setattr(program, "add_limit", loose)
    table = measure_sensitivity(stand, made_up_error(0))
    for budget in (60, 100, 150):
        within = [table.predict(c) for c in stand.every() if bitops(stand.table, c) <= budget]
        assert isclose(table.predict(solve(stand, table, budget)), min(within))


def test_one_huge_slope_does_not_lift_all_others():
    stand = Stand((1,) * 4, [((2, 3, 4, 5, 6),) * 2] * 4)
    slopes = {"l0": 1e4, "l1": 1.0, "l2": 2.0, "l3": 4.0}

    def error(config):
        return sum(slopes[n] * (4.0**-w + 4.0**-a) for n, (w, a) in config.items())

    smooth = measure_sensitivity(stand, error, largest(stand.candidates)).smooth()
    configs = [stand.uniform(b).replace("l1", (2, 5)) for b in (2, 3, 4, 5, 6)]
    assert all(isclose(smooth.predict(c), error(c)) for c in configs)


@settings(max_examples=30, deadline=None)
@given(THREE_LAYERS, st.integers(0, 999), st.integers(0, 3), st.floats(0, 1))
def test_solution_within_a_radius_is_the_best_within_it(layers, seed, radius, share):
    stand, error = Stand(*zip(*layers, strict=True)), random_error(seed)
    near = random.Random(seed).choice(stand.every())
    low, high = bitops(stand.table, near), bitops(stand.table, largest(stand.candidates))
    budget = low + share * (high - low)
    table = measure_sensitivity(stand, error, near)
    found = solve(stand, table, budget, near=near, radius=radius)
    allowed = [
        table.predict(c)
        for c in stand.every()
        if bitops(stand.table, c) <= budget and sum(c[n] != near[n] for n in c) <= radius
    ]
    assert isclose(table.predict(found), min(allowed), abs_tol=1e-9)


@settings(max_examples=30, deadline=None)
@given(STANDS, st.integers(0, 999))
def test_table_holds_the_error_of_every_single_change(layers, seed):
    stand, error, asked = Stand(*zip(*layers, strict=True)), random_error(seed), []

    def counted(config):
        asked.append(config)
        return error(config)

    base = smallest(stand.candidates)
    rows = measure_sensitivity(stand, counted, base).to_frame()
    assert len(asked) == len(set(asked)) == 1 + (rows["bits"] != rows["base_bits"]).sum()
    for row in rows.itertuples():
        bits = base[row.layer]._replace(**{row.part: row.bits})
        assert row.base_bits == getattr(base[row.layer], row.part)
        assert row.error == error(base.replace(row.layer, bits))
        assert row.change == row.error - error(base)
    offered = [len(choices) for pair in stand.candidates.values() for choices in pair]
    assert len(rows) == sum(offered)
    # From the last layer to the first, so that passes have most outputs in common
    changed = [next(i for i, n in enumerate(c) if c[n] != base[n]) for c in asked[1:]]
    assert changed == sorted(changed, reverse=True)


def test_prediction_is_exact_for_errors_without_further_interactions():
    stand = Stand((3, 5, 7), [((2, 3, 4),) * 2] * 3)

    def within_layers(config):
        return sum(w * a - 3 * w for w, a in config.values())

    def between_neighbours(config):
        pairs = itertools.pairwise(config.values())
        return within_layers(config) + sum(a.weight / b.weight + a.act * b.act for a, b in pairs)

    for error, pairs in ((within_layers, "layers"), (between_neighbours, "neighbours")):
        table = measure_sensitivity(stand, error, largest(stand.candidates), pairs=pairs)
        assert all(isclose(table.predict(c), error(c)) for c in stand.every())


def test_search_finds_the_optimum_of_an_additive_error():
    def error(config):
        return sum(1 / (i + w) + 1 / (2 * i + a) for i, (w, a) in enumerate(config.values()))

    stand = Stand((9, 4, 6), [((2, 3, 4),) * 2] * 3)
    for budget in (130, 180, 250):
        path = assignment(stand, error, budget, base=smallest(stand.candidates), smooth=False)
        best = min(error(c) for c in stand.every() if bitops(stand.table, c) <= budget)
        assert isclose(path[-1].error, best)
        assert path[-1].bitops == bitops(stand.table, path[-1].config) <= budget


@settings(max_examples=20, deadline=None)
@given(SMALL_STANDS, st.integers(0, 999), st.floats(0, 1))
def test_further_rounds_keep_the_budget_and_only_lower_the_error(layers, seed, share):
    stand, error = Stand(*zip(*layers, strict=True)), random_error(seed)
    low, high = (bitops(stand.table, end(stand.candidates)) for end in (smallest, largest))
    budget, base = low + share * (high - low), largest(stand.candidates)
    path = assignment(stand, error, budget, base=base, rounds=3, radius=1)
    assert path[0].config == base
    assert path[:2] == assignment(stand, error, budget, base=base)
    for before, after in itertools.pairwise(path[1:]):
        assert after.error < before.error
        assert sum(after.config[n] != before.config[n] for n in base) <= 1
    assert all(step.error == error(step.config) for step in path)
    assert all(step.bitops <= budget for step in path[1:])


@pytest.mark.parametrize("smooth", [True, False])
def test_front_solves_all_budgets_from_one_table(smooth):
    stand, error = Stand((9, 4, 6), [((2, 3, 4),) * 2] * 3), random_error(0)
    table = measure_sensitivity(stand, error, largest(stand.candidates))
    budgets, asked = [90, 120, 200, 304], []

    def counted(config):
        asked.append(config)
        return error(config)

    steps = front(stand, counted, iter(budgets), table, smooth=smooth)
    assert len(asked) <= len(budgets)
    used = table.smooth() if smooth else table
    for budget, step in zip(budgets, steps, strict=True):
        # The program's solution, whatever errors other budgets have
        assert step.config == solve(stand, used, budget)
        assert step.error == error(step.config)
        assert step.bitops == bitops(stand.table, step.config) <= budget


def test_smoothed_changes_follow_the_noise_of_rounding():
    stand = Stand((9, 4, 6), [((2, 3, 4, 6),) * 2] * 3)
    slopes = {
        (n, k): i + 1.0 for i, (n, k) in enumerate(itertools.product(stand.candidates, (0, 1)))
    }

    def noise_power(config):
        return sum(slopes[n, k] * 4.0 ** -config[n][k] for n in config for k in (0, 1))

    base = largest(stand.candidates).replace("l1", (3, 4))
    exact = measure_sensitivity(stand, noise_power, base)
    assert all(isclose(exact.smooth().predict(c), noise_power(c)) for c in stand.every()[::7])
    # From errors with noise: the least-squares slope, and a little at the least
    noisy = measure_sensitivity(stand, random_error(1), base)
    fitted = {}
    for name, part in itertools.product(base, ("weight", "act")):
        rows = noisy.to_frame().query("layer == @name and part == @part")
        added = (0.25 ** rows["bits"] - 0.25 ** rows["base_bits"]).to_numpy()[:, None]
        fitted[name, part] = float(numpy.linalg.lstsq(added, rows["change"], rcond=None)[0][0])
    least = 0.1 * statistics.median(map(abs, fitted.values()))
    for row in noisy.smooth().to_frame().itertuples():
        slope = max(fitted[row.layer, row.part], least)
        assert isclose(row.change, slope * (0.25**row.bits - 0.25**row.base_bits), abs_tol=1e-9)
    # So the most bits are best where they cost nothing
    assert solve(stand, noisy.smooth()) == largest(stand.candidates)


def fit_literally(error, choices, base):
    """Changes by the formula, in the plainest way. `error`: bits -> error, NaN where it fails."""
    usable = [b for b in choices if isfinite(error(b))]
    changes = {b: inf for b in choices}
    if not usable:
        return changes
    added = {b: max(error(b) - error(base), 1e-9) for b in usable}
    fewest = usable[0]
    if len(usable) == 1:
        return changes | added
    apart = {b: abs(b - (fewest + 2)) for b in usable[1:]}
    more = max(b for b in apart if apart[b] == min(apart.values()))
    r = (added[fewest] / added[more]) ** (1 / (more - fewest))
    r = 2 if r < 2 else 8 if r > 8 else r
    return changes | {b: added[fewest] / r ** (b - fewest) for b in usable}


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(2, 10), min_size=2, max_size=6),
    st.lists(st.one_of(st.floats(-2, 5), st.floats(1e-12, 1e-6)), min_size=9, max_size=9),
    st.sampled_from([(), (0,), (0, 1)]),
)
def test_curve_goes_through_the_fewest_bits_and_two_bits_more(bits, errors, failing):
    *choices, base = sorted(bits)
    errors = dict(zip(range(2, 11), errors, strict=True)) | {
        choices[i]: inf for i in failing if i < len(choices)
    }
    asked = []

    def measure(b):
        asked.append(b)
        return errors[b] - errors[base]

    found = fit_changes(measure, choices)
    expected = fit_literally(errors.__getitem__, choices, base)
    assert set(found) == set(choices)
    assert all(found[b] == expected[b] or isclose(found[b], expected[b]) for b in choices)
    assert len(asked) <= 2 + sum(errors[b] == inf for b in choices)


@pytest.mark.parametrize("ties", [(), (("l0", "l1"),)])
def test_default_table_measures_two_changes_of_each_bit_width_from_the_largest_bits(ties):
    offered = [((2, 3, 4, 5, 6),) * 2, ((3, 4, 6), (2, 3, 4, 5, 6)), ((8,), (2, 4))]
    stand, asked, error = Stand((9, 4, 6), offered), [], made_up_error(3)

    def counted(config):
        asked.append(config)
        return error(config)

    table, base = quick_table(stand, counted, ties), largest(stand.candidates)
    assert table.base == base and table.error == error(base) and table.ties == ties
    followers = sum(len(group) - 1 for group in ties)
    assert len(asked) == len(set(asked)) == 1 + 2 * (4 - followers) + 1
    assert table.candidates == stand.candidates
    last = [max(i for i, n in enumerate(c) if c[n] != base[n]) for c in asked[1:]]
    assert ties or last == sorted(last, reverse=True)  # so that few outputs change between passes
    group_of = {name: group for group in ties for name in group}
    for name, (part, place) in itertools.product(base, [("weight", 0), ("act", 1)]):
        members = group_of.get(name, [name]) if part == "act" else [name]

        def after(bits, members=members, place=place):
            pairs = {n: list(pair) for n, pair in base.items()}
            for member in members:
                pairs[member][place] = bits
            return error(BitConfig.of(pairs))

        *choices, most = stand.candidates[name][place]
        expected = fit_literally(after, choices, most)
        rows = table.to_frame().query("layer == @name and part == @part and bits != base_bits")
        found = dict(zip(rows["bits"], rows["change"], strict=True))
        assert found.keys() == expected.keys()
        assert all(isclose(found[b], expected[b], rel_tol=1e-9) for b in choices)


def test_stored_default_table_gives_the_policies_of_a_fresh_one(tmp_path):
    stand = Stand((9, 4, 6), [((2, 3, 4, 5, 6),) * 2, ((3, 4, 6),) * 2, ((8,), (8,))])
    error = made_up_error(0)
    table = quick_table(stand, error)
    table.save(file := tmp_path / "sensitivity.csv")
    loaded = Sensitivity.load(file)
    assert loaded == table and loaded.smoothed
    assert loaded.smooth() == table  # it is a curve already
    budgets = [460, 500, 600, 700]
    assert front(stand, error, budgets, loaded) == front(stand, error, budgets)


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    table = table_of()
    old = table.to_frame().drop(columns=["smoothed", "network", "images"])
    old.to_csv(file := tmp_path / "sensitivity.csv", index=False)
    assert Sensitivity.load(file) == replace(table, network="", images="")


def change_weights(supernet):
    with torch.no_grad():
        supernet.layers["pointwise"].op.weight[0, 0] += 0.01


def change_steps(supernet):
    fit_steps(supernet, images(16).tensors[0])


@pytest.mark.parametrize("measure", [quick_table, measure_sensitivity])
@pytest.mark.parametrize("change", [change_weights, change_steps])
def test_a_table_of_other_weights_or_steps_is_refused(tmp_path, supernet, measure, change):
    x, y = images(16).tensors
    error, budget = batch_error(supernet, x, y), bitops(supernet.table, supernet.uniform(3))
    measure(supernet, error).save(file := tmp_path / "sensitivity.csv")
    table = Sensitivity.load(file)
    found = front(supernet, error, [budget], table)
    # Other statistics, another layout and a copy are the same network.
    recalibrate(supernet, images(32), found[0].config)
    evaluate(supernet, images(8), found[0].config)
    assert front(copy.deepcopy(supernet), error, [budget], table) == found
    change(supernet)
    for call in (
        lambda: solve(supernet, table.smooth(), budget),
        lambda: front(supernet, error, [budget], table),
    ):
        with pytest.raises(ValueError, match="measured with other weights or step sizes"):
            call()
    by_hand = replace(table, network="")
    assert bitops(supernet.table, solve(supernet, by_hand, budget)) <= budget


def test_a_table_tells_on_which_images_it_was_measured(supernet):
    x, y = images(16).tensors
    tables = [
        measure_sensitivity(supernet, error)
        for error in (
            batch_error(supernet, x, y),
            cache(kl_error(supernet, x.clone())),
            batch_error(supernet, x + 1, y),
            lambda config: sum(map(sum, config.values())),
        )
    ]
    first, same, other, unknown = (table.images for table in tables)
    assert first == same and len({first, other, unknown}) == 3 and unknown == ""


def test_no_choice_leads_to_an_error_that_is_not_finite():
    stand = Stand((9, 4), [((2, 3, 4),) * 2] * 2)
    base = largest(stand.candidates)

    def error(config):
        if config["l0"].weight == 2:
            return nan
        return inf if config["l1"].act == 3 else -sum(map(sum, config.values()))

    for pairs in PAIRS:
        table = measure_sensitivity(stand, error, base, pairs=pairs)
        found = solve(stand, table, 9 * 3 * 2 + 4 * 4 * 4)
        assert found["l0"].weight > 2 and found["l1"].act != 3
        with pytest.raises(ValueError, match=r"no configuration is within 5\.2e-08 G BitOPs"):
            solve(stand, table, 9 * 2 * 2 + 4 * 2 * 2)
    with pytest.raises(ValueError, match="error of the base is NaN or infinite"):
        measure_sensitivity(stand, error, smallest(stand.candidates))


def test_a_solution_whose_error_is_not_finite_is_refused():
    stand = Stand((9, 4), [((2, 3, 4),) * 2] * 2)

    def error(config):
        total = sum(map(sum, config.values()))
        return inf if total == 8 else total

    with pytest.raises(ValueError, match="error of the solution is NaN or infinite"):
        assignment(stand, error, base=largest(stand.candidates), smooth=False)


def table_of(pairs="none", ties=()):
    stand = Stand((9, 4, 6), [((2, 3, 4),) * 2, ((2, 3, 4),) * 2, ((8,), (8,))])
    error = random_error(0)

    def sometimes_infinite(config):
        return inf if config["l0"].weight == 2 else error(config)

    return measure_sensitivity(
        stand, sometimes_infinite, largest(stand.candidates), pairs=pairs, ties=ties
    )


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("ties", [(), (("l0", "l1"),)])
def test_table_comes_back_from_its_file(tmp_path, pairs, ties):
    table = table_of(pairs, ties)
    table.save(file := tmp_path / "folder" / "sensitivity.csv")
    assert Sensitivity.load(file) == table
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_table_with_an_error_that_is_not_a_number_is_not_solved():
    stand = Stand((9, 4), [((2, 3, 4),) * 2] * 2)
    table = measure_sensitivity(stand, made_up_error(0))
    table = replace(table, errors=table.errors | {next(iter(table.errors)): nan})
    for call in (lambda: solve(stand, table), lambda: front(stand, made_up_error(0), [1e9], table)):
        with pytest.raises(ValueError, match="table holds NaN: measure it again"):
            call()


def test_where_the_fewest_bits_fail_the_default_table_measures_the_others():
    stand = Stand((1, 1, 1), [((2, 3, 4, 5, 6),) * 2] * 3)
    weights = {"l0": 10, "l1": 20, "l2": 40}

    def error(config):
        if any(2 in bits for bits in config.values()):
            return nan
        return sum(weights[n] * (4.0**-w + 4.0**-a) for n, (w, a) in config.items())

    for level in (3.2, 3.7, 4.5):
        budget = 3 * level**2
        within = [error(c) for c in stand.every() if bitops(stand.table, c) <= budget]
        found = assignment(stand, error, budget)[-1]
        assert isclose(found.error, min(e for e in within if e == e))


PAIR_ROWS = {
    "a row is missing": (lambda table: table.drop(index=table.index[-1]), "rows of pairs are miss"),
    "a row stands twice": (
        lambda table: pd.concat([table, table.tail(1)]),
        "two rows have the pair",
    ),
    "half a bit": (
        lambda table: table.assign(other_bits=table["other_bits"] + 0.5),
        "'other_bits'",
    ),
    "a column is missing": (
        lambda table: table.drop(columns="other_part"),
        "missing: .'other_part'",
    ),
}


@pytest.mark.parametrize("change, message", PAIR_ROWS.values(), ids=PAIR_ROWS)
def test_damaged_rows_of_pairs_are_named(tmp_path, change, message):
    stand = Stand((9, 4), [((2, 3, 4),) * 2] * 2)
    table = measure_sensitivity(stand, made_up_error(0), pairs="layers").to_frame()
    change(table.astype({"other_bits": float})).to_csv(file := tmp_path / "table.csv", index=False)
    with pytest.raises(ValueError, match=message):
        Sensitivity.load(file)


def damage(**columns):
    """Replaces the entry of the second row in some columns."""

    def write(table, path):
        for name, value in columns.items():
            table[name] = table[name].astype(object)
            table.loc[1, name] = value
        table.to_csv(path, index=False)

    return write


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda table, path: path.write_text(""), "No columns"),
        (lambda table, path: path.write_bytes(b"\x93\xff\x00"), "codec"),
        (lambda table, path: path.write_text("a,b\n1,2\n"), "columns are missing: .'layer'"),
        (lambda table, path: table.head(0).to_csv(path, index=False), "there is no row"),
        (
            lambda table, path: table.head(4).to_csv(path, index=False),
            "a row is missing: .'l0', 'act'",
        ),
        (damage(part="bias"), "part is one of .*, not 'bias'"),
        (damage(bits=2.5), "'bits' holds something else than whole numbers"),
        (damage(error="high"), "could not convert string to float: 'high'"),
        (damage(error="nan"), "'change' is not 'error' minus 'base_error'"),
        (damage(error=3.0), "'change' is not 'error' minus 'base_error'"),
        (damage(base_error=3.0), "'base_error' holds more than one value"),
        (damage(base_bits=3), "a row without a change"),
        (damage(bits=2), "contradict"),
        (damage(layer=None), "column 'layer' has empty entries"),
        (damage(input_of="l7"), "ties"),
        (damage(network="0" * 16), "'network' holds more than one value"),
        (
            lambda table, path: table.assign(smoothed="perhaps").to_csv(path, index=False),
            "'smoothed' holds something else than True or False",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, write, message):
    file = tmp_path / "sensitivity.csv"
    write(table_of().to_frame().head(12), file)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} is no sensitivity.*{message}"):
        Sensitivity.load(file)


def test_a_table_of_another_network_is_refused():
    other = Stand((9, 4, 6), [((2, 4),) * 2, ((2, 3, 4),) * 2, ((8,), (8,))])
    with pytest.raises(ValueError, match="of layer 'l0', the supernet has"):
        solve(other, table_of(), 1e9)
    with pytest.raises(ValueError, match=r"unknown to this supernet, or missing: \['l2'\]"):
        solve(Stand((9, 4), [((2, 3, 4),) * 2] * 2), table_of(), 1e9)


def test_a_table_with_other_ties_is_refused():
    stand, error = Stand((9, 4), [((2, 3, 4),) * 2] * 2), made_up_error(0)
    table, ties = measure_sensitivity(stand, error), [("l0", "l1")]
    with pytest.raises(ValueError, match=r"ties=.*'l0', 'l1'.*measured with ties=\(\)"):
        front(stand, error, [1e9], table, ties=ties)
    tied = Stand((9, 4), [((2, 3, 4),) * 2] * 2)
    tied.table = [tied.table[0], replace(tied.table[1], input_of="l0")]
    with pytest.raises(ValueError, match=r"does not tie .'l0', 'l1'., the supernet does"):
        front(tied, error, [1e9], table)
    same = measure_sensitivity(tied, error)
    step = front(tied, error, [1e9], same, ties=[("l1", "l0")])[0]
    assert step.config["l0"].act == step.config["l1"].act


def test_what_is_not_allowed_is_named():
    stand, error = Stand((9, 4), [((2, 3, 4),) * 2, ((3,), (4, 6))]), made_up_error(0)
    base, uneven = largest(stand.candidates), BitConfig.of({"l0": (2, 3), "l1": (3, 4)})
    table = measure_sensitivity(stand, error, base)
    for arguments, message in [
        ((base, dict(pairs="all")), "pairs='all' is not allowed: one of"),
        ((uneven.replace("l0", (5, 5)), {}), "base.'l0'. is not allowed|base.'l0'.=Bits"),
        ((uneven, dict(ties=[("l0", "l1")])), "tied layers have different bits"),
        ((base, dict(ties=[("l0", "l9")])), "name no layer of this network: .'l9'"),
        ((base, dict(ties=[("l0",), ("l0",)])), "'l0'. stand there more than once"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure_sensitivity(stand, error, arguments[0], **arguments[1])
    for options, message in [
        (dict(budget=1), "budget=1 .* is not allowed: at least"),
        (dict(size=nan), "size=nan .* is not allowed"),
        (dict(equal_bits=True), "layer 'l1' has no bits that weights and activations share"),
        (dict(near=base), "radius=None is not allowed"),
        (dict(near=base, radius=-1), "radius=-1 is not allowed"),
        (dict(radius=True, near=base), "radius=True is not allowed"),
        (dict(equal_bits=1), "equal_bits=1 is not allowed: True or False"),
        (dict(budget=True), "budget=True is not allowed"),
    ]:
        with pytest.raises(ValueError, match=message):
            solve(stand, table, **options)
    for options in (dict(smooth=1), dict(equal_bits="yes")):
        for search in (assignment, partial(front, budgets=[1e9])):
            with pytest.raises(ValueError, match=r"=.* is not allowed: True or False"):
                search(stand, error, **options)
    for budgets in ([], 3e9, "3e9", None, numpy.array(3e9), numpy.float64(3e9), torch.tensor(3e9)):
        with pytest.raises(ValueError, match=r"budgets=.* is not allowed: one or more BitOPs"):
            front(stand, error, budgets)
    with pytest.raises(ValueError, match=r"table='a.csv' is no Sensitivity: read a file by"):
        front(stand, error, [3e9], "a.csv")
    with pytest.raises(ValueError, match="rounds=-1 is not allowed"):
        assignment(stand, error, base=base, rounds=-1)


@pytest.mark.parametrize("budgets", [numpy.array([300.0, 400.0]), torch.tensor([300.0]).tolist()])
def test_budgets_come_from_numpy_too(budgets):
    stand, error = Stand((9, 4, 6), [((2, 3, 4),) * 2] * 3), made_up_error(0)
    assert front(stand, error, budgets) == front(stand, error, list(map(float, budgets)))


def test_a_refused_limit_is_written_with_all_digits():
    stand = Stand((4434567, 1), [((1,), (1,))] * 2)
    with pytest.raises(ValueError, match=r"budget=4434567\.5 .* at least 4434568 "):
        front(stand, made_up_error(0), [4434567.5])
    with pytest.raises(ValueError, match=r"budget=4434567\.5 .* at least 4434568 "):
        front(stand, made_up_error(0), [numpy.float64(4434567.5)])


def test_assignment_searches_a_supernet(supernet):
    error = batch_error(supernet, *images(32, seed=2).tensors)
    budget = (bitops(supernet.table, supernet.uniform(3)) + 1) // 1
    path = assignment(supernet, error, budget, rounds=1)
    assert path[0].config == largest(supernet.candidates)
    assert path[-1].bitops <= budget and path[-1].error == error(path[-1].config)
    size = model_size(supernet.table, supernet.uniform(2)) * 1.2
    found = assignment(supernet, error, size=size, equal_bits=True)[-1].config
    assert model_size(supernet.table, found) <= size
    assert all(bits.weight == bits.act for bits in found.values())


def test_only_what_c_code_writes_while_it_is_silent_is_dropped(capfd):
    c = ctypes.CDLL(None)
    c.puts(b"before")
    with pytest.raises(RuntimeError), silent_c_code():
        c.puts(b"debugging line")
        raise RuntimeError
    c.puts(b"after")
    c.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"
