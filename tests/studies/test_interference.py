"""Bit-width interference of two weights against a reference that computes one number at a time."""

import itertools
import math
import statistics
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from naive import naive_lsq

from mpqlib.report import claims
from mpqlib.studies import interference
from mpqlib.studies.interference import READINGS, Settings

FEW = Settings(steps=60, batch=4, lr=0.05, noise=0.1)
OFF, ON = range(2)  # kinds of optimum
SETTINGS = [
    FEW,
    replace(FEW, momentum=0.0),
    replace(FEW, noise=0.0),
    replace(FEW, full_batch=True),
    replace(FEW, shared=[2]),
    replace(FEW, shared=[2, 3, 5]),
    replace(FEW, random_start=True),
]


def naive_gradient(w, bits, target, A, b):
    """w_hat and the gradient A (w_hat - w*) - b of one pass, one number at a time."""
    quantized = [naive_lsq(weight, 1 / 2 ** (bits - 1), bits, True) for weight in w]
    errors = [quantized[i][0] - target[i] for i in range(2)]
    gradient = [
        quantized[i][1] * (A[i][0] * errors[0] + A[i][1] * errors[1] - b[i]) for i in (0, 1)
    ]
    return [w_hat for w_hat, _, _ in quantized], gradient


def naive_descend(given, settings, second_bits, seed, optimum):
    """Rows of w, w_hat and the 4-bit gradient of one problem before each update."""
    target, w = given.target[seed, optimum].tolist(), given.start[seed, optimum].tolist()
    velocity, rows = [0.0, 0.0], []
    for t in range(settings.steps):
        A, b = given.A[t, seed, 0].tolist(), given.b[t, seed, 0].tolist()
        w_hat, gradient = naive_gradient(w, 4, target, A, b)
        rows.append((list(w), w_hat, gradient))
        total = list(gradient)
        if second_bits:
            bits = second_bits[math.floor(given.draws[t, seed].item() * len(second_bits))]
            second = naive_gradient(w, bits, target, A, b)[1]
            total = [total[i] + second[i] for i in range(2)]
        for i in range(2):
            velocity[i] = settings.momentum * velocity[i] + total[i]
            w[i] -= settings.lr * velocity[i]
    return rows


def variance(values):
    """Mean squared distance from the mean."""
    return statistics.pvariance(list(values))


def naive_read(rows, target):
    """All readings of the second half of the rows, written from their formulas."""
    rows = rows[len(rows) // 2 :]
    w, w_hat, g = ([row[k] for row in rows] for k in range(3))
    pairs = list(itertools.pairwise(rows))
    extents = [max(x[i] for x in w) - min(x[i] for x in w) for i in range(2)]
    lengths = [math.hypot(*x) for x in g]
    units = [[x[i] / n for i in range(2)] for x, n in zip(g, lengths, strict=True) if n > 0]
    changes = sum(a[1][i] != b[1][i] for a, b in pairs for i in range(2))
    return {
        "spread": math.sqrt(sum(variance(x[i] for x in w) for i in range(2))),
        "movement": statistics.fmean(math.dist(a[0], b[0]) for a, b in pairs),
        "extent": math.hypot(*extents),
        "distance": statistics.fmean(math.dist(x, target) for x in w_hat),
        "crossings": 100 * changes / len(pairs),
        "direction_variance": sum(variance(u[i] for u in units) for i in range(2)) if units else 0,
        "norm_variance": variance(lengths),
        "gradient_variance": sum(variance(x[i] for x in g) for i in range(2)),
    }


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_and_readings_follow_their_equations(settings):
    given, arms = interference.train_arms(settings, [5, 6])
    for arm, run in arms.items():
        readings = interference.read(run, given.target)
        assert list(readings) == list(READINGS)
        for seed in range(2):
            for optimum in (OFF, ON):
                rows = naive_descend(given, settings, getattr(settings, arm), seed, optimum)
                for found, expected in zip(run, zip(*rows, strict=True), strict=True):
                    expected = torch.tensor(expected, dtype=torch.float64)
                    torch.testing.assert_close(found[:, seed, optimum], expected)
                expected = naive_read(rows, given.target[seed, optimum].tolist())
                found = {name: float(values[seed, optimum]) for name, values in readings.items()}
                assert found == pytest.approx(expected, abs=1e-12)


def test_arm_without_second_pass_follows_the_4_bit_loss_alone():
    given = interference.draw_problems(FEW, [0])
    run = interference.descend(given, FEW, [])
    rows = naive_descend(given, FEW, [], 0, OFF)
    w = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(run.w[:, 0, OFF], w)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantizer_agrees_with_lsq(bits):
    step = interference.fixed_step(bits)
    ends = torch.tensor([-2.0, -1.0, -1 + step / 2, 0.0, 1 - step, 1.0], dtype=torch.float64)
    w = torch.cat([ends, torch.randn(200, dtype=torch.float64)])
    w_hat, slope = interference.quantize_at(w, bits)
    expected = [naive_lsq(weight, step, bits, True)[:2] for weight in w.tolist()]
    assert list(zip(w_hat.tolist(), slope.tolist(), strict=True)) == expected


def test_each_weight_may_have_its_own_bit_width():
    w, bits = torch.randn(2, 50, dtype=torch.float64), torch.tensor([[2], [4]])
    both = interference.quantize_at(w, bits)
    for row, b in enumerate((2, 4)):
        for found, expected in zip(both, interference.quantize_at(w[row], b), strict=True):
            assert torch.equal(found[row], expected)


def test_2_bit_grid_is_part_of_the_4_bit_grid():
    w = torch.randn(500, dtype=torch.float64)
    w_hat, _ = interference.quantize_at(w, 2)
    assert torch.equal(interference.quantize_at(w_hat, 4)[0], w_hat)


def test_targets_lie_on_and_off_the_grid():
    given = interference.draw_problems(FEW, range(50))
    on, off = given.target[:, ON], given.target[:, OFF]
    assert torch.equal(interference.quantize_at(on, 4)[0], on)
    assert torch.equal(interference.quantize_at(off, 4)[0], on)
    assert not (off == on).any()


def test_problem_depends_on_its_seed_alone():
    some, others = (interference.draw_problems(FEW, seeds) for seeds in ([1, 2], [2, 3]))
    for a, b in zip(some, others, strict=True):
        seeds = 0 if len(a) == 2 else 1  # of (seeds, ...) or (steps, seeds, ...)
        assert torch.equal(a.select(seeds, 1), b.select(seeds, 0))
        assert not torch.equal(a.select(seeds, 0), b.select(seeds, 1))


def test_start_is_the_optimum_or_random():
    settled, random = (
        interference.draw_problems(replace(FEW, random_start=value), range(20))
        for value in (False, True)
    )
    assert torch.equal(settled.start, settled.target)
    assert torch.equal(random.target, settled.target)
    assert torch.equal(random.start[:, ON], random.start[:, OFF])
    assert not (random.start == random.target).any()


def test_gradient_is_that_of_the_mean_squared_error():
    settings = Settings(steps=4, batch=20000, noise=0.0)
    given = interference.draw_problems(settings, [0])
    # For x ~ N(0, I), the gradient of E (x (w_hat - w*))^2 is 2 (w_hat - w*)
    torch.testing.assert_close(
        given.A[:, 0, 0], 2 * torch.eye(2, dtype=torch.float64).expand(4, 2, 2), atol=0.1, rtol=0
    )
    assert not given.b.any()
    noisy = interference.draw_problems(Settings(steps=4000, batch=10, noise=0.3), [0])
    assert noisy.b.std().item() == pytest.approx(2 * 0.3 / math.sqrt(10), rel=0.05)


def test_full_batch_repeats_one_batch():
    given = interference.draw_problems(replace(FEW, full_batch=True), [0, 1])
    assert (given.A[0] == given.A).all() and (given.b == given.b[0]).all()
    fresh = interference.draw_problems(FEW, [0, 1])
    assert not (fresh.A[1:] == fresh.A[:-1]).any()


def test_4_bits_alone_rest_at_an_optimum_on_the_grid():
    settings = replace(FEW, noise=0.0)
    given, arms = interference.train_arms(settings, range(20))
    for name, values in interference.read(arms["alone"], given.target).items():
        assert not values[:, ON].any(), name
        assert values[:, OFF].all(), name


def shaped(gradients):
    """Rows of one problem as (steps, seeds, optima, 2)."""
    return torch.tensor(gradients, dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize(
    "gradients, expected",
    [
        ([[0, 1], [0, 5], [0, 0.1]], 0),  # one direction, whatever the lengths
        ([[1, 0], [-7, 0]], 1),  # opposite
        ([[1, 0], [0, 2]], 0.5),  # mean (1/2, 1/2)
        ([[3, 4], [3, -4]], 1 - 0.36),  # mean (0.6, 0)
        ([[1, 0], [0, 0]], 0),  # a zero gradient has no direction
        ([[0, 0], [3, 4], [0, 0], [3, -4]], 1 - 0.36),
        ([[0, 0], [0, 0]], 0),  # no gradient: nothing varies
    ],
)
def test_direction_variance(gradients, expected):
    found = interference.direction_variance(shaped(gradients))
    assert found.shape == (1, 1) and found.item() == pytest.approx(expected)


def test_direction_variance_is_never_negative():
    lengths = torch.rand(100, 200, 1, 1, dtype=torch.float64)
    directions = torch.randn(200, 1, 2, dtype=torch.float64)  # one for each seed
    found = interference.direction_variance(lengths * directions)
    assert (found >= 0).all() and (found < 1e-12).all()


def test_direction_variance_ignores_lengths_and_rotations():
    gradients = torch.randn(40, 3, 2, 2, dtype=torch.float64)
    scaled = gradients * torch.rand(40, 3, 2, 1, dtype=torch.float64)
    turned = gradients @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    expected = interference.direction_variance(gradients)
    assert ((expected > 0) & (expected < 1)).all()
    for other in (scaled, turned, torch.cat([gradients, torch.zeros(9, 3, 2, 2)])):
        torch.testing.assert_close(interference.direction_variance(other), expected)


@pytest.mark.parametrize(
    "w_hat, per_100",
    [
        ([[1, 1], [1, 1], [1, 1]], 0),
        ([[1, 1], [2, 1], [2, 1]], 50),  # one change, two updates
        ([[1, 1], [2, 0], [1, 3]], 200),  # both weights, both updates
        ([[-2, 0], [1, 0]], 100),  # a change is one, however far
    ],
)
def test_crossings(w_hat, per_100):
    assert interference.count_crossings(shaped(w_hat)).item() == per_100


CASES = {"primary": FEW, "always 2 bits": replace(FEW, shared=[2])}


@pytest.fixture
def metrics():
    return interference.collect_readings(CASES, range(6))


def test_metrics_hold_each_problem_once(metrics):
    table = metrics.set_index(["setting", "optimum", "arm", "seed"])
    assert len(table) == 2 * 2 * 2 * 6 and table.index.is_unique
    alone = [table.loc[(setting, slice(None), "alone")] for setting in CASES]
    pd.testing.assert_frame_equal(*alone)  # the same arm on the same problems
    given, arms = interference.train_arms(CASES["always 2 bits"], [4])
    row = table.loc[("always 2 bits", "on the grid", "shared", 4)]
    expected = interference.read(arms["shared"], given.target)
    assert row.to_dict() == pytest.approx({k: float(v[0, ON]) for k, v in expected.items()})


def test_claims_state_that_each_reading_rises(metrics):
    stated = interference.reading_claims("primary", "on the grid")
    assert [claim.value for claim in stated] == list(READINGS)
    chosen = metrics[(metrics["setting"] == "primary") & (metrics["optimum"] == "on the grid")]
    means = chosen.groupby("arm")[list(READINGS)].mean()
    for claim in stated:
        found = claims.assess(metrics, claim)
        assert (found.arm, found.base) == pytest.approx(
            (means.loc["shared", claim.value], means.loc["alone", claim.value])
        )
        assert claim.sign == 1 and claim.source == "paper"


def test_typical_seed_is_nearest_to_both_medians():
    spread = {3: 4.0, 8: 1.0, 9: -3.0, 11: 0.0, 20: 2.0}  # median: seed 8
    direction = {3: 0.5, 8: 0.9, 9: 0.1, 11: 0.4, 20: 0.45}  # median: seed 20
    rows = []
    for seed in spread:  # ranks from the medians: 2 + 1, 0 + 2, 2 + 2, 1 + 1, 1 + 0
        values = {"spread": spread[seed], "direction_variance": direction[seed]}
        rows.append({"seed": seed, "arm": "shared"} | {k: v + 7 for k, v in values.items()})
        rows.append({"seed": seed, "arm": "alone", "spread": 7.0, "direction_variance": 7.0})
    assert interference.typical_seed(pd.DataFrame(rows)) == 20


def test_typical_runs_are_those_of_the_typical_seeds(metrics):
    primary = metrics[metrics["setting"] == "primary"]
    runs = interference.typical_runs(FEW, primary)
    assert list(runs) == list(interference.OPTIMA)
    for optimum, (target, arms) in runs.items():
        chosen = primary[primary["optimum"] == optimum]
        seed = interference.typical_seed(chosen)
        row = chosen[(chosen["seed"] == seed) & (chosen["arm"] == "shared")].squeeze()
        run = arms["shared"]
        assert run.w.shape == (30, 2) and target.shape == (2,)
        assert float(interference.sum_variances(run.w).sqrt()) == pytest.approx(row["spread"])
        distance = float((run.w_hat - target).norm(dim=-1).mean())
        assert distance == pytest.approx(row["distance"])


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_no_seed_and_repeated_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match="seeds="):
        interference.collect_readings({"primary": FEW}, seeds)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 3},
        {"batch": 0},
        {"lr": 0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"noise": -0.1},
        {"alone": [1]},
        {"shared": [2, 9]},
    ],
)
def test_impossible_settings_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed"):
        Settings(**wrong)


def made_up(differences):
    """Metrics of one set-up in which all readings have the given differences, a seed each."""
    rows = [
        {"setting": "made up", "optimum": optimum, "arm": arm, "seed": seed}
        | dict.fromkeys(READINGS, difference if arm == "shared" else 0.0)
        for optimum in interference.OPTIMA
        for seed, difference in enumerate(differences)
        for arm in interference.ARM_NAMES
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "differences, sign",
    [
        ([1.0, 1.1, 0.9, 1.2, 1.0], 1),
        ([-1.0, -1.1, -0.9, -1.2, -1.0], -1),
        ([1.0, -1.0, 0.5, 2.0, -2.0], 0),
        ([0.0] * 5, 0),
    ],
)
def test_signs_are_those_of_the_intervals(differences, sign):
    rows = made_up(differences)
    table = interference.sign_table(rows[rows["optimum"] == "on the grid"])
    assert list(table.index) == list(READINGS) and list(table) == ["made up"]
    assert (table == sign).all(axis=None)


def test_fig1_shows_both_kinds_of_optimum(metrics):
    runs = interference.typical_runs(FEW, metrics[metrics["setting"] == "primary"])
    figure = interference.draw_fig1(runs)
    assert len(figure.axes) == 6
    for row, optimum in enumerate(interference.OPTIMA):
        a, b, c = figure.axes[3 * row : 3 * row + 3]
        assert [axis.get_title()[:3] for axis in (a, b, c)] == ["(a)", "(b)", "(c)"]
        assert optimum in a.get_ylabel() and b.get_ylabel() and a.get_xlabel()
        target, arms = runs[optimum]
        assert f"spread {float(interference.sum_variances(arms['shared'].w).sqrt()):.3f}" in (
            b.get_title()
        )
        for axis, run in zip((a, b), arms.values(), strict=True):
            low, high = torch.tensor([axis.get_xlim(), axis.get_ylim()]).T
            points = torch.cat([run.w, target[None]])
            assert ((low < points) & (points < high)).all()
    plt.close("all")


def test_fig1_marks_an_arm_without_gradient():
    settings = replace(FEW, noise=0.0)
    runs = interference.typical_runs(
        settings, interference.collect_readings({"rest": settings}, [0, 1, 2])
    )
    polar = interference.draw_fig1(runs).axes[5]
    assert [text.get_text() for text in polar.texts] == ["no gradient"]
    plt.close("all")


@pytest.mark.parametrize("difference, symbol", [(1, "\u25b2"), (-1, "\u25bc"), (0, "?")])
def test_picture_of_signs_has_a_row_for_each_reading(difference, symbol):
    figure = interference.draw_signs(made_up([difference] * 5))
    left, right = figure.axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert [label.removesuffix(" (primary)") for label in labels] == list(READINGS.values())
    marked = [label for label in labels if label.endswith(" (primary)")]
    assert marked == [f"{READINGS[name]} (primary)" for name in interference.PRIMARY]
    assert [text.get_text() for text in right.texts] == [symbol] * len(READINGS)
    plt.close("all")
