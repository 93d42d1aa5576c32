"""Any CNN as a weight-sharing supernet: a zoo of real networks, and small ones worked out by hand.

The small networks are in float64, so that their reference, which quantizes one number at a time
with Python floats, rounds every value as the library does.
"""

import copy
import itertools
import json
import math
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from naive import naive_quantize
from scipy.stats import chisquare
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn

from mpqlib.network.bits import (
    BINARY,
    TERNARY,
    BitConfig,
    Bits,
    Candidates,
    largest,
    sample,
    smallest,
)
from mpqlib.network.layers import QuantConvBN, QuantLinear
from mpqlib.network.quantizer import INITIAL_STEPS, lsq_step
from mpqlib.network.supernet import Supernet

TORCHVISION = [
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "densenet121",
    "efficientnet_b0",
    "squeezenet1_1",
    "googlenet",
]
# No repvgg or mobileone: on some processors, PyTorch 2.15 corrupts memory in the backward pass of
# their first layer, a 1x1 convolution of stride 2 over three channels, in the float network, too.
TIMM = ["tf_efficientnet_lite0", "mobilenetv3_small_050", "resnetv2_18", "dla46x_c"]


# The zoo


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are small here: a second thread saves little, and costs much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str) -> nn.Module:
    """A network of the zoo with random weights."""
    if name in TIMM:
        return timm.create_model(name)
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **extra)


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def unsettle_norms(model: nn.Module, x: Tensor) -> None:
    """Affine parameters at random, running statistics at random around those of `x`.

    Not further from them than that: layer by layer, statistics that do not fit their input let the
    signal of a deep network grow or die out, and steps made from it would quantize all to zero.
    """
    for norm in norms_of(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.0, 0.5)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in norms_of(model):
        norm.momentum = 0.1
        deviation = norm.running_var.sqrt()
        norm.running_mean += 0.1 * deviation * torch.randn_like(deviation)
        norm.running_var *= 0.9 + 0.2 * torch.rand_like(deviation)


@pytest.fixture(scope="module", params=TORCHVISION + TIMM)
def zoo(request) -> tuple[Tensor, Tensor, Supernet]:
    """Images, the float network's output for them, and the supernet made of it."""
    torch.manual_seed(0)
    model, x = build(request.param), torch.randn(4, 3, 64, 64)
    unsettle_norms(model, x)
    with torch.no_grad():
        y = model.eval()(x)
    return x, y, Supernet(model, x, (2, 4, 6))


def test_float_mode_is_the_original_network(zoo):
    x, y, net = zoo
    with torch.no_grad():
        difference = (net.eval()(x) - y).abs().max()
    assert difference <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_gradients_reach_every_weight_in_use(zoo, bits):
    x, _, net = zoo
    net.zero_grad()
    config = net.uniform(bits)
    net.train()(x, config).square().mean().backward()
    for name, layer in net.layers.items():
        used = {"weight": layer.op.weight}
        used["weight step"] = layer.weight_quantizer.steps
        if layer.act_quantizer is not None:
            used["activation step"] = layer.act_quantizer.steps
        for what, parameter in used.items():
            assert parameter.grad is not None, (name, what)
            assert bool(parameter.grad.isfinite().all()), (name, what)
        assert bool(layer.op.weight.grad.any()), name


def test_every_convolution_and_linear_is_quantized_with_its_own_norms(zoo):
    _, _, net = zoo
    quantized = {id(layer.op) for layer in net.layers.values()}
    kinds = (nn.Conv2d, nn.Linear)
    assert quantized == {id(m) for m in net.modules() if isinstance(m, kinds)}


# One quantized layer, step by step by hand


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return norm


def quantized_weight(layer: QuantLinear, bits: int) -> Tensor:
    step = layer.weight_quantizer.step(bits).item()
    return naive_quantize(layer.op.weight.detach(), step, bits, signed=True)


def quantized_input(layer: QuantLinear, x: Tensor, bits: int, signed: bool) -> Tensor:
    return naive_quantize(x, layer.act_quantizer.step(bits).item(), bits, signed)


@pytest.fixture
def generator() -> torch.Generator:
    """Seeds everything that a test draws."""
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", list(itertools.product((2, 3, 8), (2, 5))), ids=str)
def test_layer_is_norm_of_convolution_of_quantized_tensors(pair, training, signed, generator):
    op, norm = nn.Conv2d(3, 4, 3, padding=1).double(), random_norm(4)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    x = x if signed else x.abs()
    layer = QuantConvBN(op, x, Candidates((2, 3, 8), (2, 5)), norm=norm).train(training)
    bits = Bits(*pair)
    layer.set_bits(bits)
    expected = F.batch_norm(
        F.conv2d(
            quantized_input(layer, x, bits.act, signed),
            quantized_weight(layer, bits.weight),
            op.bias,
            padding=1,
        ),
        norm.running_mean.clone(),
        norm.running_var.clone(),
        norm.weight,
        norm.bias,
        training,
    )
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("pair", [(2, 6), (6, 2), (4, 4)])
def test_linear_layer_is_linear_in_quantized_tensors(pair, generator):
    op, x = nn.Linear(6, 3).double(), torch.randn(4, 6, dtype=torch.float64)
    layer = QuantLinear(op, x, Candidates((2, 4, 6), (2, 4, 6)))
    bits = Bits(*pair)
    layer.set_bits(bits)
    weight, x_hat = quantized_weight(layer, bits.weight), quantized_input(layer, x, bits.act, True)
    torch.testing.assert_close(layer(x), x_hat @ weight.T + op.bias)


def same_padding(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """TensorFlow's SAME padding for stride 2: the odd row and column go below and right."""
    pads = []
    for size, k in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
        total = max((math.ceil(size / 2) - 1) * 2 + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, bias, stride=2)


CONVOLUTIONS = {
    "bias": (nn.Conv2d(4, 6, 3), lambda x, w, b: F.conv2d(x, w, b)),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), lambda x, w, b: F.conv2d(x, w)),
    "stride": (
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0)),
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0)),
    ),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=2), lambda x, w, b: F.conv2d(x, w, b, dilation=2)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), lambda x, w, b: F.conv2d(x, w, b, groups=2)),
    "depth-wise": (nn.Conv2d(4, 4, 3, groups=4), lambda x, w, b: F.conv2d(x, w, b, groups=4)),
    "reflect": (
        nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
        lambda x, w, b: F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), w, b),
    ),
    "circular": (
        nn.Conv2d(4, 6, 3, padding=(0, 1), padding_mode="circular"),
        lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 0, 0), "circular"), w, b),
    ),
    "own forward": (Conv2dSame(4, 6, 3, stride=2), same_padding),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_keeps_its_own_ways(kind, generator):
    op, convolve = CONVOLUTIONS[kind]
    op = copy.deepcopy(op).double()
    nn.init.normal_(op.weight)
    model, x = nn.Sequential(op), torch.randn(2, 4, 8, 7, dtype=torch.float64)
    y = model(x)
    net = Supernet(model, x, (2, 4), edge_bits=None)
    (layer,) = net.layers.values()
    torch.testing.assert_close(net(x), y)
    for w, a in itertools.product(*net.candidates["0"]):
        x_hat = quantized_input(layer, x, a, True)
        expected = convolve(x_hat, quantized_weight(layer, w), op.bias)
        torch.testing.assert_close(net(x, BitConfig.of({"0": (w, a)})), expected)


# The shape of a network: norms, readers, residuals


class Small(nn.Module):
    """Three convolutions with weights that differ, and two norms, to be wired by subclasses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1, bias=False).double() for _ in range(3))
        self.norm, self.other_norm = random_norm(3), random_norm(3)


class Plain(Small):
    def forward(self, x):
        return self.b(self.norm(self.a(x)).relu())


class NormLast(Small):
    def forward(self, x):
        return self.norm(self.a(x))


class NormWithActivation(Small):
    """A norm of a class of its own, with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.norm = BatchNormAct2d(3).double()

    def forward(self, x):
        return self.norm(self.a(x))


class Residual(Small):
    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        return (x + self.other_norm(self.b(x))).relu()


class TwoReaders(Small):
    """The norm reads a convolution that the sum reads too."""

    def forward(self, x):
        x = self.a(x)
        return self.norm(x) + 2 * x


class NormInTheOutput(Small):
    """The convolution's own output leaves the network beside the norm's."""

    def forward(self, x):
        x = self.a(x)
        return torch.stack([self.norm(x), x])


class CalledTwice(Small):
    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        return self.other_norm(self.a(x))


class SharedNorm(Small):
    """One norm that reads two convolutions."""

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        return self.norm(self.b(x))


class NormFirst(Small):
    """Pre-activation: the norm reads a sum."""

    def forward(self, x):
        x = self.a(x) + self.b(x)
        return self.c(self.norm(x).relu())


class InPlace(Small):
    """What a convolution read is overwritten afterwards."""

    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        return self.c(x.relu_() + y)


WIRINGS = [
    Plain,
    NormLast,
    NormWithActivation,
    Residual,
    TwoReaders,
    NormInTheOutput,
    CalledTwice,
    SharedNorm,
    NormFirst,
    InPlace,
]


class ByHand(nn.Module):
    """A layer of the reference network: quantizes what it reads and its weight by hand."""

    def __init__(self, layer: QuantLinear, bits: Bits, signed: bool):
        super().__init__()
        self.layer, self.bits, self.signed = layer, bits, signed

    def forward(self, x):
        x_hat = quantized_input(self.layer, x, self.bits.act, self.signed)
        return F.conv2d(x_hat, quantized_weight(self.layer, self.bits.weight))


def inputs_seen(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """All values that each convolution reads in the float network, over all its calls."""
    seen, handles = {}, []
    for name in "abc":

        def look(module, args, name=name):
            seen[name] = torch.cat([seen.get(name, torch.empty(0)), args[0].flatten()])

        handles.append(getattr(model, name).register_forward_pre_hook(look))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("wiring", WIRINGS)
def test_wiring_is_kept_in_float_and_at_every_bit_width(wiring, generator):
    model, x = wiring().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    reference, y = copy.deepcopy(model), model(x)
    inputs = inputs_seen(reference, x)
    net = Supernet(model, x, (2, 3), edge_bits=None)
    assert set(net.layers) == set(inputs)
    torch.testing.assert_close(net(x), y)
    for _ in range(4):
        config = sample(net.candidates, generator)
        by_hand = copy.deepcopy(reference)
        for name, layer in net.layers.items():
            signed = bool((inputs[name] < 0).any())
            setattr(by_hand, name, ByHand(layer, config[name], signed))
        torch.testing.assert_close(net(x, config), by_hand(x))


@pytest.mark.parametrize("wiring", WIRINGS)
def test_steps_start_from_all_that_the_layer_reads(wiring, generator):
    model, x = wiring().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    inputs = inputs_seen(model, x)
    net = Supernet(model, x, (2, 3), edge_bits=None)
    for name, seen in inputs.items():
        q_max = 3 if bool((seen < 0).any()) else 7
        expected = 2 * seen.abs().mean().item() / math.sqrt(q_max)
        assert net.layers[name].act_quantizer.step(3).item() == pytest.approx(expected)


def outputs_per_config(net: Supernet, x: Tensor, configs: list[BitConfig | None]) -> list[Tensor]:
    net.eval()
    with torch.no_grad():
        return [net(x, config) for config in configs]


@pytest.mark.parametrize("wiring", [NormLast, NormWithActivation, Residual])
def test_training_one_pair_leaves_the_other_pairs_and_float_mode_alone(wiring, generator):
    model, x = wiring(), torch.randn(4, 3, 4, 4, dtype=torch.float64)
    net = Supernet(model, x, (2, 4), edge_bits=None)
    every = [None] + [
        BitConfig.of(dict.fromkeys(net.layers, pair))
        for pair in itertools.product((2, 4), repeat=2)
    ]
    for trained in every:
        before = outputs_per_config(net, x, every)
        net.train()(x, trained)
        after = outputs_per_config(net, x, every)
        changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert changed == [config is trained for config in every]


def test_without_pair_norms_all_bit_widths_share_one(generator):
    model, x = NormLast(), torch.randn(4, 3, 4, 4, dtype=torch.float64)
    net = Supernet(model, x, (2, 4), edge_bits=None, pair_norms=False)
    every = [None, net.uniform(2), net.uniform(4)]
    before = outputs_per_config(net, x, every)
    net.train()(x, net.uniform(4))
    after = outputs_per_config(net, x, every)
    changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert changed == [False, True, True]


def test_without_pair_norms_the_arithmetic_is_the_same(generator):
    model, x = Residual().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    nets = [
        Supernet(copy.deepcopy(model), x, (2, 4), edge_bits=None, pair_norms=pair_norms).eval()
        for pair_norms in (True, False)
    ]
    config = sample(nets[0].candidates, generator)
    torch.testing.assert_close(nets[0](x, config), nets[1](x, config))


def test_all_bit_widths_share_one_weight(generator):
    model, x = Plain().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    weight = model.a.weight
    net = Supernet(model, x, (2, 4, 6), edge_bits=None)
    every = [None, net.uniform(2), net.uniform(4), net.uniform(6)]
    before = outputs_per_config(net, x, every)
    with torch.no_grad():
        weight.neg_()
    after = outputs_per_config(net, x, every)
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert sum(p.shape == weight.shape for p in net.parameters()) == 3  # those of a, b and c


def test_making_a_supernet_leaves_the_running_statistics_and_the_mode(generator):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for training in (True, False):
        model = Plain().train(training)
        y = copy.deepcopy(model).eval()(x)
        net = Supernet(model, x, edge_bits=None)
        assert net.training is training and all(m.training is training for m in net.modules())
        torch.testing.assert_close(net.eval()(x), y)


def test_making_a_supernet_fails_cleanly_on_an_example_that_does_not_fit():
    model = Plain()
    with pytest.raises(RuntimeError):
        Supernet(model, torch.randn(2, 5, 4, 4, dtype=torch.float64))
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_state_dict_restores_every_bit_width(generator):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    trained, fresh = (Supernet(Residual(), k * x, (2, 4), edge_bits=None) for k in (1, 3))
    trained.train()(x, trained.uniform(2))
    every = [None, trained.uniform(2), trained.uniform(4)]
    fresh.load_state_dict(trained.state_dict())
    expected, got = (outputs_per_config(net, x, every) for net in (trained, fresh))
    assert all(torch.equal(*pair) for pair in zip(expected, got, strict=True))


# Candidates, edges and signs


def edge_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 2),
    ).double()


def normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
    )


def other_bits(x: Tensor, *bits: Candidates) -> list[Supernet]:
    """Two of equal shapes, whose second convolution has these candidates."""
    overrides = [{"2": candidates} for candidates in bits]
    return [Supernet(normed(), x, (2, 4), overrides=o) for o in overrides]


OTHER_BITS = [
    (Candidates((2, 4), (2, 4)), Candidates((3, 5), (2, 4))),  # steps of weights
    (Candidates((2, 4), (2, 4)), Candidates((2, 4), (3, 5))),  # steps of activations
    (Candidates((2, 4), (3,)), Candidates((4,), (2, 3))),  # equally many norms
    (Candidates((BINARY,), (8,)), Candidates((TERNARY,), (8,))),  # without steps
]


@pytest.mark.parametrize("bits", OTHER_BITS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("part", ["", "model", "model.2"])
def test_a_state_of_other_bits_is_refused_on_every_way_in(part, strict, bits, generator):
    one, other = other_bits(torch.randn(4, 3, 6, 6, generator=generator), *bits)
    with torch.no_grad():
        one.model[0].op.weight.add_(1)
    state = one.get_submodule(part).state_dict()
    before = {n: t.clone() for n, t in other.state_dict().items()}
    if bits[0].weight == (2, 4) and bits[1].weight == (4,):  # other shapes: for these bits alone
        state = {n: t for n, t in state.items() if ".steps" not in n}
    with pytest.raises(ValueError, match=r"layer '.*' is stored with the bits .* this supernet"):
        other.get_submodule(part).load_state_dict(state, strict)
    if not part:  # nothing has changed
        assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


def test_a_state_without_bits_is_refused_and_weights_alone_are_not(generator):
    x = torch.randn(4, 3, 6, 6, generator=generator)
    one, other = (Supernet(normed(), x, (2, 4)) for _ in range(2))
    earlier = {n: t for n, t in one.state_dict().items() if t.dtype != torch.float64}
    with pytest.raises(ValueError, match=r"stored without its bit-widths.* an earlier version"):
        other.load_state_dict(earlier)
    weights = {n: t for n, t in earlier.items() if n.endswith("op.weight")}
    other.load_state_dict(weights, strict=False)
    assert torch.equal(other.model[2].op.weight, one.model[2].op.weight)


def test_edges_run_at_eight_bits_and_the_first_reads_the_image_as_it_is(generator):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = Supernet(edge_network(), x, (2, 4))
    assert net.first == ["0"] and net.last == ["5"]
    assert net.candidates == {
        "0": Candidates((8,), (8,)),
        "2": Candidates((2, 4), (2, 4)),
        "5": Candidates((8,), (8,)),
    }
    first, middle, last = net.layers.values()
    y = F.conv2d(x, quantized_weight(first, 8), first.op.bias).relu()
    y_hat = quantized_input(middle, y, 4, False)
    y = F.conv2d(y_hat, quantized_weight(middle, 2), middle.op.bias).relu()
    y_hat = quantized_input(last, y.flatten(1), 8, False)
    expected = F.linear(y_hat, quantized_weight(last, 8), last.op.bias)
    config = BitConfig.of({"0": (8, 8), "2": (2, 4), "5": (8, 8)})
    torch.testing.assert_close(net(x, config), expected)


def test_edges_can_be_ordinary_layers(generator):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = Supernet(edge_network(), x, (2, 4), edge_bits=None)
    assert set(net.candidates.values()) == {Candidates((2, 4), (2, 4))}
    first = net.layers["0"]
    captured = []
    first.register_forward_hook(lambda module, args, y: captured.append(y))
    net(x, net.uniform(2))
    x_hat = quantized_input(first, x, 2, True)
    expected = F.conv2d(x_hat, quantized_weight(first, 2), first.op.bias)
    torch.testing.assert_close(captured[0], expected)


def test_two_branches_that_read_the_image_are_both_first(generator):
    net = Supernet(NormFirst(), torch.randn(2, 3, 4, 4, dtype=torch.float64), (2, 4))
    assert net.first == ["a", "b"] and net.last == ["c"]
    assert [c.weight for c in net.candidates.values()] == [(8,), (8,), (8,)]


class TwoHeads(Small):
    def forward(self, x):
        x = self.a(x).relu()
        return self.b(x) + self.c(x)


def test_two_branches_that_no_layer_reads_are_both_last(generator):
    net = Supernet(TwoHeads(), torch.randn(2, 3, 4, 4, dtype=torch.float64), (2, 4))
    assert net.first == ["a"] and net.last == ["b", "c"]
    assert [c.weight for c in net.candidates.values()] == [(8,), (8,), (8,)]


def test_overrides_replace_the_candidates_of_the_layers_they_name(generator):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = Supernet(edge_network(), x, (2, 4), overrides={"2": Candidates((5, 3), (6,))})
    assert net.candidates["2"] == Candidates((3, 5), (6,))  # ascending, whatever they were
    assert net.candidates["0"] == net.candidates["5"] == Candidates((8,), (8,))
    assert bool(net(x, net.uniform(3).replace("2", Bits(5, 6))).isfinite().all())


def test_depthwise_convolutions_lack_two_bits():
    model, x = torchvision.models.mobilenet_v2(weights=None), torch.randn(1, 3, 32, 32)
    depthwise = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    net = Supernet(model, x, pair_norms=False)
    for info in net.table:
        full = (3, 4, 5, 6) if info.name in depthwise else (2, 3, 4, 5, 6)
        full = (8,) if info.name in ("features.0.0", "classifier.1") else full
        assert info.candidates == Candidates(full, full)
        assert info.depthwise is (info.name in depthwise)
    assert len(depthwise) == 17


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", set()),
        # What reads a linear bottleneck: the expansions of blocks 2 to 17 and the last convolution
        ("mobilenet_v2", {f"features.{i}.conv.0.0" for i in range(2, 18)} | {"features.18.0"}),
    ],
)
def test_signs_of_activations_are_found_from_the_calibration_batch(name, expected):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    net = Supernet(model, torch.randn(2, 3, 32, 32), (4,), pair_norms=False)
    quantizers = {name: layer.act_quantizer for name, layer in net.layers.items()}
    assert {name for name, q in quantizers.items() if q is not None and q.signed} == expected
    assert [name for name, q in quantizers.items() if q is None] == net.first


# What is refused


class Untraceable(Small):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_models_that_cannot_be_converted_are_refused():
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="Untraceable cannot be traced"):
        Supernet(Untraceable(), x)
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        Supernet(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": {"zz": Candidates((2,), (2,))}}, "zz"),
        ({"overrides": {"a": Candidates((2,), (1,))}}, r"overrides\['a'\]=\(1,\)"),
        ({"overrides": {"a": Candidates((), (2,))}}, r"overrides\['a'\]=\(\)"),
        ({"overrides": {"a": (2, 4)}}, r"overrides\['a'\]=2"),
        ({"bits": (), "edge_bits": None}, r"bits=\(\)"),
        ({"bits": (2, 17), "edge_bits": None}, r"bits=\(2, 17\).*2 to 16"),
        ({"bits": 4}, "bits=4"),
        ({"bits": (2, 4.0)}, r"bits=\(2, 4.0\)"),
        ({"bits": "[2,4]"}, r"""bits='\[2,4\]' is a string.*-y "bits: \[2, 4\]".*-f"""),
        ({"edge_bits": 1}, r"edge_bits=\(1,\)"),
        ({"depthwise_min": "x"}, r"depthwise_min=\('x',\) is not allowed"),
        ({"overrides": [("0", (2,))]}, r"overrides=\[.*a dict"),
        ({"overrides": {"0": ((2,),)}}, r"overrides\['0'\]=\(\(2,\),\) is not allowed"),
        ({"overrides": {"0": None}}, r"overrides\['0'\]=None is not allowed"),
        ({"overrides": {"0": 4}}, r"overrides\['0'\]=4 is not allowed"),
        ({"overrides": {"0": "24"}}, r"overrides\['0'\]='24' is not allowed: bits of weights"),
    ],
)
def test_unfit_candidates_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Supernet(Plain(), torch.randn(1, 3, 4, 4, dtype=torch.float64), **arguments)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"0": (8, 8), "2": (2, 2), "5": (8, 8), "7": (2, 2)}, "7"),
        ({"0": (8, 8), "2": (2, 2)}, "5"),
        ({}, "0.*2.*5"),
        ({"0": (8, 8), "2": (3, 2), "5": (8, 8)}, r"'2'\]=Bits\(weight=3, act=2\)"),
        ({"0": (8, 8), "2": (2, 8), "5": (8, 8)}, r"'2'\]=Bits\(weight=2, act=8\)"),
        ({"0": (8, 8), "2": (2, 2), "5": (2, 8)}, r"'5'\]=Bits\(weight=2, act=8\)"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(bits, message):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = Supernet(edge_network(), x, (2, 4))
    config = BitConfig.of(bits)
    with pytest.raises(ValueError, match=message):
        net.check(config)
    with pytest.raises(ValueError, match=message):
        net(x, config)


def test_a_configuration_that_fits_is_accepted():
    net = Supernet(edge_network(), torch.randn(2, 3, 6, 6, dtype=torch.float64), (2, 4))
    net.check(BitConfig.of({"5": (8, 8), "2": (2, 4), "0": (8, 8)}))


# Configurations

widths = st.tuples(st.integers(2, 16), st.integers(2, 16))


@given(st.dictionaries(st.text(), widths))
def test_configuration_survives_json(bits):
    config = BitConfig.of(bits)
    again = BitConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    assert dict(again) == bits and list(again) == list(bits) and len(again) == len(bits)
    assert all(isinstance(pair, Bits) for pair in again.values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"a"',
        '[["a", [2, 2]]]',
        '{"a": 2}',
        '{"a": null}',
        '{"a": [2]}',
        '{"a": [2, 2, 2]}',
        '{"a": [2, 2.0]}',
        '{"a": ["2", 2]}',
        '{"a": [true, 2]}',
        '{"a": {"weight": 2, "act": 2}}',
        '{"layers": {"a": 2}, "bitops_g": 1}',
        '{"a": [2, 2], "a": [4, 4]}',
        '{"a": [2, 2], "a": [2, 2]}',
    ],
)
def test_malformed_json_is_refused(text):
    with pytest.raises(ValueError):
        BitConfig.from_json(text)


def test_a_layer_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match=r"\['a'\] stand there more than once"):
        BitConfig((("a", Bits(2, 2)), ("b", Bits(2, 2)), ("a", Bits(4, 4))))


@pytest.mark.parametrize(
    "bits", [(2.0, 4), (4, 4.0), (True, 4), (5, 5), ("4", 4), (None, 4), (4, [4])]
)
def test_bits_that_are_no_candidates_are_named(supernet, bits):
    config, x = supernet.uniform(4).replace("pointwise", bits), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"config\['pointwise'\]=Bits.* is not allowed"):
        supernet(x, config)


def test_a_mapping_that_is_no_configuration_is_refused(supernet):
    with pytest.raises(ValueError, match=r"is not a BitConfig: build one with BitConfig.of"):
        supernet.set_bits({name: (4, 4) for name in supernet.layers})


def test_configuration_is_read_from_a_policy():
    config = BitConfig.of({"a": (2, 3), "layers": (4, 5)})
    policy = {"bitops_g": 1.5, "last": ["a"], "layers": json.loads(config.to_json())}
    assert BitConfig.from_json(json.dumps(policy)) == config
    assert BitConfig.from_json(config.to_json()) == config


def test_configuration_cannot_be_changed():
    config = BitConfig.of({"a": (2, 3), "b": (4, 5)})
    with pytest.raises(AttributeError):
        config.layers = ()
    with pytest.raises(TypeError):
        config["a"] = Bits(4, 4)
    with pytest.raises(KeyError):
        config["c"]
    source = {"a": (2, 3)}
    copied = BitConfig.of(source)
    source["a"] = (4, 4)
    assert copied["a"] == Bits(2, 3)


def test_equal_configurations_are_one_key():
    one, same = (BitConfig.of({"a": (2, 3), "b": (4, 5)}) for _ in range(2))
    other = BitConfig.of({"a": (2, 3), "b": (4, 4)})
    assert one == same and one != other
    assert len({one, same, other}) == 2


def test_replace_gives_a_copy_with_other_bits():
    config = BitConfig.of({"a": (2, 3), "b": (4, 5)})
    assert config.replace("a", Bits(6, 6)) == BitConfig.of({"a": (6, 6), "b": (4, 5)})
    assert config == BitConfig.of({"a": (2, 3), "b": (4, 5)})


def test_uniform_takes_the_nearest_candidate():
    overrides = {"2": Candidates((2, 4, 6), (3, 5))}
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = Supernet(edge_network(), x, overrides=overrides)
    nearest = {2: (2, 3), 3: (2, 3), 4: (4, 3), 5: (4, 5), 6: (6, 5), 9: (6, 5)}
    for bits, pair in nearest.items():
        assert net.uniform(bits) == BitConfig.of({"0": (8, 8), "2": pair, "5": (8, 8)})


CANDIDATES = {
    "a": Candidates((2, 3, 4, 5, 6), (2, 3, 4, 5, 6)),
    "b": Candidates((3, 4, 5, 6), (2, 6)),
    "c": Candidates((8,), (8,)),
}


def test_largest_and_smallest():
    assert largest(CANDIDATES) == BitConfig.of({"a": (6, 6), "b": (6, 6), "c": (8, 8)})
    assert smallest(CANDIDATES) == BitConfig.of({"a": (2, 2), "b": (3, 2), "c": (8, 8)})


def test_sample_depends_on_the_generator_alone():
    def draws(seed: int) -> list[BitConfig]:
        generator = torch.Generator().manual_seed(seed)
        return [sample(CANDIDATES, generator) for _ in range(20)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draws(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert draws(0) == first
    assert draws(1) != first
    assert len(set(first)) > 1


def test_sample_is_uniform_over_the_candidates():
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(CANDIDATES, generator) for _ in range(2000)]
    for name, candidates in CANDIDATES.items():
        pairs = list(itertools.product(*candidates))
        counts = Counter(config[name] for config in drawn)
        assert set(counts) == set(pairs)
        if len(pairs) > 1:  # weights and activations are drawn independently of each other
            assert chisquare([counts[pair] for pair in pairs]).pvalue > 1e-3
    # And so are two layers.
    counts = Counter((config["a"].weight, config["b"].weight) for config in drawn)
    pairs = itertools.product(CANDIDATES["a"].weight, CANDIDATES["b"].weight)
    assert chisquare([counts[pair] for pair in pairs]).pvalue > 1e-3


def test_replace_refuses_a_layer_that_is_not_there():
    config = BitConfig.of({"a": (2, 3)})
    assert config.replace("a", Bits(4, 4))["a"] == (4, 4)
    with pytest.raises(ValueError, match="layer='b' is not in this configuration"):
        config.replace("b", Bits(4, 4))


@pytest.mark.parametrize("rule", ["nested", "lsq"])
def test_initial_steps_of_weights_by_rule(rule):
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)),
        torch.randn(8, 3, 4, 4),
    )
    weight = net[0].weight.detach().clone()
    supernet = Supernet(net, x, (2, 4), edge_bits=None, weight_steps=rule)
    for bits in (2, 4):
        expected = INITIAL_STEPS[rule](weight, bits, True)
        assert torch.equal(supernet.layers["0"].weight_quantizer.step(bits), expected)
    assert torch.equal(
        supernet.layers["2"].act_quantizer.step(2), lsq_step(net[0].op(x).flatten(1), 2, True)
    )


def test_initial_steps_by_an_unknown_rule_are_refused():
    with pytest.raises(ValueError, match="weight_steps='max' is not allowed: 'nested' or 'lsq'"):
        Supernet(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 4, 4), weight_steps="max")


def test_the_gradient_scale_of_steps_is_a_choice():
    x, found = torch.randn(8, 3, 4, 4), {}
    for scaled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        supernet = Supernet(net, x, (4,), edge_bits=None, scale_step_gradient=scaled)
        supernet(x, supernet.uniform(4)).sum().backward()
        found[scaled] = supernet.layers["2"].weight_quantizer.steps.grad.squeeze()
    torch.testing.assert_close(found[True] * (32 * 7) ** 0.5, found[False])
