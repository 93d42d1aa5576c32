"""Learning rate, optimizers, region decay, averaged weights and the check for NaN."""

import math

import pytest
import torch
from conftest import TinyNet, images
from torch import nn

from mpqlib.network.bits import Bits
from mpqlib.network.quantizer import Quantizer
from mpqlib.network.supernet import Supernet
from mpqlib.training.optimization import (
    average_weights,
    averaged_model,
    check_gradients,
    check_weights,
    create_optimizers,
    decay_by_region,
    learning_rate,
    set_learning_rates,
    step_travel,
)

SETTINGS = dict(momentum=0.9, weight_decay=0.5)


def test_learning_rate_warms_up_and_joins_a_cosine_that_began_at_the_start():
    rates = [learning_rate(part, 10, peak=0.1, warmup=2) for part in (0, 1, 2, 5, 9)]
    cosine = [1e-5 + (0.1 - 1e-5) * (1 + math.cos(math.pi * p / 10)) / 2 for p in (2, 5, 9)]
    assert rates == pytest.approx([1e-5, (1e-5 + 0.1) / 2, *cosine])
    assert learning_rate(0, 10, peak=0.0, warmup=2) == 0  # never above the peak


def test_steps_may_move_as_far_as_they_travel():
    shares = [(1 + math.cos(math.pi * p / 4)) / 2 for p in (0, 0, 0, 1, 1, 2, 2, 2, 3, 3)]
    assert step_travel(10, 4) == pytest.approx(sum(shares))
    assert step_travel(0, 4) == 0


@pytest.mark.parametrize("steps", [3, 10, 24])
def test_the_learning_rate_is_set_once_a_part(steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule, rates = set_learning_rates(optimizer, lambda part: 0.7**part, steps, 8), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.7 ** (step * 8 // steps) for step in range(steps)])


@pytest.mark.parametrize("region_decay", [True, False])
def test_each_trained_parameter_is_in_one_group(supernet, region_decay):
    supernet.layers["pointwise"].op.weight.requires_grad_(False)
    optimizers = create_optimizers(supernet, **SETTINGS, region_decay=region_decay)
    sgd, adam = optimizers
    assert isinstance(sgd, torch.optim.SGD) and isinstance(adam, torch.optim.Adam)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    trained = {id(p) for p in supernet.parameters() if p.requires_grad}
    assert len(held) == len(trained) and {id(p) for p in held} == trained
    steps = {id(p) for m in supernet.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    assert {id(p) for p in adam.param_groups[0]["params"]} == steps
    # The release never decays the last layer.
    layers = {name: layer for name, layer in supernet.layers.items() if name not in supernet.last}
    weights = {id(layer.op.weight) for layer in layers.values()} & trained
    assert len(layers) == len(supernet.layers) - 1
    decayed = {id(p) for g in sgd.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == (set() if region_decay else weights)


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        create_optimizers(TinyNet().requires_grad_(False), **SETTINGS, region_decay=False)


def test_steps_alone_can_be_trained(supernet):
    for name, p in supernet.named_parameters():
        p.requires_grad_("steps" in name)
    (adam,) = create_optimizers(supernet, **SETTINGS, region_decay=True)
    assert isinstance(adam, torch.optim.Adam)


def decay_of(w, layers, configs):
    """Weight decay of a weight that `layers`, (name, layer), share; 1 for each unit of w."""
    share = 1.0
    for name, layer in layers:
        for config in configs:
            if config[name].weight == 2:
                step = layer.weight_quantizer.step(2).item()
                share -= -2 * step < w < step
    return share


def test_region_decay_counts_the_passes_at_2_bits(supernet):
    configs = [supernet.uniform(4), supernet.uniform(2), supernet.uniform(2), supernet.uniform(3)]
    configs[1] = configs[1].replace("pointwise", Bits(3, 2))
    for layer in supernet.layers.values():
        layer.op.weight.grad = torch.ones_like(layer.op.weight)
        layer.op.weight.data[::2] *= 4  # some leave the region
    decay_by_region(supernet, 0.1, configs)
    shares = set()
    for name, layer in supernet.layers.items():
        weight = layer.op.weight
        for w, gradient in zip(weight.flatten().tolist(), weight.grad.flatten(), strict=True):
            share = 0.0 if name == "last" else decay_of(w, [(name, layer)], configs)
            shares.add((name, share))
            assert float(gradient) == pytest.approx(1 + 0.1 * w * share)
    # The stem has 8 bits, the depth-wise layer 3 bits at least: their weights decay as usual.
    inside_and_out = {("pointwise", 0.0), ("pointwise", 1.0)}
    assert shares == inside_and_out | {("stem.0", 1.0), ("depthwise", 1.0), ("last", 0.0)}


class Tied(nn.Module):
    """Two linear layers share one weight."""

    def __init__(self):
        super().__init__()
        self.pointwise = nn.Conv2d(3, 12, 1)
        self.middle, self.last = nn.Linear(12, 12), nn.Linear(12, 12)
        self.last.weight = self.middle.weight

    def forward(self, x):
        return self.last(self.middle(self.pointwise(x).mean((2, 3))))


def test_a_shared_weight_counts_all_its_layers_and_a_frozen_one_does_not_decay():
    torch.manual_seed(0)
    supernet = Supernet(Tied(), images(16).tensors[0], (2, 4), edge_bits=None)
    layers = {name: supernet.layers[name] for name in ("middle", "last")}
    for layer in supernet.layers.values():
        layer.op.weight.grad = torch.zeros_like(layer.op.weight)
    frozen = supernet.layers["pointwise"].op.weight
    frozen.requires_grad_(False)
    frozen.grad = None
    configs = [supernet.uniform(2), supernet.uniform(2).replace("last", Bits(4, 4))]
    decay_by_region(supernet, 0.1, configs)
    weight = layers["last"].op.weight
    shares = [decay_of(w, layers.items(), configs) for w in weight.flatten().tolist()]
    assert set(shares) == {1.0, -2.0}  # outside, and inside in three passes
    expected = [0.1 * w * s for w, s in zip(weight.flatten().tolist(), shares, strict=True)]
    assert weight.grad.flatten().tolist() == pytest.approx(expected)
    assert frozen.grad is None


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9997])
def test_the_average_follows_the_weights_with_a_warmed_up_decay(decay):
    model = nn.Linear(1, 1, bias=False)
    parameters = nn.ParameterList(model.parameters())
    average, expected = average_weights(parameters, decay), model.weight.item()
    for n in range(40):
        with torch.no_grad():
            model.weight.fill_(float(n**2))
        average.update_parameters(parameters)
        now = min(decay, (1 + n) / (10 + n))
        expected = now * expected + (1 - now) * n**2
        averaged = averaged_model(model, average)
        assert averaged.weight.item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == 39**2


def test_the_averaged_model_has_the_model_s_buffers_and_shared_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    average = average_weights(nn.ParameterList(model.parameters()), 0.5)
    model(torch.randn(8, 3))
    averaged = averaged_model(model, average)
    assert model.training and not averaged.training
    assert averaged[0].weight is averaged[1].weight and averaged[0].weight is not model[0].weight
    for mine, theirs in zip(averaged.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["depthwise", "last"])
def test_the_first_layer_that_is_not_finite_is_named(supernet, value, where):
    losses = {"loss": torch.tensor(1.0), "idm": torch.tensor(0.0, dtype=torch.float64)}
    supernet(images(4).tensors[0], supernet.uniform(2)).sum().backward()
    for p in supernet.parameters():
        if p.grad is not None:
            p.grad.fill_(1e30)  # whose squares overflow
    check_gradients(supernet, losses, "step 7")
    check_weights(supernet, "step 7")
    weight = supernet.layers[where].op.weight
    weight.grad.view(-1)[-1] = value
    if where != "last":
        supernet.layers["last"].op.weight.grad.fill_(value)
    with pytest.raises(FloatingPointError, match=rf"^step 7: .*'{where}' \(gradient of '"):
        check_gradients(supernet, losses, "step 7")
    weight.data.view(-1)[0] = value
    for check in (
        lambda: check_weights(supernet, "step 8"),
        lambda: check_gradients(supernet, losses, "step 8"),
    ):
        with pytest.raises(FloatingPointError, match=rf"^step 8: .*'{where}' \(weight of '"):
            check()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_named(value):
    losses = {"loss": torch.tensor(1.0), "idm": torch.tensor(value), "more": torch.tensor(-value)}
    with pytest.raises(FloatingPointError, match=f"step 7: idm={value}, more=.* layers are finite"):
        check_gradients(TinyNet(), losses, "step 7")
