"""Widths that meet a size, against the sizes of converted networks."""

import re

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from mpqlib import models
from mpqlib.network.bits import Candidates, largest
from mpqlib.network.cost import model_size
from mpqlib.network.supernet import Supernet
from mpqlib.network.width import inner_layers, nearest_width, solve_width, weight_bytes

FAMILIES = "resnet8_cifar", "mobilenetv2_small_cifar"
HUGE = pytest.param(10**400, id="huge")  # no float is as large


def builder(family):
    return lambda width: models.create(family, 10, width=width)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [1, 8 / 5, 3])
def test_the_network_has_the_size(family, bits):
    build, size = builder(family), 45_000
    inner = inner_layers(build(1.0))
    width = nearest_width(build, own := dict.fromkeys(inner, bits), 8, size)[0]
    network = build(width)
    overrides = {name: Candidates((bits,), (8,)) for name in inner}
    supernet = Supernet(network, torch.randn(2, 3, 8, 8), (8,), overrides=overrides)
    config = largest(supernet.candidates)
    assert {config[name].weight for name in inner} == {bits}
    assert sorted(supernet.first + supernet.last) == ["conv1", "fc"]
    found = model_size(supernet.table, config)
    assert found == pytest.approx(weight_bytes(build(width), own, 8), rel=1e-12)
    assert found == pytest.approx(size, rel=0.02)


def test_no_width_of_a_fine_grid_is_nearer():
    build = builder("resnet8_cifar")
    bits = dict.fromkeys(inner_layers(build(1.0)), 2)
    for size in (20_000, 31_100, 36_000):
        width, found = nearest_width(build, bits, 8, size)
        with torch.device("meta"):
            grid = [weight_bytes(build(width * (1 + k / 400)), bits, 8) for k in range(-30, 31)]
        assert abs(found - size) <= min(abs(other - size) for other in grid)


def test_a_size_between_two_steps_is_refused():
    bits = dict.fromkeys(inner_layers((build := builder("resnet8_cifar"))(1.0)), 8)
    sizes = range(5_000, 5_500, 100)
    misses = [s for s in sizes if abs(nearest_width(build, bits, 8, s)[1] / s - 1) > 0.01]
    assert misses
    with pytest.raises(ValueError, match=r"within 1%: the nearest is \d+ bytes, at width 0\.\d+"):
        solve_width(build, bits, 8, misses[0])
    width = solve_width(build, bits, 8, weight_bytes(build(1.0), bits, 8))
    assert weight_bytes(build(width), bits, 8) == weight_bytes(build(1.0), bits, 8)


def test_layers_that_share_a_weight_store_it_once():
    a, b, last = torch.nn.Conv2d(3, 3, 3), torch.nn.Conv2d(3, 3, 3), torch.nn.Linear(3, 2)
    b.weight = a.weight
    network = torch.nn.Sequential(a, b, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), last)
    for bits, numbers in (({"0": 4, "1": 4}, 4 * 81), ({"0": 4, "1": 2}, 6 * 81)):
        assert weight_bytes(network, bits, 8) == (numbers + 8 * 6) / 8


def test_weights_that_are_computed_in_each_access_are_counted():
    layers = [weight_norm(torch.nn.Conv2d(4, 4, 3)) for _ in range(6)]
    assert weight_bytes(torch.nn.Sequential(*layers), {}, 8) == 6 * 4 * 4 * 9


@pytest.mark.parametrize("size", [1, 1e12])
def test_a_size_that_no_width_reaches_is_refused(size):
    with pytest.raises(ValueError, match=r"size=.* is not allowed: no width from"):
        nearest_width(builder("resnet8_cifar"), {}, 8, size)


@pytest.mark.parametrize("size", [-5, 0, float("nan"), "24 kB", None, True, HUGE, 1j])
def test_a_size_that_is_no_size_is_named(size):
    with pytest.raises(ValueError, match=re.escape(f"size={size!r} is not allowed: bytes, a n")):
        nearest_width(builder("resnet8_cifar"), {}, 8, size)


@pytest.mark.parametrize(
    ("bits", "edge_bits", "message"),
    [
        ({"conv9": 2}, 8, r"bits name no layer: \['conv9'\]"),
        ({"conv1": "2"}, 8, "bits of 'conv1' are '2': a number above 0"),
        ({"conv1": 0}, 8, "bits of 'conv1' are 0"),
        ({"conv1": float("nan")}, 8, "bits of 'conv1' are nan"),
        ({}, None, "bits of 'edge_bits' are None"),
        ({}, True, "bits of 'edge_bits' are True"),
    ],
)
def test_bits_that_are_no_bits_are_named(bits, edge_bits, message):
    with pytest.raises(ValueError, match=message):
        nearest_width(builder("resnet8_cifar"), bits, edge_bits, 20_000)


@pytest.mark.parametrize("family", FAMILIES)
def test_width_multiplies_channels_and_one_changes_nothing(family):
    wide, plain = models.create(family, 7, width=2.5), models.create(family, 7)
    pairs = zip(wide.modules(), plain.modules(), strict=True)
    convs = [(w, p) for w, p in pairs if isinstance(p, torch.nn.Conv2d)]
    assert all(w.out_channels == round(2.5 * p.out_channels) for w, p in convs)
    assert all((w.groups > 1) == (p.groups > 1) for w, p in convs)
    assert any(p.groups > 1 for _, p in convs) == family.startswith("mobilenetv2")
    assert wide(torch.randn(2, 3, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("resnet8_cifar", 0, "width=0 is not allowed: a number above 0"),
        ("resnet8_cifar", "2", "width='2' is not allowed"),
        ("resnet8_cifar", float("nan"), "width=nan is not allowed"),
        ("mobilenet_v2", 0.5, r"width=0.5 of 'mobilenet_v2' is not allowed: one of \['resnet8"),
    ],
)
def test_widths_that_are_not_allowed(name, width, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, 10, width=width)
