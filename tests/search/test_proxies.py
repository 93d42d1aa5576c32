"""Measures of related work against naive computations."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, images
from stand import Stand
from torch import nn
from torch.func import functional_call

from mpqlib.network.bits import BitConfig, largest, smallest
from mpqlib.network.cost import bitops
from mpqlib.network.supernet import Supernet
from mpqlib.search import proxies
from mpqlib.search.assignment import solve
from mpqlib.search.proxies import (
    hessian_table,
    hessian_traces,
    lower_by_list,
    noise_error,
    noise_to_signal,
    orthogonality_table,
    rate_bits,
    similarities,
)
from mpqlib.search.sensitivity import measure_sensitivity


class Smooth(nn.Module):
    """Two layers without a ReLU's kinks, small enough for a whole Hessian."""

    def __init__(self):
        super().__init__()
        self.conv, self.middle, self.last = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 3, 2), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.middle(self.conv(x).tanh()).tanh().mean((2, 3)))


@pytest.fixture
def smooth() -> Supernet:
    torch.manual_seed(0)
    return Supernet(Smooth().double(), images(8).tensors[0].double(), (2, 3, 4), edge_bits=None)


def test_noise_is_that_of_the_outputs(supernet):
    x = images(16).tensors[0]
    supernet.eval()
    config, plain = supernet.uniform(2), copy.deepcopy(supernet)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.train()  # statistics of the batch
    with torch.no_grad():
        target, outputs = plain(x), plain(x, config)
    power = sum(float(v) ** 2 for v in target.flatten())
    noise = sum(float(a - b) ** 2 for a, b in zip(outputs.flatten(), target.flatten(), strict=True))
    assert float(noise_to_signal(outputs, target)) == pytest.approx(noise / power, rel=1e-4)
    assert noise_error(supernet, x)(config) == pytest.approx(noise / power, rel=1e-3)


def test_the_list_lowers_the_least_noise_first(supernet):
    table = measure_sensitivity(
        supernet, noise_error(supernet, images(16).tensors[0]), largest(supernet.candidates)
    )
    low = bitops(supernet.table, smallest(supernet.candidates))
    high = bitops(supernet.table, table.base)
    assert lower_by_list(supernet, table, high) == table.base
    assert lower_by_list(supernet, table, low) == smallest(supernet.candidates)
    for share in (0.2, 0.5, 0.8):
        budget = low + share * (high - low)
        found = lower_by_list(supernet, table, budget)
        # By hand: all changes in the order of their noise, until the budget holds
        bits = {name: list(pair) for name, pair in table.base.items()}
        for ((name, part, _, after, _),), _ in sorted(table.errors.items(), key=lambda e: e[1]):
            now = BitConfig.of(bits)
            if bitops(supernet.table, now) <= budget:
                break
            place = ("weight", "act").index(part)
            bits[name][place] = min(bits[name][place], after)
        assert found == BitConfig.of(bits)
        assert bitops(supernet.table, found) <= budget
    with pytest.raises(ValueError, match="budget="):
        lower_by_list(supernet, table, low - 1)


def test_the_list_never_raises_bits():
    stand = Stand((1, 1), [((2, 3, 4), (4,))] * 2)
    noise = {"l0": {2: 1, 3: 2, 4: 0}, "l1": {2: 4, 3: 3, 4: 0}}  # of l0, 2 bits come before 3

    def error(config):
        return sum(noise[name][bits.weight] for name, bits in config.items())

    table = measure_sensitivity(stand, error, largest(stand.candidates))
    found = lower_by_list(stand, table, bitops(stand.table, smallest(stand.candidates)))
    assert found == smallest(stand.candidates)
    assert lower_by_list(stand, table, 2 * 4 + 3 * 4) == BitConfig.of({"l0": (2, 4), "l1": (3, 4)})


def test_a_negative_trace_counts_as_zero(supernet, monkeypatch):
    traces = {name: -1.0 for name in supernet.layers} | {"pointwise": 2.0}
    monkeypatch.setattr(proxies, "hessian_traces", lambda *_: traces)
    rows = hessian_table(supernet, *images(8).tensors).to_frame()
    changed = set(rows.loc[rows["change"] != 0, "layer"])
    assert changed == {"pointwise"}


def test_a_table_of_ratings_predicts_their_sum(supernet):
    def rating(name, part, bits):
        return len(name) * (part == "weight") / bits + 1 / bits**2

    table = rate_bits(supernet, rating)
    table.check(supernet)
    for config in (supernet.uniform(2), supernet.uniform(3), largest(supernet.candidates)):
        total = sum(rating(n, "weight", w) + rating(n, "act", a) for n, (w, a) in config.items())
        assert table.predict(config) == pytest.approx(total)


def test_traces_are_those_of_the_whole_hessian(smooth):
    x, y = images(6).tensors
    x, probes = x.double(), 400
    weights = {f"model.{name}.op.weight": layer.op.weight for name, layer in smooth.layers.items()}
    sizes = [w.numel() for w in weights.values()]

    def loss(flat):
        parts = zip(weights.items(), flat.split(sizes), strict=True)
        own = {name: part.reshape(w.shape) for (name, w), part in parts}
        return F.cross_entropy(functional_call(smooth, own, (x,)), y)

    flat = torch.cat([w.detach().flatten() for w in weights.values()])
    whole = torch.autograd.functional.hessian(loss, flat)
    runs = [hessian_traces(smooth, x, y, probes, seed=s, batch_size=b) for s, b in ((0, 6), (1, 4))]
    start = 0
    for name, count in zip(smooth.layers, sizes, strict=True):
        own = slice(start, start + count)
        trace = float(whole[own, own].trace())
        # Variance of the sum of v_i H_ij v_j over the layer's i and all j, for random signs
        inside, rows = whole[own, own], whole[own]
        off = inside - inside.diagonal().diag()
        variance = 2 * off.square().sum() + rows.square().sum() - inside.square().sum()
        for found in runs:
            # A second batch has its own signs, so its error is smaller.
            assert abs(found[name] - trace) < 4 * math.sqrt(variance / probes)
        start += count
    assert hessian_traces(smooth, x, y, 2) == hessian_traces(smooth, x, y, 2)
    assert all(p.grad is None for p in smooth.parameters())


def test_the_hessian_table_rates_rounding_errors_of_weights(smooth):
    x, y = images(8).tensors
    traces = hessian_traces(smooth, x.double(), y, 4)
    table = hessian_table(smooth, x.double(), y, 4)
    for (move,), _ in table.errors.items():
        if move.part == "act":
            assert table.change(move) == 0
            continue
        weight = smooth.layers[move.layer].op.weight
        quantizer = smooth.layers[move.layer].weight_quantizer

        def error(bits, w=weight, q=quantizer):
            return float((q(w, q.position(bits)) - w).square().sum().detach())

        change = (error(move.after) - error(move.before)) * max(traces[move.layer], 0)
        assert table.change(move) == pytest.approx(change / weight.numel(), abs=1e-12)
    config = solve(smooth, table, bitops(smooth.table, smooth.uniform(3)), equal_bits=True)
    assert all(w == a or len(smooth.candidates[n].act) == 1 for n, (w, a) in config.items())


def naive_similarity(f, g):
    """<F F', G G'> / (|F F'| |G G'|) of matrices with centred columns, number by number."""
    f, g = f.flatten(1) - f.flatten(1).mean(0), g.flatten(1) - g.flatten(1).mean(0)
    n = len(f)
    a = [[float(f[i] @ f[j]) for j in range(n)] for i in range(n)]
    b = [[float(g[i] @ g[j]) for j in range(n)] for i in range(n)]
    dot = sum(a[i][j] * b[i][j] for i in range(n) for j in range(n))
    sizes = (math.sqrt(sum(v * v for row in m for v in row)) for m in (a, b))
    return dot / math.prod(sizes)


def test_similarities_and_worth_of_bits(smooth):
    x = images(6).tensors[0].double()
    outputs = []
    handles = [
        layer.op.register_forward_hook(lambda m, a, y: outputs.append(y.detach()))
        for layer in smooth.layers.values()
    ]
    smooth(x)
    for handle in handles:
        handle.remove()
    found = similarities(smooth, x)
    for i, f in enumerate(outputs):
        for j, g in enumerate(outputs):
            assert float(found[i, j]) == pytest.approx(naive_similarity(f, g), rel=1e-6)
    beta = 2.0
    gamma = [sum(float(found[i, j]) for j in range(3) if j != i) / 2 for i in range(3)]
    theta = [math.exp(-beta * value) for value in gamma]
    worth = [sum(theta[i:]) / (3 - i) for i in range(3)]
    table = orthogonality_table(smooth, x, beta)
    names = list(smooth.layers)
    changes = {
        name: table.change(next(m for (m,) in table.errors if m[:2] == (name, "weight")))
        for name in names
    }
    for name, value in zip(names, worth, strict=True):
        move = next(m for (m,) in table.errors if m[:2] == (name, "weight"))
        ratio = table.change(move) / changes[names[0]]
        assert ratio == pytest.approx(value / worth[0], rel=1e-6)
        assert table.change(move) > 0  # fewer bits are worth less


class TwoBranches(nn.Module):
    """Two convolutions that read the same tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.last((self.a(x) + self.b(x)).relu().mean((2, 3)))


def test_tied_layers_change_together():
    torch.manual_seed(0)
    x = images(12).tensors[0]
    supernet = Supernet(TwoBranches(), x, (2, 3, 4), tie_inputs=True)
    table = measure_sensitivity(supernet, noise_error(supernet, x), largest(supernet.candidates))
    low, high = (bitops(supernet.table, c) for c in (smallest(supernet.candidates), table.base))
    for i in range(20):
        supernet.check(lower_by_list(supernet, table, low + i / 19 * (high - low)))

    def rating(name, part, bits):
        return (1.0 if part == "act" else 0.5) * 4.0**-bits

    rated = rate_bits(supernet, rating)
    for config in (supernet.uniform(2), supernet.uniform(3)):
        total = sum(rating(n, "weight", w) + rating(n, "act", a) for n, (w, a) in config.items())
        assert rated.predict(config) == pytest.approx(total)


def test_tables_and_inputs_that_do_not_fit_are_refused(supernet):
    x, y = images(12).tensors
    error = noise_error(supernet, x)
    table = measure_sensitivity(supernet, error, largest(supernet.candidates))
    broken = replace(table, errors=table.errors | {next(iter(table.errors)): math.nan})
    with pytest.raises(ValueError, match="table holds NaN"):
        lower_by_list(supernet, broken, 1e9)
    with pytest.raises(ValueError, match="table is a function: pass one of measure_sensitivity"):
        lower_by_list(supernet, error, 1e9)
    with pytest.raises(ValueError, match="does not start from the largest bits"):
        lower_by_list(supernet, measure_sensitivity(supernet, error, supernet.uniform(2)), 1e9)
    for options in (dict(probes=0), dict(probes=True), dict(batch_size=0), dict(batch_size=True)):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value} is not allowed: a whole number"):
            hessian_traces(supernet, x, y, **options)
    with pytest.raises(ValueError, match="x holds 1 images"):
        similarities(supernet, x[:1])
    with pytest.raises(ValueError, match=r"outputs of .* are not finite"):
        similarities(supernet, x * torch.nan)
    supernet.layers["pointwise"].op.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"weights of \['pointwise'\] require no gradient"):
        hessian_traces(supernet, x, y, 1)


class Gated(Smooth):
    """`middle` only switches features on and off, so that no gradient reaches it."""

    def forward(self, x):
        features = self.conv(x).tanh()
        gates = (self.middle(features) > 0).to(x).mean((2, 3))
        return self.last(gates * features.mean((1, 2, 3))[:, None])


def test_a_layer_that_no_gradient_reaches_has_no_trace():
    x, y = images(8).tensors
    supernet = Supernet(Gated().double(), x.double(), (2, 3, 4), edge_bits=None)
    traces = hessian_traces(supernet, x.double(), y, 4)
    assert traces["middle"] == 0 != traces["conv"]


def test_a_layer_without_an_output_of_its_own_resembles_none(smooth):
    smooth.layers["middle"].op.weight.data.zero_()
    found = similarities(smooth, images(6).tensors[0].double())
    assert found.isfinite().all() and found[1].abs().max() == 0


def test_measures_run_on_a_network_with_norms(supernet):
    x, y = images(12).tensors
    for table in (hessian_table(supernet, x, y, 2), orthogonality_table(supernet, x)):
        budget = bitops(supernet.table, supernet.uniform(3))
        config = solve(supernet, table, budget, equal_bits=True)
        assert bitops(supernet.table, config) <= budget
    assert isinstance(TinyNet(), nn.Module)
