"""Adapted convolutions against numpy's SVD, counts by hand and loops over single numbers."""

import numpy as np
import pytest
import torch
from conftest import TinyNet, images
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import StdConv2d
from torch import nn
from torch.nn.utils import parametrizations

from mpqlib.files import load_weights, save_weights
from mpqlib.network.quantizer import GRANULARITIES
from mpqlib.network.supernet import Supernet
from mpqlib.studies import adapters
from mpqlib.studies.adapters import Adapted, AdaptedConv2d, load_adapted, save_adapted

CONVS = {
    "ordinary": dict(in_channels=4, out_channels=6, kernel_size=3),
    "point-wise": dict(in_channels=4, out_channels=6, kernel_size=1),
    "strided": dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding=1),
    "dilated": dict(in_channels=4, out_channels=6, kernel_size=3, dilation=2, padding=2),
    "grouped": dict(in_channels=4, out_channels=6, kernel_size=3, groups=2, padding=1),
    "depth-wise": dict(in_channels=6, out_channels=6, kernel_size=3, groups=6, padding=1),
    "two filters a channel": dict(in_channels=3, out_channels=6, kernel_size=3, groups=3),
    "reflecting": dict(in_channels=4, out_channels=6, kernel_size=(1, 3), padding=(0, 1))
    | dict(padding_mode="reflect", bias=False),
    "all": dict(in_channels=6, out_channels=6, kernel_size=(3, 2), stride=2, dilation=(1, 2))
    | dict(groups=3, padding=1),
}
each_conv = pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)


def made(options: dict, bits: int = 3, granularity: str = "channel"):
    """A float convolution in float64, its adapted copy, and images that it reads."""
    torch.manual_seed(0)
    conv = nn.Conv2d(**options).double()
    twin = nn.Conv2d(**options).double()
    twin.load_state_dict(conv.state_dict())
    x = torch.randn(2, conv.in_channels, 9, 8, dtype=torch.float64)
    return conv, AdaptedConv2d(twin, bits, granularity, 3.0), x


def naive_grid(values: list[float], deviations: float, bits: int) -> list[float]:
    """Asymmetric rounding of one range, a number at a time."""
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    low = min(0.0, max(min(values), mean - deviations * spread))
    high = max(0.0, min(max(values), mean + deviations * spread))
    if low == high:
        return [0.0] * len(values)
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    return [scale * (min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) for v in values]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.sampled_from([0.5, 1.5, 3.0]), st.floats(-3, 3))
def test_weights_are_rounded_as_number_by_number(granularity, seed, bits, deviations, shift):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2, 1, 3, generator=generator, dtype=torch.float64) + shift
    rounded = adapters.quantize_weight(weight, bits, granularity, deviations)
    rows = weight.flatten(1).tolist() if granularity == "channel" else [weight.flatten().tolist()]
    expected = [v for row in rows for v in naive_grid(row, deviations, bits)]
    assert rounded.shape == weight.shape
    assert rounded.flatten().tolist() == pytest.approx(expected, abs=1e-12)


def test_weights_of_zeros_and_float_weights_stay():
    zeros, weight = torch.zeros(2, 3, 1, 1), torch.randn(2, 3, 1, 1)
    assert torch.equal(adapters.quantize_weight(zeros, 4, "channel", 3), zeros)
    assert torch.equal(adapters.quantize_weight(weight, 32, "tensor", 3), weight)


@each_conv
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_full_rank_reproduces_the_float_convolution(options, granularity):
    conv, adapted, x = made(options, granularity=granularity)
    expected = conv(x)
    assert not torch.allclose(adapted.conv(x), expected, atol=1e-2)  # quantized
    assert torch.allclose(adapted(x), expected, atol=1e-10)
    assert torch.allclose(adapted.conv(x) + adapted.adapter()(x), expected, atol=1e-10)


@each_conv
@pytest.mark.parametrize("bits", [2, 8])
def test_two_convolutions_compute_the_same_as_one(options, bits):
    for rank in (1, 2):
        _, adapted, x = made(options)
        adapted.set_rank(rank, bits)
        both = adapted.conv(x) + adapted.adapter()(x)
        assert torch.allclose(adapted(x), both, atol=1e-10)
        assert all(len(side.unique()) <= 2**bits for side in (adapted.left, adapted.right))


@each_conv
def test_adapter_is_the_best_approximation_of_its_rank(options):
    conv, adapted, _ = made(options)
    residual = (conv.weight - adapted.conv.weight).detach().flatten(1).numpy()
    singular = np.linalg.svd(residual, compute_uv=False)
    for rank in range(1, len(singular) + 1):
        _, adapted, _ = made(options)
        adapted.set_rank(rank, 16)
        left = np.linalg.norm(residual - adapted.residual().flatten(1).numpy())
        assert left == pytest.approx(np.linalg.norm(singular[rank:]), abs=1e-3)


@each_conv
def test_component_counts_the_numbers_that_an_adapter_stores(options):
    _, adapted, _ = made(options)
    one, per_group = adapted.component, adapted.conv.weight[0].numel()
    assert one == options["out_channels"] + per_group
    adapted.set_rank(2, 16)
    stored = {v for conv in adapted.adapter() for v in conv.weight.flatten().tolist()}
    assert len(stored) <= adapted.rank * one == adapted.left.numel() + adapted.right.numel()


def test_kernel_is_its_formula():
    share, full, order = torch.tensor(0.37, dtype=torch.float64), 9, 3
    # The components are counted from 0; divided by the largest value, as the release does
    values = [1 / (1 + ((i / full) / 0.37) ** (2 * order)) ** 0.5 for i in range(full)]
    expected = [v / max(values) for v in values]
    assert adapters.butterworth(share, full, order).tolist() == pytest.approx(expected)


@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(1, 8))
def test_kernel_keeps_the_first_component_whole(full, share, order):
    share = torch.tensor(max(share, 1 / full), dtype=torch.float64)
    kernel = adapters.butterworth(share, full, order)
    assert float(kernel[0]) == 1 and bool((kernel.diff() <= 0).all())


@given(st.integers(2, 40), st.integers(0, 39))
def test_kernel_tends_to_the_hard_cut(full, kept):
    kept = 1 + kept % (full - 1)  # from 1 to full - 1; the share rounds up to it
    share = torch.tensor((kept - 0.5) / full, dtype=torch.float64)
    hard = (torch.arange(full) < kept).double()
    apart = [
        float((adapters.butterworth(share, full, order) - hard).abs().max())
        for order in (4, 32, 256, 2048)
    ]
    assert apart == sorted(apart, reverse=True) and apart[-1] < 1e-6


def test_soft_cut_weighs_both_sides():
    _, adapted, x = made(CONVS["ordinary"])
    adapted.cut_softly(0.5, order=2)
    cut = adapters.butterworth(adapted.share, adapted.rank, 2)
    weight = adapted.conv.weight + (adapted.left @ torch.diag(cut**2) @ adapted.right).view_as(
        adapted.conv.weight
    )
    assert torch.allclose(adapted(x), nn.functional.conv2d(x, weight, adapted.conv.bias))
    adapted.cut_softly(0.0, order=2)
    assert float(adapted.share.detach()) == pytest.approx(1 / adapted.rank)


def test_cost_is_counted_by_hand():
    network, example = TinyNet(), torch.randn(1, 3, 8, 8)
    adapted = Adapted(network, example, {"stem.0": 8, "depthwise": 32, "pointwise": 4})
    for name, rank in {"stem.0": 2, "depthwise": 0, "pointwise": 1}.items():
        adapted.convs[name].set_rank(rank, 8)
    weights = {"stem.0": 8 * 3 * 9, "depthwise": 8 * 9, "pointwise": 8 * 12}
    stored = 2 * (8 + 27) + 1 * (12 + 8)
    bits = 8 * weights["stem.0"] + 32 * weights["depthwise"] + 4 * weights["pointwise"] + 8 * stored
    cost, total = adapted.cost(), sum(weights.values())
    assert adapted.weights == total and adapted.ranks == {
        "stem.0": 2,
        "depthwise": 0,
        "pointwise": 1,
    }
    assert cost["added_percent"] == pytest.approx(100 * stored / total)
    assert cost["size_mb"] == pytest.approx(bits / 8e6)
    assert cost["equivalent_bits"] == pytest.approx(bits / total)
    # The stem halves height and width; all other layers see 4 x 4
    macs = 16 * (8 * weights["stem.0"] + 32 * weights["depthwise"] + 4 * weights["pointwise"])
    macs += 16 * 8 * stored  # one group: filters are not repeated
    assert cost["bitops_g"] == pytest.approx(32 * macs / 1e9)


def test_filters_that_groups_share_are_stored_once_and_run_once_a_group():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 2))
    adapted = Adapted(network, torch.randn(1, 4, 4, 4), 4)
    adapted.convs["0"].set_rank(1, 8)
    assert adapted.cost()["added_percent"] == pytest.approx(100 * (4 + 9) / 36)
    macs = 2 * 2 * (36 * 4 + (4 * 9 + 4) * 8)  # 2 x 2 outputs; bits 4 and 8
    assert adapted.cost()["bitops_g"] == pytest.approx(32 * macs / 1e9)


def test_shared_module_is_adapted_under_all_its_names():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    network = nn.Sequential(conv, nn.ReLU(), conv, nn.Flatten(), nn.Linear(48, 2))
    adapted = Adapted(network, torch.randn(1, 3, 4, 4), 4)
    assert list(adapted.convs) == ["0"] and network[0] is network[2]
    positions = 2 * 16  # both calls
    adapted.convs["0"].set_rank(0, 8)
    assert adapted.cost()["bitops_g"] == pytest.approx(32 * 4 * 81 * positions / 1e9)


def odd(name: str) -> nn.Module:
    """A network that cannot be adapted."""
    if name == "no convolution":
        return nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    first = StdConv2d(3, 3, 1) if name == "standardised" else nn.Conv2d(3, 3, 1)
    second = nn.Conv2d(3, 3, 1)
    if name == "shared":
        second.weight = first.weight
    if name == "parametrized":
        parametrizations.weight_norm(first)
    if name == "infinite":
        first.weight.data[0] = torch.inf
    if name == "half":
        first = first.half()
    return nn.Sequential(first, second, nn.Flatten())


@pytest.mark.parametrize(
    "name, message",
    {
        "no convolution": "holds no Conv2d",
        "standardised": r"'0' \(StdConv2d\) changes its weight",
        "shared": "'0' and '1' share a weight",
        "parametrized": r"layer '0' is not a plain parameter .*: torch.nn.utils.parametrize",
        "infinite": "'0' holds values that are not finite",
        "half": "the weight of '0' is torch.float16: float32 or float64 is needed",
    }.items(),
)
def test_odd_networks_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Adapted(odd(name), torch.randn(1, 3, 1, 1), 4)


def test_adapted_network_is_refused():
    adapted = Adapted(odd(""), torch.randn(1, 3, 1, 1), 4)
    with pytest.raises(ValueError, match=r"'network.0' has an adapter already"):
        Adapted(adapted, torch.randn(1, 3, 1, 1), 4)
    supernet = Supernet(TinyNet(), images(8).tensors[0], (2, 4))
    with pytest.raises(ValueError, match=r"'model.stem.0' is quantized already"):
        Adapted(supernet, torch.randn(1, 3, 8, 8), 4)


class Curious(nn.Module):
    """Reads attributes of a convolution, and normalises each image by itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
        x = x.to(self.conv.weight.dtype)
        y = self.conv(x).reshape(len(x), self.conv.out_channels, -1).mean(2)
        return y / self.conv.weight.norm()


def test_a_network_that_reads_its_convolutions_is_adapted_stored_and_loaded(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    adapted = Adapted(Curious(), x, 4)
    adapted.convs["conv"].set_rank(1, 8)
    merged = Curious()
    merged.conv.load_state_dict({"weight": adapted.convs["conv"].weight, "bias": merged.conv.bias})
    merged.conv.bias = adapted.convs["conv"].bias
    assert torch.allclose(merged(x), adapted(x), atol=1e-6)
    with pytest.raises(AttributeError, match="'AdaptedConv2d' object has no attribute 'width'"):
        adapted.convs["conv"].width  # noqa: B018
    save_adapted(tmp_path / "a", adapted)
    assert torch.equal(load_adapted(tmp_path / "a", Curious())(x), adapted(x))


@pytest.mark.parametrize(
    "bits, message",
    [
        ({"0": 4}, r"missing or unknown: \['1'\]"),
        ({"0": 4, "1": 4, "2": 4}, r"missing or unknown: \['2'\]"),
        ({"0": 4, "1": 17}, "bits of '1'"),
        (1, "bits of '0'"),
        ("4", "bits of '0'"),
        (4.5, "bits of '0'"),
    ],
)
def test_odd_bits_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        Adapted(odd(""), torch.randn(1, 3, 1, 1), bits)


class Parts(nn.Module):
    """A convolution, then another kind of layer, then a linear layer."""

    def __init__(self, part: nn.Module, shape: tuple[int, ...], width: int):
        super().__init__()
        self.conv, self.part, self.shape = nn.Conv2d(3, 4, 1, bias=False), part, shape
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        x = self.conv(x).reshape(len(x), 4, *self.shape)
        return self.last(self.part(x).flatten(1))


@pytest.mark.parametrize(
    "part, shape, width, macs",
    [
        (nn.Conv1d(4, 5, 3), (36,), 5 * 34, 34 * 5 * 4 * 3),
        (nn.ConvTranspose1d(4, 5, 3), (36,), 5 * 38, 36 * 4 * 5 * 3),
        (nn.ConvTranspose2d(4, 5, 2), (6, 6), 5 * 49, 36 * 4 * 5 * 4),
        (nn.Conv3d(4, 5, (1, 2, 2)), (1, 6, 6), 5 * 25, 25 * 5 * 4 * 4),
        (nn.ConvTranspose3d(4, 5, (1, 2, 2)), (1, 6, 6), 5 * 49, 36 * 4 * 5 * 4),
    ],
)
def test_what_stays_float_is_named(part, shape, width, macs):
    with pytest.warns(UserWarning, match=r"MACs stay in float .*: part \(convolution\)") as found:
        adapted = Adapted(Parts(part, shape, width), torch.randn(1, 3, 6, 6), 4)
    (listed,) = adapted.float_parts
    assert (listed.name, listed.macs) == ("part (convolution)", macs)
    total = 36 * 3 * 4 + macs + 2 * width
    assert listed.share == pytest.approx(macs / total)
    assert f"{macs / total:.1%} of the MACs" in str(found[0].message)


def test_linear_layers_are_no_reason_to_warn():
    assert Adapted(TinyNet(), torch.randn(1, 3, 8, 8), 4).float_parts == []


def adapted_tiny(seed: int = 0, rank: int = 2) -> Adapted:
    """TinyNet with other bits in each layer, of which one has no adapter."""
    torch.manual_seed(seed)
    bits = {"stem.0": 3, "depthwise": 32, "pointwise": 4}
    adapted = Adapted(TinyNet(), torch.randn(1, 3, 8, 8), bits, "tensor", adapter_bits=6)
    for name, own in {"stem.0": rank, "depthwise": 0, "pointwise": 1}.items():
        adapted.convs[name].set_rank(own, 6)
    return adapted


def test_an_adapted_network_is_stored_and_loaded(tmp_path):
    adapted, file, x = adapted_tiny(), tmp_path / "adapted.safetensors", torch.randn(4, 3, 8, 8)
    adapted.network.stem[1].running_mean.add_(1)
    save_adapted(file, adapted)
    other = TinyNet().train()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    loaded = load_adapted(file, other)
    assert torch.equal(loaded(x), adapted(x)) and not loaded.training
    assert (loaded.ranks, loaded.cost()) == (adapted.ranks, adapted.cost())
    assert {n: c.bits for n, c in loaded.convs.items()} == {
        "stem.0": 3,
        "depthwise": 32,
        "pointwise": 4,
    }
    assert (loaded.granularity, loaded.adapter_bits) == ("tensor", 6)
    assert other.training and all(torch.equal(before[n], v) for n, v in other.state_dict().items())


def test_a_stored_network_of_another_build_is_refused(tmp_path):
    save_adapted(file := tmp_path / "adapted.safetensors", adapted_tiny())
    with pytest.raises(ValueError, match=r"does not fit .*missing or unknown: .*'depthwise'"):
        load_adapted(file, nn.Sequential(nn.Conv2d(3, 2, 1)))
    wider = TinyNet()
    wider.pointwise = nn.Conv2d(8, 16, 1)
    with pytest.raises(ValueError, match="does not fit"):
        load_adapted(file, wider)
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapted(file, adapted_tiny())


@pytest.mark.parametrize(
    "part, other",
    {
        "stem.2": nn.SiLU(),
        "stem.1": nn.BatchNorm2d(8, eps=0.1),
        "stem.0": nn.Conv2d(3, 8, 3, 2, 1, bias=False, padding_mode="reflect"),
        "depthwise": nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=8, bias=False),
    }.items(),
)
def test_another_build_of_equal_shapes_is_refused(tmp_path, part, other):
    save_adapted(file := tmp_path / "adapted.safetensors", adapted_tiny())
    built = TinyNet()
    built.set_submodule(part, other)
    with pytest.raises(
        ValueError, match=r"does not fit .*it computes something else with the same"
    ):
        load_adapted(file, built)


def test_a_file_without_outputs_names_its_version(tmp_path):
    adapted, file = adapted_tiny(), tmp_path / "adapted.safetensors"
    save_weights(file, adapted, {"bits": {}}, adapters.FILE_KIND)
    with pytest.raises(ValueError, match=r"adapted.safetensors was written by an earlier version"):
        load_adapted(file, TinyNet())


def test_only_load_adapted_reads_an_adapted_network(tmp_path):
    file, adapted = tmp_path / "adapted.safetensors", adapted_tiny()
    save_adapted(file, adapted)
    with pytest.raises(ValueError, match="holds an adapted network, not weights"):
        load_weights(file, adapted)
    save_weights(file, adapted, {})
    with pytest.raises(ValueError, match="holds weights, not an adapted network"):
        load_adapted(file, TinyNet())
    with pytest.raises(ValueError, match=r"another shape \('network.stem.0.left'"):
        load_weights(file, adapted_tiny(rank=1))
    file.write_bytes(b"not safe")
    with pytest.raises(ValueError, match="damaged"):
        load_adapted(file, TinyNet())


def test_a_network_within_a_search_is_not_stored(tmp_path):
    adapted = adapted_tiny()
    adapted.convs["stem.0"].cut_softly(0.5, order=4)
    with pytest.raises(ValueError, match=r"the adapter of 'stem\.0' is cut softly"):
        save_adapted(tmp_path / "adapted.safetensors", adapted)
