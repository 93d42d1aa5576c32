"""BitOPs and model size against the paper's figures, torch's own counter and a count by hooks."""

import random

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mpqlib.network.bits import BitConfig, Bits, Candidates
from mpqlib.network.cost import bitops, bitops_at, check_budget, layer_bitops, model_size
from mpqlib.network.supernet import LayerInfo, Supernet


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are small here: a second thread saves little, and costs much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Unusual(nn.Module):
    """Groups, strides, a layer called twice, and a linear layer that runs at many places."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=4)
        self.narrow = nn.Conv2d(8, 6, 5, dilation=2)
        self.places = nn.Linear(6, 5)

    def forward(self, x):
        x = self.twice(self.twice(self.stem(x)).relu()).relu()
        return self.places(self.narrow(x).flatten(2).transpose(1, 2)).mean(1)


MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(weights=None),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(weights=None),
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(weights=None),
    "tf_efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
    "unusual": Unusual,
}


def make_table(model: nn.Module, x: Tensor) -> list[LayerInfo]:
    return Supernet(model, x, (2,), pair_norms=False).table


# Input 224 x 224; every layer literally at the width, but the first and the last at 8/8.
@pytest.mark.parametrize(
    ("name", "first", "last", "figures"),
    [
        ("resnet18", "conv1", "fc", {2: "14.368", 4: "34.714", 6: "68.625"}),
        ("mobilenet_v2", "features.0.0", "classifier.1", {2: "1.930", 4: "5.394", 6: "11.167"}),
        (
            "tf_efficientnet_lite0",
            "conv_stem",
            "classifier",
            {2: "2.268", 3: "4.133", 4: "6.745"},
        ),
    ],
)
def test_published_figures(name, first, last, figures):
    table = make_table(MODELS[name](), torch.randn(1, 3, 224, 224))
    for bits, figure in figures.items():
        config = {info.name: (bits, bits) for info in table} | {first: (8, 8), last: (8, 8)}
        assert len(config) == len(table)
        assert f"{bitops(table, BitConfig.of(config)) / 1e9:.3f}" == figure


def count_by_hooks(model: nn.Module, x: Tensor, config: dict[str, Bits]) -> tuple[int, int]:
    """BitOPs per image and bits of all weights: every product of every output number counted."""
    total_bitops, handles = [], []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}

    def count(name: str, layer: nn.Module, y: Tensor) -> None:
        products = layer.weight[0].numel()  # per output number: one for each weight of a filter
        total_bitops.append(y[0].numel() * products * config[name].weight * config[name].act)

    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda m, _, y, name=name: count(name, m, y)))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    size = sum(config[name].weight * layer.weight.numel() for name, layer in layers.items())
    return sum(total_bitops), size


@pytest.mark.parametrize("name", MODELS)
def test_mixed_configuration_is_what_hooks_count(name):
    model, x = MODELS[name](), torch.randn(2, 3, 64, 48)
    generator = random.Random(0)
    config = {
        n: Bits(generator.randint(2, 8), generator.randint(2, 8))
        for n, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    expected_bitops, expected_size = count_by_hooks(model, x, config)
    table = make_table(model, x)
    assert bitops(table, BitConfig.of(config)) == expected_bitops
    assert model_size(table, BitConfig.of(config)) == pytest.approx(expected_size / 8)


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_half_the_operations_torch_counts(name):
    model, x = MODELS[name]().eval(), torch.randn(3, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    table = make_table(model, x)
    assert sum(info.macs for info in table) * 2 * len(x) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "unusual"])
def test_a_table_does_not_depend_on_the_batch_size(name):
    one, five = (make_table(MODELS[name](), torch.randn(n, 3, 64, 64)) for n in (1, 5))
    assert one == five


widths = st.builds(Bits, st.integers(2, 16), st.integers(2, 16))
layers = st.tuples(st.integers(1, 10**9), st.integers(1, 10**7), widths)
networks = st.lists(layers, min_size=1, max_size=8)


def as_table(network: list, prefix: str = "") -> tuple[list[LayerInfo], BitConfig]:
    """Layer table and configuration of (MACs, weights, bits) per layer."""
    offered = Candidates((2,), (2,))
    table = [
        LayerInfo(f"{prefix}{i}", macs, weights, False, offered)
        for i, (macs, weights, _) in enumerate(network)
    ]
    return table, BitConfig.of({f"{prefix}{i}": layer[2] for i, layer in enumerate(network)})


@given(networks)
def test_cost_is_the_sum_over_layers(network):
    table, config = as_table(network)
    assert bitops(table, config) == sum(macs * w * a for macs, _, (w, a) in network)
    assert bitops(table, config) == sum(layer_bitops(i, config[i.name]) for i in table)
    bits = sum(weights * w for _, weights, (w, _) in network)
    assert model_size(table, config) == pytest.approx(bits / 8, rel=1e-12)


@given(networks, networks)
def test_cost_of_two_networks_adds_up(one, two):
    (table_1, config_1), (table_2, config_2) = as_table(one, "a"), as_table(two, "b")
    table, config = table_1 + table_2, BitConfig(config_1.layers + config_2.layers)
    assert bitops(table, config) == bitops(table_1, config_1) + bitops(table_2, config_2)
    sizes = model_size(table_1, config_1) + model_size(table_2, config_2)
    assert model_size(table, config) == pytest.approx(sizes, rel=1e-12)


@given(networks, st.data())
def test_one_more_bit_costs_more(network, data):
    table, config = as_table(network)
    info = data.draw(st.sampled_from(table))
    w, a = config[info.name]
    more_weight = config.replace(info.name, Bits(w + 1, a))
    more_act = config.replace(info.name, Bits(w, a + 1))
    assert bitops(table, more_weight) - bitops(table, config) == info.macs * a
    assert bitops(table, more_act) - bitops(table, config) == info.macs * w
    assert model_size(table, more_weight) > model_size(table, config)
    assert model_size(table, more_act) == model_size(table, config)


@pytest.mark.parametrize("budget", [0.5, 0.0, -1.0, float("nan"), 1.249999999])
def test_a_budget_that_cannot_be_met_is_refused_with_what_can(budget):
    with pytest.raises(ValueError, match=rf"bitops={budget:.12g} G .*1\.250000001 G.*9\.5 G"):
        check_budget(budget * 1e9, 1.250000001e9, 9.5e9)


@pytest.mark.parametrize("budget", [1.25, 5.0, 9.4999])
def test_a_budget_in_between_needs_no_remark(budget):
    assert check_budget(budget * 1e9, 1.25e9, 9.5e9) is None


@pytest.mark.parametrize("budget", [9.5, 100.0])
def test_a_budget_that_does_not_bind_is_remarked(budget):
    remark = check_budget(budget * 1e9, 1.25e9, 9.5e9)
    assert f"bitops={budget:g} G" in remark and "9.500 G" in remark


def test_a_level_is_the_uniform_configuration_s_cost_and_lies_between(supernet):
    for b in (2, 3, 4):
        config = {
            name: bits if len(supernet.candidates[name].weight) == 1 else (b, b)
            for name, bits in supernet.uniform(b).items()
        }
        table = {i.name: i.macs for i in supernet.table}
        expected = sum(table[name] * w * a for name, (w, a) in config.items())
        assert bitops_at(supernet.table, b) == expected
    assert bitops_at(supernet.table, 2) < bitops_at(supernet.table, 2.5)
    assert bitops_at(supernet.table, 2.5) < bitops_at(supernet.table, 3)
