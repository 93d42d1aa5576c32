"""Compiled training against the same training without torch.compile, in float64.

The graphs are those of torch.compile, but PyTorch's own operations run them: to generate code takes
a minute for each network. Tests marked cuda, and the profile of 12_benchmark, run generated code.
"""

import copy
from functools import partial

import pytest
import torch
import torch._dynamo
from conftest import TinyNet
from timm.layers import BatchNormAct2d
from torch import nn

from mpqlib.network.bits import sample
from mpqlib.network.compilation import one_pass
from mpqlib.network.quantizer import gradients, quantize
from mpqlib.network.supernet import Supernet
from mpqlib.training.loop import Run, TrainConfig, update


class ActivationInside(nn.Module):
    """Norms with an activation inside, a shortcut, and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2), BatchNormAct2d(8)
        self.a, self.norm_a = nn.Conv2d(8, 8, 3, padding=1), BatchNormAct2d(8, apply_act=False)
        self.twice, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = self.relu(self.norm_a(self.a(x)) + x)
        x = self.relu(self.twice(self.relu(self.twice(x))))
        return self.last(x.mean((2, 3)))


def assert_close(found, expected, name):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", [TinyNet, ActivationInside])
def test_compiled_training_gives_the_same_numbers_by_one_program(kind, monkeypatch):
    for function in (quantize, gradients):
        one_pass(function, "cpu")  # these two are compiled by generated code
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    x, y = torch.randn(24, 3, 12, 12, dtype=torch.float64), torch.arange(24) % 3
    plain = Supernet(kind().double(), x, (2, 3, 4)).train()
    compiled = copy.deepcopy(plain)
    config = dict(batch_size=8, epochs=1, lr=0.003, idm_weight=1.0, grid_start=0)
    runs = [
        Run.start(TrainConfig(compile=choice, **config), net, 24)
        for net, choice in ((plain, "never"), (compiled, "always"))
    ]
    batches = [(x[at : at + 8], y[at : at + 8]) for at in (0, 8, 16)]
    expected = [update(runs[0], *batch) for batch in batches]
    torch._dynamo.reset()
    programs = torch._dynamo.utils.counters
    programs.clear()
    for batch, losses in zip(batches, expected, strict=True):
        found = update(runs[1], *batch)
        for name, loss in losses.items():
            assert_close(found[name], loss, name)
    for name, tensor in plain.state_dict().items():
        assert_close(compiled.state_dict()[name], tensor, name)
    # One program for the pass that keeps outputs, and one for those that are compared with them.
    assert programs["stats"]["unique_graphs"] == 2 and not programs["graph_break"]
    runs[1].one_shot.remove()
    config = sample(plain.candidates, torch.Generator().manual_seed(1))
    assert_close(compiled.eval()(x, config), plain.eval()(x, config), "logits")
