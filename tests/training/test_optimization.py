"""Learning rate, optimizers, region decay, averaged weights and the check for NaN."""

import math

import pytest
import torch
from conftest import TinyNet, images
from torch import nn

from mpqlib.network.quantizer import Quantizer
from mpqlib.training.optimization import (
    average_weights,
    averaged_model,
    check_gradients,
    check_weights,
    create_optimizers,
    decay_outside_region,
    learning_rate,
    schedule_learning_rate,
)

RATES = dict(lr=0.1, step_lr=0.01, momentum=0.9, weight_decay=0.5)


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    shares = [learning_rate(epoch, epochs=10, warmup=2) for epoch in (0, 1, 2, 6, 10)]
    assert shares == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_the_schedule_sets_the_rate_at_the_middle_of_each_step():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule, rates = schedule_learning_rate(optimizer, steps=4, epochs=3, warmup=1), []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    warming = [0.4 * (k + 0.5) / 4 for k in range(4)]
    falling = [0.2 * (1 + math.cos(math.pi * (k + 0.5) / 8)) for k in range(8)]
    assert rates == pytest.approx(warming + falling)


@pytest.mark.parametrize("region_decay", [True, False])
def test_each_trained_parameter_is_in_one_group(supernet, region_decay):
    supernet.layers["pointwise"].op.weight.requires_grad_(False)
    optimizers = create_optimizers(supernet, **RATES, region_decay=region_decay)
    sgd, adam = optimizers
    assert isinstance(sgd, torch.optim.SGD) and isinstance(adam, torch.optim.Adam)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    trained = {id(p) for p in supernet.parameters() if p.requires_grad}
    assert len(held) == len(trained) and {id(p) for p in held} == trained
    steps = {id(p) for m in supernet.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    assert {id(p) for p in adam.param_groups[0]["params"]} == steps
    weights = {id(layer.op.weight) for layer in supernet.layers.values()} & trained
    decayed = {id(p) for g in sgd.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == (set() if region_decay else weights)


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        create_optimizers(TinyNet().requires_grad_(False), **RATES, region_decay=False)


def test_steps_alone_can_be_trained(supernet):
    for name, p in supernet.named_parameters():
        p.requires_grad_("steps" in name)
    (adam,) = create_optimizers(supernet, **RATES, region_decay=True)
    assert isinstance(adam, torch.optim.Adam)


def clips(layer, w):
    """Whether the layer's smallest bit-width clips the weight `w`."""
    bits = min(layer.weight_quantizer.bits)
    step = layer.weight_quantizer.step(bits).item()
    return not -(2 ** (bits - 1)) * step <= w <= (2 ** (bits - 1) - 1) * step


def test_region_decay_spares_what_the_smallest_bits_do_not_clip(supernet):
    for layer in supernet.layers.values():
        layer.op.weight.grad = torch.zeros_like(layer.op.weight)
        layer.op.weight.data[::2] *= 4  # some leave the region
    decay_outside_region(supernet, 0.1)
    counts = {True: 0, False: 0}
    for layer in supernet.layers.values():
        weight = layer.op.weight
        for w, gradient in zip(weight.flatten().tolist(), weight.grad.flatten(), strict=True):
            outside = clips(layer, w)
            counts[outside] += 1
            assert float(gradient) == pytest.approx(0.1 * w if outside else 0.0)
    assert min(counts.values()) > 0


@pytest.mark.parametrize("limit", [0.3, 2.0])  # of the second layer, as a share of the weights'
def test_a_shared_weight_decays_once_and_a_frozen_one_not_at_all(supernet, limit):
    first, second = supernet.layers["depthwise"], supernet.layers["last"]
    bits = min(second.weight_quantizer.bits)
    with torch.no_grad():
        first.op.weight[::2] *= 4
        top = first.op.weight.abs().max()
        second.weight_quantizer.steps[str(bits)].copy_(limit * top / 2 ** (bits - 1))
        supernet.layers["pointwise"].op.weight.mul_(100)
    second.op.weight = first.op.weight
    for layer in supernet.layers.values():
        layer.op.weight.grad = torch.zeros_like(layer.op.weight)
    frozen = supernet.layers["pointwise"].op.weight
    frozen.requires_grad_(False)
    frozen.grad = None
    decay_outside_region(supernet, 0.1)
    weights, gradients = first.op.weight.flatten().tolist(), first.op.weight.grad.flatten().tolist()
    outside = [clips(first, w) or clips(second, w) for w in weights]
    assert any(outside) and not all(outside)
    expected = [0.1 * w if out else 0.0 for w, out in zip(weights, outside, strict=True)]
    assert gradients == pytest.approx(expected)
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
