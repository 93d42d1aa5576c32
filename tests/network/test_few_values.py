"""Binary and ternary weights against a naive reference, one number at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpqlib.network.bits import BitConfig, Candidates, largest
from mpqlib.network.cost import bitops, model_size
from mpqlib.network.quantizer import BINARY, TERNARY, Quantizer, ScaledQuantizer
from mpqlib.network.supernet import Supernet
from mpqlib.report.policy import load_policy, save_policy
from mpqlib.search.assignment import Program, add_limit, assignment, quick_table
from mpqlib.search.sensitivity import Sensitivity

POSITION = torch.tensor([0])


def naive_binary(channel: list[float]) -> list[float]:
    """sign(w) * mean|w|, where 0 counts as positive."""
    scale = math.fsum(abs(w) for w in channel) / len(channel)
    return [-scale if w < 0 else scale for w in channel]


def naive_ternary(channel: list[float]) -> list[float]:
    """sign(w) * mean of the large |w| where |w| > 0.7 mean|w|, else 0."""
    bound = 0.7 * math.fsum(abs(w) for w in channel) / len(channel)
    kept = [abs(w) for w in channel if abs(w) > bound]
    scale = math.fsum(kept) / len(kept) if kept else 0.0
    return [math.copysign(scale, w) if abs(w) > bound else 0.0 for w in channel]


NAIVE = {BINARY: naive_binary, TERNARY: naive_ternary}


@st.composite
def weights(draw):
    """Weights (out, ...) of a linear layer or a convolution, zeros among them."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    values = st.one_of(st.just(0.0), st.floats(-4, 4).map(lambda v: round(v, 6)))
    count = math.prod(shape)
    numbers = draw(st.lists(values, min_size=count, max_size=count))
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("bits", NAIVE)
@settings(deadline=None)
@given(w=weights())
def test_values_and_gradient(bits, w):
    expected = torch.tensor([NAIVE[bits](c) for c in w.flatten(1).tolist()], dtype=w.dtype)
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype)
    w = w.clone().requires_grad_()
    w_hat = ScaledQuantizer(bits)(w, POSITION)
    w_hat.backward(upstream)
    torch.testing.assert_close(w_hat.detach(), expected.reshape(w.shape), rtol=1e-13, atol=0)
    assert torch.equal(w.grad, upstream)  # straight through


@pytest.mark.parametrize(("bits", "count"), [(BINARY, 2), (TERNARY, 3)])
def test_each_channel_has_two_or_three_values(bits, count):
    w = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        w_hat = ScaledQuantizer(bits)(w.contiguous(memory_format=layout), POSITION)
        assert [len(channel.unique()) for channel in w_hat] == [count] * 5
        torch.testing.assert_close(ScaledQuantizer(bits)(3 * w, POSITION), 3 * w_hat)


@pytest.mark.parametrize("bits", [0, 2, 1.5, None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits={bits} is not allowed"):
        ScaledQuantizer(bits)


def network() -> nn.Module:
    torch.manual_seed(0)
    inner = [nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *inner, nn.Conv2d(4, 4, 1), *head)


def supernet(bits: float, act: tuple = (8,)) -> Supernet:
    overrides = {"2": Candidates((bits,), act)}
    return Supernet(network(), torch.randn(4, 3, 5, 5), (2, 4), overrides=overrides)


@pytest.mark.parametrize("bits", NAIVE)
def test_layer_computes_with_them_and_costs_its_bits(bits):
    net = supernet(bits)
    assert isinstance(net.layers["2"].weight_quantizer, ScaledQuantizer)
    assert isinstance(net.layers["5"].weight_quantizer, Quantizer)
    config = largest(net.candidates)
    others = config.replace("2", (0, 0))
    assert bitops(net.table, config) - bitops(net.table, others) == pytest.approx(
        144 * 9 * bits * 8
    )
    extra = model_size(net.table, config) - model_size(net.table, others)
    assert extra == pytest.approx(144 * bits / 8)
    net(torch.randn(2, 3, 5, 5), config).sum().backward()
    assert bool(net.layers["2"].op.weight.grad.abs().sum() > 0)
    assert BitConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("bits", NAIVE)
def test_policies_are_stored_and_searched_around_them(bits, tmp_path):
    net = supernet(bits, act=(2, 8)).eval()
    target = BitConfig.of({"0": (8, 8), "2": (bits, 2), "5": (4, 2), "8": (8, 8)})

    def error(config: BitConfig) -> float:
        return sum(
            abs(config[n].weight - b.weight) + abs(config[n].act - b.act) for n, b in target.items()
        )

    exact = model_size(net.table, target)
    found = assignment(net, error, size=exact, smooth=False)[-1].config
    assert found == target
    path = save_policy(tmp_path, net, target)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(load_policy(path, model=network())(x), net(x, target))


@pytest.mark.parametrize("weight", [(1, 2), (1.6, 2), (1.5,), (True,), (0,), "1"])
def test_they_must_be_the_only_candidate(weight):
    overrides = {"2": Candidates(weight, (8,))}
    with pytest.raises(ValueError, match=r"overrides\['2'\]=.*(2 to 16|string).*alone"):
        Supernet(network(), torch.randn(4, 3, 5, 5), (2, 4), overrides=overrides)


def test_a_table_with_ternary_weights_comes_back(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1))
    x, own = torch.randn(2, 3, 4, 4), {"0": Candidates((TERNARY,), (2, 4))}
    supernet = Supernet(
        nn.Sequential(net, nn.Flatten()),
        x,
        (2, 4),
        edge_bits=None,
        overrides={f"0.{name}": bits for name, bits in own.items()},
    )
    table = quick_table(supernet, lambda config: model_size(supernet.table, config))
    table.save(tmp_path / "sensitivity.csv")
    assert Sensitivity.load(tmp_path / "sensitivity.csv") == table


def test_exact_limits_of_large_networks_are_met():
    # Sizes whose quotient by the unit is not exact in floating point.
    bits = {0: 8 * 338_414, 1: TERNARY * 1_343_406, 2: 2 * 2_131_457, 3: 4 * 2_131_457}
    for chosen in ((0, 1, 2), (0, 1, 3), (1, 2), (1, 3)):
        size = sum(bits[i] for i in chosen)
        program = Program()
        add_limit(program, bits, size)
        ((terms, _, high),) = program.rows
        assert high > sum(terms[i] for i in chosen) + 1e-9
