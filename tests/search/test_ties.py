"""Layers that read the same tensor can share its quantizer and its bits, in every search."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from mpqlib import models
from mpqlib.network.bits import sample
from mpqlib.network.cost import bitops_at
from mpqlib.network.supernet import Supernet, tie, tied_inputs
from mpqlib.report.policy import load_policy, save_policy
from mpqlib.search.assignment import assignment
from mpqlib.search.baselines import evaluate_all, evolution, random_search, restrict
from mpqlib.search.greedy import greedy
from mpqlib.training.loop import Run, TrainConfig, train, update


@pytest.fixture
def net() -> Supernet:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32)
    return Supernet(models.create("resnet18", 3), x, (2, 3, 4), tie_inputs=True)


def is_tied(net: Supernet, config) -> bool:
    return all(len({config[name].act for name in group}) == 1 for group in tied_inputs(net.table))


def test_first_convolutions_and_shortcuts_share_one_quantizer(net):
    blocks = [f"layer{i}.0" for i in (2, 3, 4)]
    assert tied_inputs(net.table) == [(f"{b}.conv1", f"{b}.downsample.0") for b in blocks]
    for first, other in tied_inputs(net.table):
        assert net.layers[first].act_quantizer is net.layers[other].act_quantizer
        # Weights have bits of their own.
        assert net.layers[first].weight_quantizer is not net.layers[other].weight_quantizer


def test_without_the_option_nothing_is_tied():
    x = torch.randn(2, 3, 32, 32)
    assert not tied_inputs(Supernet(models.create("resnet18", 3), x, (2, 4)).table)


class Overwriting(nn.Module):
    """`b` reads the tensor of `a` after a ReLU has written over it; `c` reads another copy."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.b, self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        a = self.a(x)
        F.relu(x, inplace=True)
        return (a + self.b(x) + self.c(x) + self.d(a)).mean((2, 3))


def test_a_tensor_that_was_written_over_is_another_one():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = Supernet(Overwriting(), x, (2, 4), edge_bits=None, tie_inputs=True)
    assert {"a", "b"} not in [set(group) for group in tied_inputs(net.table)]


class Fork(nn.Module):
    """`a` and `b` read the same tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return (self.a(x) + self.b(x)).mean((2, 3))


def test_a_checkpoint_of_a_network_with_other_ties_is_refused(tmp_path):
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4))
    path, config = tmp_path / "run.pt", TrainConfig(epochs=1, batch_size=4)
    tied, untied = (
        Supernet(Fork(), dataset[:2][0], (2, 4), edge_bits=None, tie_inputs=tie_inputs)
        for tie_inputs in (True, False)
    )
    train(tied, dataset, config, checkpoint=path)
    with pytest.raises(ValueError, match=r"tied_inputs: \[\['a', 'b'\]\] there, \[\] now"):
        train(untied, dataset, config, checkpoint=path)


def test_configurations_that_untie_layers_are_refused(net):
    drawn = sample(net.candidates, torch.Generator().manual_seed(0))
    drawn = drawn.replace("layer2.0.conv1", (2, 2)).replace("layer2.0.downsample.0", (2, 3))
    with pytest.raises(ValueError, match="reads the same tensor at"):
        net.check(drawn)
    tied = tie(drawn, net.table)
    net.check(tied)
    assert {n: b.weight for n, b in tied.items()} == {n: b.weight for n, b in drawn.items()}


def test_every_search_keeps_them_tied(net):
    generator = torch.Generator().manual_seed(0)

    def error(config) -> float:
        net.check(config)
        return sum(1 / b.weight + 2 / b.act for b in config.values())

    budget = bitops_at(net.table, 2.5)
    found = [
        greedy(net, error, budget)[-1],
        greedy(net, error, budget, rule="paper")[-1],
        random_search(net, error, budget, 10, generator),
        evolution(net, error, budget, 30, generator),
        assignment(net, error, budget)[-1],
    ]
    assert all(is_tied(net, step.config) and step.bitops <= budget for step in found)
    few = restrict(net, 2, (2, 4), rest=3)
    assert evaluate_all(few, lambda config: few.check(config) or 0.0)


def test_training_draws_tied_bits_and_a_policy_comes_back(net, tmp_path):
    run = Run.start(TrainConfig(batch_size=8, compile="never"), net.train(), 8)
    assert all(is_tied(net, config) for _ in range(5) for config in run.draw_configs())
    x = torch.randn(8, 3, 32, 32)
    update(run, x, torch.arange(8) % 3)
    config = net.uniform(3)
    path = save_policy(tmp_path, net.eval(), config, dict(model="resnet18", classes=3))
    loaded = load_policy(path)
    assert tied_inputs(loaded.supernet.table) == tied_inputs(net.table)
    assert torch.equal(loaded(x), net(x, config))
