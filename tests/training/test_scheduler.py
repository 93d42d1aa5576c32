"""Turbulence against a count bin by bin, and the rule that freezes bit-widths."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from mpqlib.network.bits import Candidates
from mpqlib.network.layers import QuantConvBN, QuantLinear
from mpqlib.network.supernet import LayerInfo, Supernet
from mpqlib.training.loop import TrainConfig, train
from mpqlib.training.scheduler import (
    BLOCK,
    freeze,
    freeze_share,
    frozen_bits,
    is_decision,
    turbulence,
    unstable_share,
)

BITS = range(2, 9)


def naive_unstable_share(weights: list[float], s: float, bits: int) -> float:
    """Counts, bin by bin, the weights less than an eighth of a bin from a rounding bound."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    unstable = 0
    for k in range(low, high + 1):
        lower = (k - 1 / 2) * s if k > low else -math.inf  # the end bins have one bound each
        upper = (k + 1 / 2) * s if k < high else math.inf
        inside = [w for w in weights if lower <= w < upper]
        unstable += sum(w < lower + s / 8 or w > upper - s / 8 for w in inside)
    return unstable / len(weights)


@st.composite
def cases(draw, places):
    """Weights, step and bits; `places` draws v = w / s from the grid's smallest and largest."""
    bits = draw(st.sampled_from(BITS))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    dyadic = st.integers(-8, 4).map(lambda power: 2.0**power)
    s = draw(dyadic if places is sixty_fourths else st.floats(1e-4, 1e2))
    v = draw(st.lists(places(low - 2, high + 2), min_size=1, max_size=40))
    return torch.tensor([place * s for place in v], dtype=torch.float64), s, bits


def sixty_fourths(low: int, high: int):
    """Numbers that floats hold exactly, among them every bound of the definition."""
    return st.integers(64 * low, 64 * high).map(lambda n: n / 64)


def off_the_bounds(low: int, high: int):
    """Any numbers that are not so near a bound that a rounding error matters."""
    fraction = st.one_of(
        st.floats(-0.499, -0.376), st.floats(-0.374, 0.374), st.floats(0.376, 0.499)
    )
    return st.tuples(st.integers(low, high), fraction).map(sum)


@settings(deadline=None)
@given(st.one_of(cases(sixty_fourths), cases(off_the_bounds)))
def test_unstable_share_equals_the_count_bin_by_bin(case):
    weight, s, bits = case
    before = weight.clone()
    share = unstable_share(weight, torch.tensor(s, dtype=weight.dtype), bits)
    assert float(share) == pytest.approx(naive_unstable_share(weight.tolist(), s, bits), rel=1e-6)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("v", "unstable"),
    [  # 2 bits: the grid is -2, -1, 0, 1, the rounding bounds -1.5, -0.5, 0.5
        (-9.0, False),
        (-2.45, False),  # outer side of an end bin: no bound there
        (-1.65, False),
        (-1.625, False),  # exactly 3/8 from -2
        (-1.6, True),
        (-1.5, True),
        (-1.4, True),
        (-1.0, False),
        (0.0, False),
        (0.374, False),
        (0.376, True),
        (0.5, True),
        (0.624, True),
        (0.626, False),
        (1.45, False),
        (9.0, False),
    ],
)
def test_worked_examples(v, unstable):
    assert float(unstable_share(torch.tensor([v]), torch.tensor(1.0), 2)) == unstable


LAYOUTS = {
    "vector": lambda w: w,
    "matrix": lambda w: w.reshape(4, -1),
    "transposed": lambda w: w.reshape(4, -1).T,
    "convolution": lambda w: w.reshape(-1, 4, 2, 2),
    "channels_last": lambda w: w.reshape(-1, 4, 2, 2).contiguous(memory_format=torch.channels_last),
}


@pytest.fixture(scope="module")
def large() -> tuple[Tensor, float]:
    """More weights than a block holds, and their unstable share."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(BLOCK + 4816, generator=generator, dtype=torch.float64)
    weight[BLOCK:] = 0.45  # all unstable, to see that the second block counts
    return weight, naive_unstable_share(weight.tolist(), 1.0, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_tensors_of_any_layout(layout, large):
    weight, expected = large
    share = unstable_share(LAYOUTS[layout](weight), torch.tensor(1.0), 2)
    assert float(share) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", [(2, 3, 4, 5, 6), (3, 4, 5, 6), (4,), (2, 8)])
def test_turbulence_is_the_mean_of_share_over_bits(bits):
    torch.manual_seed(0)
    candidates = Candidates(bits, (4, 6))
    convolution = QuantConvBN(nn.Conv2d(4, 8, 3).double(), torch.randn(2, 4, 5, 5), candidates)
    linear = QuantLinear(nn.Linear(30, 20).double(), torch.randn(2, 30), candidates)
    for layer in (convolution, linear):
        weights = layer.op.weight.flatten().tolist()
        shares = [
            naive_unstable_share(weights, layer.weight_quantizer.step(b).item(), b) for b in bits
        ]
        expected = sum(share / b for share, b in zip(shares, bits, strict=True)) / len(bits)
        assert expected > 0
        assert turbulence(layer, bits) == pytest.approx(expected, rel=1e-6)
        if len(bits) > 1:  # without its smallest bit-width, a layer is less turbulent
            rest = sum(share / b for share, b in zip(shares[1:], bits[1:], strict=True))
            assert turbulence(layer, bits[1:]) == pytest.approx(rest / len(bits[1:]), rel=1e-6)


def same(*bits: int) -> Candidates:
    return Candidates(bits, bits)


ORDINARY, DEPTHWISE, EDGE = same(2, 3, 4, 5, 6), same(3, 4, 5, 6), same(8)
FROZEN = {ORDINARY: same(3, 4, 5, 6), DEPTHWISE: same(4, 5, 6)}


@st.composite
def networks(draw):
    """Full candidate sets by layer, edges among them, and turbulences that all differ."""
    kinds = draw(st.lists(st.sampled_from([ORDINARY, DEPTHWISE, EDGE]), max_size=12))
    turbulences = draw(
        st.lists(st.floats(0, 1), min_size=len(kinds), max_size=len(kinds), unique=True)
    )
    names = [f"layer{i}" for i in range(len(kinds))]
    return dict(zip(names, kinds, strict=True)), dict(zip(names, turbulences, strict=True))


@given(networks(), st.floats(0, 1))
def test_only_the_most_turbulent_layers_lose_their_smallest_bits(network, share):
    full, turbulences = network
    current = freeze(full, turbulences, share)
    assert list(current) == list(full)
    ranked = [name for name in full if full[name] != EDGE]
    frozen = [name for name in ranked if current[name] != full[name]]
    assert all(current[name] == EDGE for name in full if name not in ranked)
    assert all(current[name] == FROZEN[full[name]] for name in frozen)
    assert len(frozen) == math.floor(share * len(ranked))
    calmest_frozen = min((turbulences[name] for name in frozen), default=math.inf)
    assert all(turbulences[name] < calmest_frozen for name in set(ranked) - set(frozen))


@given(networks(), networks())
def test_layers_that_are_frozen_no_more_get_their_full_set_back(network, other):
    full, turbulences = network
    before = dict(full)
    assert freeze(full, turbulences, 1.0) == {n: FROZEN.get(c, c) for n, c in full.items()}
    assert freeze(full, turbulences, 0.0) == before
    assert full == before


@pytest.mark.parametrize(
    ("share", "frozen"),
    [(0, ""), (0.25, "b"), (0.49, "b"), (0.5, "bd"), (0.75, "bda"), (1, "abcd")],
)
def test_share_counts_layers_from_the_most_turbulent_one(share, frozen):
    full = dict.fromkeys("abcd", ORDINARY)
    current = freeze(full, {"a": 0.02, "b": 0.4, "c": 0.01, "d": 0.03}, share)
    assert {n for n in full if current[n] == FROZEN[ORDINARY]} == set(frozen)
    assert {n for n in full if current[n] == ORDINARY} == set("abcd") - set(frozen)


def test_layers_with_one_weight_candidate_neither_change_nor_count():
    full = {"first": EDGE, "a": ORDINARY, "b": DEPTHWISE, "fixed": Candidates((4,), (2, 4))}
    # They need no turbulence, and a high one of theirs takes no other layer's place.
    for turbulences in ({"a": 0.2, "b": 0.1}, {"first": 9.0, "a": 0.2, "b": 0.1, "fixed": 9.0}):
        assert freeze(full, turbulences, 0.5) == full | {"a": FROZEN[ORDINARY]}


@pytest.mark.parametrize(
    ("depthwise", "bits", "left"),
    [  # the release's sets, and others of 2 to 7 bits
        (False, (2, 3, 4, 5, 6), (3, 4, 5, 6)),
        (False, (3, 4, 5, 6), (3, 4, 5, 6)),
        (False, (4, 5, 6), (4, 5, 6)),
        (False, (2, 4, 7), (4, 7)),
        (True, (3, 4, 5, 6), (4, 5, 6)),
        (True, (4, 5, 6), (4, 5, 6)),
        (True, (2, 3), (3,)),
    ],
)
def test_only_2_bits_are_frozen_and_3_in_depthwise_convolutions(depthwise, bits, left):
    info = LayerInfo("a", 1, 1, depthwise, same(*bits))
    full, turbulences = {"a": info.candidates, "b": ORDINARY}, {"a": 0.2, "b": 0.1}
    most = frozen_bits([info, LayerInfo("b", 1, 1, False, ORDINARY)])
    # The most turbulent layer takes its place even if it has nothing to freeze.
    assert freeze(full, turbulences, 0.5, most=most) == {"a": same(*left), "b": ORDINARY}
    assert freeze(full, turbulences, 0.5) == {"a": same(*bits[1:]), "b": ORDINARY}


@pytest.mark.parametrize("freeze_any", [False, True])
def test_training_with_bits_from_3_freezes_only_if_told_to(freeze_any):
    x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(6)]
    supernet = Supernet(nn.Sequential(*convs, nn.Flatten(), nn.Linear(108, 3)), x, bits=(3, 4))
    config = TrainConfig(epochs=1, batch_size=4, lr=1e-4, freeze_any=freeze_any)
    _, history = train(supernet, TensorDataset(x, torch.arange(16) % 3), config)
    frozen = [name for decision in history[0]["decisions"] for name in decision["frozen"]]
    assert len(history[0]["decisions"]) > 0 and bool(frozen) == freeze_any


@pytest.mark.parametrize(
    ("full", "activations", "expected"),
    [
        (ORDINARY, True, same(3, 4, 5, 6)),
        (ORDINARY, False, Candidates((3, 4, 5, 6), (2, 3, 4, 5, 6))),
        (Candidates((2, 4), (2, 3, 4)), True, Candidates((4,), (2, 3, 4))),
        (Candidates((2, 4), (2, 3, 4)), False, Candidates((4,), (2, 3, 4))),
        (Candidates((2, 4), (8,)), True, Candidates((4,), (8,))),
    ],
)
def test_activations_are_frozen_only_where_both_sets_are_the_same(full, activations, expected):
    assert freeze({"a": full}, {"a": 0.1}, 1.0, activations) == {"a": expected}


@pytest.mark.parametrize("share", [-0.01, 1.01, 50, math.nan])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=r"share=.* is not allowed"):
        freeze({"a": ORDINARY}, {"a": 0.1}, share)


def test_the_share_to_freeze_falls_along_a_cosine_from_a_half_to_a_fifth():
    shares = [freeze_share(part) for part in range(5, 150)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares))
    assert shares[0] == 0.5 and 0.2 < shares[-1] < 0.202
    # Half of the decisions that fit into training have been made.
    assert freeze_share(80, 150, every=3) == pytest.approx(0.35)
    assert freeze_share(21, 32, start=6, every=2) == pytest.approx(0.35)


def test_parts_before_which_the_release_decides():
    assert [p for p in range(150) if is_decision(p)] == [*range(7, 108, 2), 119, 134, 149]


def test_parts_of_another_schedule():
    parts = [p for p in range(20) if is_decision(p, 20, 2, 3, late=0.5, late_every=4)]
    assert parts == [2, 5, 8, 11, 15, 19]


def test_training_that_ends_before_the_first_decision_never_freezes():
    assert not any(is_decision(part, 6) for part in range(6))
