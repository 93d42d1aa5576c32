"""Which layers IDM draws, which outputs it compares, and the losses against naive loops."""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import images
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import naive_quantize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpqlib.network.bits import BitConfig, Bits, Candidates, sample
from mpqlib.network.layers import QuantLinear
from mpqlib.network.supernet import Supernet
from mpqlib.training.distortion import Distortions, grid_loss, lowest_layers
from mpqlib.training.step import one_shot_gradients

CANDIDATES = {
    "full": Candidates((2, 3, 4), (2, 3, 4)),
    "frozen": Candidates((3, 4), (2, 3, 4)),
    "edge": Candidates((8,), (8,)),
}


def test_lowest_layers_are_those_at_their_smallest_current_weight_bits():
    pairs = [itertools.product(*candidates) for candidates in CANDIDATES.values()]
    for full, frozen, edge in itertools.product(*pairs):
        config = BitConfig.of({"full": full, "frozen": frozen, "edge": edge})
        expected = ["full"] * (full[0] == 2) + ["frozen"] * (frozen[0] == 3)
        assert lowest_layers(config, CANDIDATES) == expected


class InPlace(nn.Module):
    """A residual block in which every output of a layer is overwritten afterwards."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1).double() for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(3).double() for _ in range(2))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(3, 2).double()

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.fc(self.relu(out).mean((2, 3)))


@pytest.fixture
def block() -> tuple[Supernet, Tensor]:
    """A supernet of the block whose norms do something, in evaluation mode, and images."""
    torch.manual_seed(0)
    model = InPlace()
    for norm in (model.norm1, model.norm2):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    return Supernet(model, x, (2, 4), edge_bits=None).eval(), x


def by_hand(net: Supernet, x: Tensor, config: BitConfig | None) -> dict[str, Tensor]:
    """Outputs after the norm of both convolutions, each written to a tensor of its own."""
    outputs = {}
    out = x
    for name in ("conv1", "conv2"):
        layer = net.layers[name]
        weight, norm = layer.op.weight.detach(), layer.norm
        if config is not None:
            w, a = config[name]
            out = naive_quantize(
                out, layer.act_quantizer.step(a).item(), a, layer.act_quantizer.signed
            )
            weight = naive_quantize(weight, layer.weight_quantizer.step(w).item(), w, True)
        out = F.conv2d(out, weight, layer.op.bias.detach(), padding=1)
        outputs[name] = F.batch_norm(out, norm.running_mean, norm.running_var)
        out = outputs[name].relu()
    return outputs


@pytest.fixture(params=[False, True], ids=["", "static"])
def distortions(block, request) -> Distortions:
    net, _ = block
    found = Distortions(net.layers, static=request.param)
    yield found
    found.remove()


def kept(distortions: Distortions) -> dict[str, list[Tensor]]:
    """The targets of each layer that has some."""
    return {name: hook.targets for name, hook in distortions.hooks.items() if hook.targets}


@pytest.mark.parametrize("quantized", [False, True])
def test_targets_are_the_outputs_after_the_norm(block, distortions, quantized):
    net, x = block
    config = sample(net.candidates, torch.Generator().manual_seed(0)) if quantized else None
    with distortions.keep(["conv1", "conv2"]):
        net(x, config)
    expected = by_hand(net, x, config)
    for name, output in expected.items():
        (target,) = kept(distortions)[name]
        assert not target.requires_grad
        torch.testing.assert_close(target, output)


def test_only_the_named_layers_are_read_unless_the_passes_are_static(block, distortions):
    net, x = block
    with distortions.keep(["conv2"]):
        net(x)
    assert set(kept(distortions)) == (set(net.layers) if distortions.static else {"conv2"})
    with distortions.keep([]):
        pass
    assert not kept(distortions)


def test_reading_changes_neither_output_nor_gradients(block, distortions):
    net, x = block
    with distortions.keep(net.layers):
        net(x, net.uniform(4))
    results = []
    for reader in (nullcontext(), distortions.keep(net.layers), distortions.compare(net.layers)):
        net.zero_grad()
        with reader:
            y = net(x, net.uniform(2))
        y.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        results.append({"y": y.detach()} | gradients)
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        assert all(torch.equal(results[0][key], other[key]) for key in other)


def hooks_left(net: Supernet) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_hooks_live_as_long_as_the_block_or_if_static_until_they_are_removed(block, distortions):
    net, x = block
    layers = len(net.layers)
    with pytest.raises(ZeroDivisionError), distortions.keep(["conv1"]):
        assert hooks_left(net) == (layers if distortions.static else 1)
        raise ZeroDivisionError
    assert hooks_left(net) == (layers if distortions.static else 0)
    net(x)
    assert not kept(distortions)
    distortions.remove()
    assert hooks_left(net) == 0


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block, **options):
        super().__init__()
        self.block, self.options = block, options
        self.is_on = False

    def forward(self, x):
        return checkpoint(self.block, x, **self.options) if self.is_on else self.block(x)


def checkpointed(use_reentrant: bool) -> tuple[Supernet, Tensor, Tensor]:
    torch.manual_seed(0)
    inner = Checkpointed(nn.Conv2d(8, 8, 3), use_reentrant=use_reentrant)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), inner, nn.Flatten(), nn.Linear(8 * 16, 3)).double()
    x, y = images(8).tensors
    return Supernet(net, x.double(), (2, 4), edge_bits=None).train(), x.double(), y


def gradients(supernet: Supernet, x: Tensor, y: Tensor) -> list[Tensor]:
    supernet.zero_grad()
    configs = [supernet.uniform(2)]
    one_shot_gradients(supernet, x, y, supernet.candidates, configs, idm_weight=10.0)
    return [p.grad.clone() for p in supernet.parameters() if p.grad is not None]


def test_gradient_checkpointing_changes_no_gradient():
    supernet, x, y = checkpointed(use_reentrant=False)
    expected = gradients(supernet, x, y)
    supernet.model[1].is_on = True
    found = gradients(supernet, x, y)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_checkpointing_that_would_lose_the_gradient_is_refused():
    supernet, x, y = checkpointed(use_reentrant=True)
    supernet.model[1].is_on = True
    with pytest.raises(ValueError, match="checkpointing needs use_reentrant=False"):
        gradients(supernet, x, y)


def test_an_unknown_layer_leaves_no_hook(block):
    net, _ = block
    with pytest.raises(KeyError), Distortions(net.layers).keep(["conv1", "conv9"]):
        pass
    assert hooks_left(net) == 0


def test_loss_is_the_mean_square_of_the_difference_to_the_targets(block, distortions):
    net, x = block
    low, high = (by_hand(net, x, net.uniform(bits)) for bits in (2, 4))
    with distortions.keep(net.layers):
        net(x, net.uniform(4))
    with distortions.compare(["conv1", "conv2"]):
        net(x, net.uniform(2))
    squares = {name: (low[name] - high[name]).square().mean() for name in ("conv1", "conv2")}
    torch.testing.assert_close(distortions.loss(["conv2"]), squares["conv2"])
    torch.testing.assert_close(distortions.loss(squares), sum(squares.values()))


class TwoScales(nn.Module):
    """One head that runs on features of two sizes."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3).double(), nn.Conv2d(4, 2, 1).double()

    def forward(self, x):
        x = self.stem(x)
        return (self.head(x).mean((2, 3)) + self.head(x[:, :, ::2, ::2]).mean((2, 3))).relu()


def test_each_call_is_compared_with_the_same_call_at_the_largest_bits():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = Supernet(TwoScales(), x, (2, 4), edge_bits=None)
    seen = {}
    for bits in (2, 4):
        outputs = []
        hook = net.layers["head"].register_forward_hook(
            lambda layer, args, y, outputs=outputs: outputs.append(y.detach().clone())
        )
        net(x, net.uniform(bits))
        hook.remove()
        seen[bits] = outputs
    assert [y.shape[-1] for y in seen[2]] == [6, 3]
    distortions = Distortions(net.layers)
    with distortions.keep(["head"]):
        net(x, net.uniform(4))
    with distortions.compare(["head"]):
        net(x, net.uniform(2))
    differences = [low - high for low, high in zip(seen[2], seen[4], strict=True)]
    loss = distortions.loss(["head"])
    assert loss.item() == pytest.approx(naive_idm({"head": differences}), rel=1e-12)
    loss.backward()
    assert bool(net.layers["stem"].op.weight.grad.any())


def test_loss_on_distortions_trains_the_layer_below(block, distortions):
    net, x = block
    with distortions.keep(["conv1"]):
        net(x, net.uniform(4))
    with distortions.compare(["conv1"]):
        net(x, net.uniform(2))
    net.zero_grad()
    distortions.loss(["conv1"]).backward()
    first, second = net.layers["conv1"], net.layers["conv2"]
    assert bool(first.op.weight.grad.any()) and second.op.weight.grad is None
    # Through the 2-bit pass alone: the 4-bit outputs are targets.
    two, *others = first.weight_quantizer.steps.grad.tolist()
    assert two != 0 and not any(others)


def naive_idm(distorted: dict[str, list[Tensor]]) -> float:
    """Sum over layers of the mean, over the values of all calls, of the squared difference."""
    total = 0.0
    for calls in distorted.values():
        squares, count = 0.0, 0
        for differences in calls:
            for d in differences.flatten().tolist():
                squares += d**2
                count += 1
        total += squares / count
    return total


calls = st.lists(st.tuples(*[st.integers(1, 3)] * 4), min_size=1, max_size=3)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), calls, min_size=1), st.integers(0, 999))
def test_idm_loss_is_the_sum_of_mean_squared_errors(shapes_of, seed):
    generator = torch.Generator().manual_seed(seed)
    distorted = {
        name: [
            torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
            for shape in shapes
        ]
        for name, shapes in shapes_of.items()
    }
    layers = {name: nn.Identity() for name in shapes_of}
    targets = {
        name: [torch.randn(d.shape, generator=generator).double() for d in calls]
        for name, calls in distorted.items()
    }
    distortions = Distortions(layers)
    with distortions.keep(layers):
        for name, calls in targets.items():
            for target in calls:
                layers[name](target)
    with distortions.compare(layers):
        for name, calls in distorted.items():
            for d, target in zip(calls, targets[name], strict=True):
                layers[name](target + d)
    loss = distortions.loss(layers)
    assert loss.item() == pytest.approx(naive_idm(distorted), rel=1e-12)
    loss.backward()
    for outputs in distorted.values():
        count = sum(d.numel() for d in outputs)
        for d in outputs:
            torch.testing.assert_close(d.grad, 2 * d.detach() / count)


def test_without_distortion_neither_loss_nor_gradient():
    layer, d = nn.Identity(), torch.zeros(2, 3, requires_grad=True)
    distortions = Distortions({"a": layer})
    for reader in (distortions.keep("a"), distortions.compare("a")):
        with reader:
            layer(d)
    loss = distortions.loss("a")
    loss.backward()
    assert loss.item() == 0 and not d.grad.any()


def test_idm_needs_a_layer():
    with pytest.raises(ValueError, match="at least one"):
        Distortions({}).loss([])


def grid_layer(weights: Tensor, steps: dict[int, float]) -> QuantLinear:
    """A layer with these weights, (out, in), and weight steps."""
    op = nn.Linear(*reversed(weights.shape)).double()
    op.weight.data = weights.clone()
    layer = QuantLinear(op, weights, Candidates(tuple(steps), (8,)))
    layer.weight_quantizer.steps.data = torch.tensor(list(steps.values()), dtype=torch.float64)
    return layer


def naive_grid_term(weights: Tensor, step: float, bits: int, smallest: int):
    """The grid term of one layer and its gradient for the weights, one number at a time."""
    low, high, coarse = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2 ** (bits - smallest)
    columns, gradient = [0.0] * weights.shape[1], torch.zeros_like(weights)
    for row, column in np.ndindex(*weights.shape):
        w = weights[row, column].item()
        integer = round(w / step)
        if low < w / step < high and integer % coarse == 0:
            columns[column] += (w - integer * step) ** 2
            gradient[row, column] = 2 * (w - integer * step) / weights.shape[1]
    return sum(columns) / weights.shape[1], gradient


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("smallest", [2, 3])
def test_grid_loss_counts_weights_whose_point_the_smallest_grid_shares(bits, smallest):
    if smallest > bits:
        return
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(12, 10, generator=generator, dtype=torch.float64)
    steps = {b: 1.3 / 2 ** (b - 1) for b in (2, 3, 4, 6)}  # some weights are clipped
    layer = grid_layer(weights, steps)
    expected, gradient = naive_grid_term(weights, steps[bits], bits, smallest)
    offered = {"a": Candidates(tuple(b for b in steps if b >= smallest), (8,))}
    loss = grid_loss({"a": layer}, {"a": Bits(bits, 8)}, offered)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert 0 < int((gradient != 0).sum()) < weights.numel()
    torch.testing.assert_close(layer.op.weight.grad, gradient)
    assert layer.weight_quantizer.steps.grad is None


def test_grid_loss_adds_up_over_layers_with_a_choice():
    generator = torch.Generator().manual_seed(0)
    steps = {2: 0.6, 3: 0.35, 5: 0.1}
    layers = {n: grid_layer(torch.randn(6, 5, generator=generator).double(), steps) for n in "abcd"}
    config = {"a": Bits(3, 8), "b": Bits(5, 8), "c": Bits(2, 8), "d": Bits(2, 8)}
    offered = {name: Candidates(tuple(steps), (8,)) for name in "abc"}
    offered["d"] = Candidates((2,), (8,))
    alone = {n: grid_loss({n: layer}, config, offered).item() for n, layer in layers.items()}
    assert min(alone[name] for name in "abc") > 0 and alone["d"] == 0
    total = grid_loss(layers, config, offered).item()
    assert total == pytest.approx(sum(alone.values()), rel=1e-12)
