"""Bit-width interference of two weights against a reference that computes one number at a time."""

import itertools
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from mpqlib.report import claims
from mpqlib.report.paper import Claim
from mpqlib.studies import interference
from mpqlib.studies.interference import Settings

FEW = Settings(steps=30, batch=4, burn_in=10)


def naive_lsq(w: float, s: float, bits: int) -> tuple[float, float, float]:
    """w_hat, dw_hat/dw and dw_hat/ds of one signed number (LSQ, equations 1-3 and 5)."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = w / s
    if v <= low or v >= high:
        bound = low if v <= low else high
        return bound * s, 0.0, float(bound)
    return round(v) * s, 1.0, round(v) - v


def naive_gradients(w, s, bits, xs, ys):
    """Gradients of the mean squared error of one batch for both weights and for the step size."""
    quantized = [naive_lsq(weight, s, bits) for weight in w]
    d_hat = [0.0, 0.0]
    for x, y in zip(xs, ys, strict=True):
        error = sum(x[i] * quantized[i][0] for i in range(2)) - y
        for i in range(2):
            d_hat[i] += 2 * error * x[i] / len(ys)
    d_w = [d_hat[i] * quantized[i][1] for i in range(2)]
    d_s = sum(d_hat[i] * quantized[i][2] for i in range(2))
    return d_w, d_s / math.sqrt(2 * (2 ** (bits - 1) - 1))  # LSQ, section 2.2, g of two weights


def naive_train(given, settings, bits, with_bits):
    """Rows of w, w_hat and the gradient at `bits` before each update; the last step sizes."""
    w = given.start.tolist()
    s = {}
    for b in {bits, with_bits or bits}:
        s[b] = 2 * (abs(w[0]) + abs(w[1])) / 2 / math.sqrt(2 ** (b - 1) - 1)  # LSQ, section 2.1
    rows = []
    for xs, ys, draw in zip(given.x.tolist(), given.y.tolist(), given.draws.tolist(), strict=True):
        losses = [bits]
        if with_bits is not None:
            losses.append(with_bits if settings.sharing == "sum" or draw == 1 else bits)
        found = [naive_gradients(w, s[b], b, xs, ys) for b in losses]
        rows.append((list(w), [naive_lsq(weight, s[bits], bits)[0] for weight in w], found[0][0]))
        for b, (d_w, d_s) in zip(losses, found, strict=True):
            w = [w[i] - settings.lr * d_w[i] for i in range(2)]
            if settings.learn_steps:
                s[b] -= settings.lr * d_s
    return rows, s


@pytest.mark.parametrize("learn_steps", [True, False])
@pytest.mark.parametrize("sharing", ["sum", "drawn"])
@pytest.mark.parametrize("bits, with_bits", [(4, None), (4, 2), (2, 4), (3, 3), (6, 5)])
def test_training_is_what_the_equations_say(learn_steps, sharing, bits, with_bits):
    settings = Settings(60, 4, 0.1, 0.1, learn_steps, sharing, 0)
    for seed in range(3):
        given = interference.problem(settings, seed)
        run = interference.descend(given, settings, bits, with_bits)
        rows, step_sizes = naive_train(given, settings, bits, with_bits)
        for found, expected in zip(
            (run.w, run.w_hat, run.gradients), zip(*rows, strict=True), strict=True
        ):
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        assert run.step_sizes == pytest.approx(step_sizes)
        assert len(torch.unique(run.integers)) > 1
        torch.testing.assert_close(run.integers, run.integers.round())


def test_a_problem_is_its_seed_s():
    one, again, other = (interference.problem(FEW, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert one.x.shape == (30, 4, 2) and one.y.shape == (30, 4)
    for point in (one.target, one.start):
        assert point.norm().item() == pytest.approx(1)


def test_label_noise_has_the_stated_size():
    given = interference.problem(Settings(steps=200, batch=50, noise=0.3, burn_in=0), 0)
    assert (given.y - given.x @ given.target).std().item() == pytest.approx(0.3, rel=0.02)


def test_a_problem_keeps_its_points_when_settings_of_training_change():
    longer = interference.problem(Settings(steps=40, batch=8, lr=1.0, burn_in=0), 1)
    assert torch.equal(longer.start, interference.problem(FEW, 1).start)
    assert torch.equal(longer.target, interference.problem(FEW, 1).target)


@pytest.mark.parametrize(
    "gradients, variance",
    [
        ([[0, 1], [0, 5], [0, 0.1]], 0),  # one direction, whatever the lengths
        ([[1, 0], [-7, 0]], 1),  # opposite
        ([[1, 0], [0, 2]], 0.5),  # mean (1/2, 1/2)
        ([[3, 4], [3, -4]], 1 - 0.36),  # mean (0.6, 0)
        ([[1, 0], [0, 0]], 0.75),  # no direction: zeros
    ],
)
def test_direction_variance(gradients, variance):
    rows = torch.tensor(gradients, dtype=torch.float64)
    assert interference.direction_variance(rows) == pytest.approx(variance)
    if rows.norm(dim=1).min() > 0:  # the sum of the components' variances, by definition
        units = rows / rows.norm(dim=1, keepdim=True)
        assert float(units.var(0, correction=0).sum()) == pytest.approx(variance)


@pytest.mark.parametrize(
    "integers, per_100",
    [
        ([[1, 1], [1, 1], [1, 1]], 0),
        ([[1, 1], [2, 1], [2, 1]], 50),  # one change, two updates
        ([[1, 1], [2, 0], [1, 3]], 200),  # both weights, both updates
        ([[-2, 0], [1, 0]], 100),  # a change is one, however far
    ],
)
def test_crossings(integers, per_100):
    assert interference.crossings(torch.tensor(integers, dtype=torch.float64)) == per_100


def test_only_what_follows_burn_in_is_measured():
    given = interference.problem(FEW, 0)
    run = interference.descend(given, FEW, 4, 2)
    found = interference.summarise(run, given.target, FEW)
    assert found["variance"] == interference.direction_variance(run.gradients[10:])
    assert found["crossings"] == interference.crossings(run.integers[10:])
    distances = [math.dist(w_hat, given.target.tolist()) for w_hat in run.w_hat[10:].tolist()]
    assert found["distance"] == pytest.approx(math.fsum(distances) / 20)


PAIRS = list(itertools.product((2, 4), repeat=2))


def test_all_arms_of_a_seed_share_data_and_start():
    rows = interference.compare_arms(FEW, 3, PAIRS)
    assert rows == interference.compare_arms(FEW, 3, PAIRS)
    table = pd.DataFrame(rows).set_index(["bits", "with_bits", "arm"])
    assert len(table) == 12 and table.index.is_unique
    assert table.loc[(4, 2, "alone")].equals(table.loc[(4, 4, "alone")])
    assert table.loc[(4, 2, "doubled")].equals(table.loc[(4, 4, "shared")])
    given = interference.problem(FEW, 3)
    run = interference.descend(given, FEW, 4, 2)
    measured = interference.summarise(run, given.target, FEW)
    assert table.loc[(4, 2, "shared"), list(measured)].to_dict() == measured
    arms = {row["arm"] for row in interference.compare_arms(FEW, 3, [(4, 2)])}
    assert arms == {"alone", "shared"}


@pytest.fixture
def metrics(tmp_path):
    cases = {"base": (FEW, PAIRS), "slow": (Settings(30, 4, 0.01, burn_in=10), [(4, 2)])}
    return interference.collect(cases, range(6), tmp_path)


def test_a_collection_reads_stored_seeds_and_computes_the_rest(metrics, tmp_path, monkeypatch):
    cases = {"base": (FEW, PAIRS), "slow": (Settings(30, 4, 0.01, burn_in=10), [(4, 2)])}
    assert len(metrics) == 6 * (12 + 2)
    (tmp_path / "seed5.json").unlink()
    asked, study = [], interference.compare_arms
    monkeypatch.setattr(interference, "compare_arms", lambda *a: asked.append(a[1]) or study(*a))
    pd.testing.assert_frame_equal(interference.collect(cases, range(6), tmp_path), metrics)
    assert asked == [5, 5]  # once a setting
    with pytest.raises(ValueError, match=r"seed0\.json holds the result of other settings"):
        interference.collect({"base": (FEW, [(4, 2)])}, [0], tmp_path)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_no_seed_and_repeated_seeds_are_refused(seeds, tmp_path):
    with pytest.raises(ValueError, match="seeds="):
        interference.collect({}, seeds, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 1, "burn_in": 0},
        {"batch": 0},
        {"lr": 0},
        {"lr": float("nan")},
        {"noise": -0.1},
        {"sharing": "both"},
        {"burn_in": 399},
        {"burn_in": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}=.* is not allowed"):
        Settings(**wrong)


def test_pictures_have_labelled_axes(metrics):
    given = interference.problem(FEW, 0)
    runs = {
        "alone": interference.descend(given, FEW, 4),
        "shared": interference.descend(given, FEW, 4, 2),
    }
    figures = [
        interference.trajectories(runs, given.target),
        interference.directions(runs, 4, FEW.burn_in),
        interference.heat_maps(metrics),
        interference.robustness(metrics, (4, 2)),
    ]
    for figure in figures:
        left, right = figure.axes[:2]
        assert left.get_xlabel() and right.get_xlabel() and left.get_ylabel()
    heat = figures[2].axes[0]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["2", "4"]
    where = {"setting": "base", "bits": 4, "with_bits": 2}
    found = claims.assess(metrics, Claim("", "variance", "shared", "alone", 1, where=where))
    assert heat.texts[2].get_text() == f"{found.difference:+.2f}"  # row 4, column 2
    assert heat.texts[2].get_fontweight() == ("normal" if found.low <= 0 <= found.high else "bold")
    assert [label.get_text() for label in figures[3].axes[0].get_yticklabels()] == ["base", "slow"]
    plt.close("all")
