"""Gradients of one step, against losses written out one by one."""

import copy

import pytest
import torch
from conftest import Normalised, TinyNet, images
from torch import nn

from mpqlib.network.bits import largest, sample
from mpqlib.network.supernet import Supernet
from mpqlib.training.step import float_gradients, idm_gradient_share, one_shot_gradients


def reference_gradients(supernet, x, y, configs, idm_weight, smoothing):
    """The one-shot step by the book: every loss by itself, its gradient by autograd, then a sum."""
    outputs = {}
    for name, layer in supernet.layers.items():
        layer.register_forward_hook(
            lambda m, i, y, name=name: outputs.__setitem__(name, y.clone()) or y.clone()
        )

    def run(config):
        outputs.clear()
        return supernet(x, config), dict(outputs)

    def cross_entropy(logits):
        p = logits.log_softmax(1)
        hit = -p[torch.arange(len(y)), y].mean()
        return (1 - smoothing) * hit - smoothing * p.mean()

    parameters = dict(supernet.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def add(loss):
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            total[name] += 0 if gradient is None else gradient

    high, target = run(largest(supernet.candidates))
    add(cross_entropy(high))
    p = high.detach().softmax(1)
    for config in configs:
        low, ours = run(config)
        divergence = (p * (p.log() - low.log_softmax(1))).sum(1).mean()
        loss = 0.5 * cross_entropy(low) + 0.5 * divergence
        for name, (weight_bits, _) in config.items():
            offered = supernet.candidates[name].weight
            if len(offered) > 1 and weight_bits == min(offered):
                loss = loss + idm_weight * (ours[name] - target[name].detach()).square().mean()
        add(loss)
    return total


@pytest.mark.parametrize("idm_weight", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_shot_gradients_are_those_of_the_paper(supernet, idm_weight, smoothing):
    supernet = supernet.double().train()
    x, y = images(16).tensors
    x = x.double()
    generator = torch.Generator().manual_seed(3)
    configs = [sample(supernet.candidates, generator) for _ in range(3)]
    expected = reference_gradients(copy.deepcopy(supernet), x, y, configs, idm_weight, smoothing)
    options = dict(idm_weight=idm_weight, smoothing=smoothing)
    one_shot_gradients(supernet, x, y, supernet.candidates, configs, **options)
    for name, p in supernet.named_parameters():
        ours = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(ours, expected[name], rtol=1e-9, atol=1e-12)


def test_bfloat16_gradients_point_where_those_of_float32_do(supernet, dataset):
    found, (x, y) = {}, dataset.tensors
    for dtype in (torch.float32, torch.bfloat16):
        supernet.zero_grad()
        configs = [supernet.uniform(3)]
        one_shot_gradients(supernet, x, y, supernet.candidates, configs, dtype=dtype)
        weights = [layer.op.weight.grad.flatten() for layer in supernet.layers.values()]
        assert all(grad.dtype == torch.float32 for grad in weights)
        found[dtype] = weights
    assert not all(map(torch.equal, *found.values()))  # it is another arithmetic
    for exact, half in zip(*found.values(), strict=True):
        assert torch.cosine_similarity(exact, half, dim=0) > 0.9


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_float_gradients_are_those_of_cross_entropy(smoothing):
    model, twin = (TinyNet().double().train() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x, y = images(16).tensors
    found = float_gradients(model, x.double(), y, smoothing)
    logits = twin(x.double())
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, y)
    loss.backward()
    assert found["loss"].item() == pytest.approx(loss.item())
    hits = sum(int(row.argmax() == label) for row, label in zip(logits, y, strict=True))
    assert found["accuracy"].item() == pytest.approx(hits / 16)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("frozen", [["stem.0"], ["depthwise", "pointwise", "last"]])
def test_frozen_weights_get_no_gradient_and_the_others_theirs(supernet, frozen):
    supernet = supernet.double().train()
    x, y = images(16).tensors
    configs = [supernet.uniform(2), supernet.uniform(3)]
    twin = copy.deepcopy(supernet)
    weights = [supernet.layers[name].op.weight for name in frozen]
    for weight in weights:
        weight.requires_grad_(False)
    options = dict(idm_weight=0.1, grid_weight=0.1)
    for model in (supernet, twin):
        one_shot_gradients(model, x.double(), y, model.candidates, configs, **options)
    for ours, theirs in zip(supernet.parameters(), twin.parameters(), strict=True):
        if any(ours is weight for weight in weights):
            assert ours.grad is None
        elif theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("weight", [0.01, 1.0])
def test_share_of_the_idm_gradient(supernet, weight):
    supernet = supernet.double().train()
    x, y = images(16).tensors
    configs = [supernet.uniform(2), supernet.uniform(3)]
    gradients = {}
    for idm_weight in (0.0, weight):
        twin = copy.deepcopy(supernet)
        arguments = twin, x.double(), y, configs, idm_weight, 0.0
        gradients[idm_weight] = reference_gradients(*arguments)
    task = sum(float(g.square().sum()) for g in gradients[0.0].values()) ** 0.5
    of_idm = [gradients[weight][name] - g for name, g in gradients[0.0].items()]
    expected = sum(float(g.square().sum()) for g in of_idm) ** 0.5 / task
    before = copy.deepcopy(supernet.state_dict())
    step = (supernet, x.double(), y, supernet.candidates, configs)
    assert idm_gradient_share(*step, weight) == pytest.approx(expected, rel=1e-8)
    assert idm_gradient_share(*step, 0.0) == 0
    assert all(torch.equal(value, before[key]) for key, value in supernet.state_dict().items())
    assert all(p.grad is None for p in supernet.parameters())


def test_a_network_that_normalises_in_place_is_trained_like_its_twin():
    found = []
    for in_place in (True, False):
        x, y = images(16).tensors
        supernet = Supernet(Normalised(in_place), x, (2, 3, 4))
        configs = [supernet.uniform(b) for b in (3, 2)]
        losses = one_shot_gradients(supernet, x, y, supernet.candidates, configs)
        gradients = {n: p.grad for n, p in supernet.named_parameters() if p.grad is not None}
        found.append((losses, gradients))
    (losses, gradients), (twin_losses, twin_gradients) = found
    for name, loss in losses.items():
        assert torch.allclose(loss, twin_losses[name], rtol=1e-4), name
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, twin_gradients[name], rtol=1e-3, atol=1e-5), name
