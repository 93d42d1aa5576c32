"""A run that goes on from the last one against one from the start."""

from contextlib import nullcontext

import pytest
import torch
from conftest import Normalised, TinyNet, images
from torch import nn

from mpqlib import models
from mpqlib.network.bits import BitConfig, Bits, sample
from mpqlib.network.supernet import Supernet
from mpqlib.search.error import Incremental, batch_error
from mpqlib.training.calibration import fit_steps
from mpqlib.training.loop import TrainConfig, train


class Overwriting(nn.Module):
    """Writes over what a layer gave, in every way; with `old`, it reads an alias afterwards."""

    def __init__(self, old: bool):
        super().__init__()
        self.old = old
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.act, self.last = nn.Hardswish(inplace=True), nn.Linear(3, 3)

    def forward(self, x):
        y = self.a(x)
        y += 1
        z = self.act(y)
        z *= 2
        z = nn.functional.elu(self.b(z).add_(y if self.old else 1), inplace=True)
        return self.last(self.c(z).mul_(z).relu_().mean((2, 3)))


NETWORKS = {
    "tiny": TinyNet,
    "overwriting": lambda: Overwriting(False),
    "reading what it wrote over": lambda: Overwriting(True),
    **{
        name: lambda name=name: models.create(name, 3)
        for name in ("mobilenet_v3_small", "shufflenet_v2_x0_5", "resnetv2_18")
    },
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_outputs_are_those_of_a_run_from_the_start(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    supernet = Supernet(NETWORKS[name](), x, (2, 4)).eval()
    divisible, generator = name != "reading what it wrote over", torch.Generator().manual_seed(0)
    with nullcontext() if divisible else pytest.warns(UserWarning, match="runs the whole network"):
        outputs = Incremental(supernet, x)
    config = sample(supernet.candidates, generator)
    for layer in [None, *list(config)[::3], list(config)[-1], *list(config)[::-4]]:
        if layer:
            weight, act = (offered[0] for offered in supernet.candidates[layer])
            config = config.replace(layer, Bits(weight, act))
        assert torch.equal(outputs(config), supernet(x, config)), layer
    again = sample(supernet.candidates, generator)
    assert torch.equal(outputs(again), supernet(x, again))
    assert outputs.divisible == divisible


def test_only_what_depends_on_the_changed_layer_is_run(supernet):
    x, ran = torch.randn(2, 3, 8, 8), []
    outputs = Incremental(supernet.eval(), x)
    for name, layer in supernet.layers.items():
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    config = supernet.uniform(4)
    outputs(config)
    assert ran == list(supernet.layers)
    outputs(config)
    outputs(config.replace("pointwise", Bits(2, 4)))
    assert ran[4:] == ["pointwise", "last"]


class AddedInPlace(nn.Module):
    """The output of one convolution, to which that of another one is added in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        self.one, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.one(x)
        y = y.add_(self.other(x))
        return self.last(y.mean((2, 3)))


@torch.no_grad()
def test_what_is_added_in_place_is_added_once():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    supernet = Supernet(AddedInPlace(), x, (2, 4)).eval()
    outputs, config = Incremental(supernet, x), supernet.uniform(4)
    assert outputs.divisible
    for layer in [None, "other", "one", "other"]:
        if layer:
            bits = 2 if config[layer].weight == 4 else 4
            config = config.replace(layer, Bits(bits, bits))
        assert torch.equal(outputs(config), supernet(x, config)), layer


class Dropping(TinyNet):
    """TinyNet with dropout before its classifier."""

    def __init__(self):
        super().__init__()
        self.last = nn.Sequential(nn.Dropout(), self.last)


def test_the_error_is_computed_in_eval_mode_and_the_mode_comes_back():
    x, y = images(8).tensors
    supernet = Supernet(Dropping(), x, (2, 4))
    error, config = batch_error(supernet, x, y), supernet.uniform(4)
    expected, other = error(config), error(supernet.uniform(2))
    assert expected != other
    supernet.model.stem.train()
    modes = [module.training for module in supernet.modules()]
    assert error(config) == expected
    assert [module.training for module in supernet.modules()] == modes
    supernet.train()
    assert error(supernet.uniform(2)) == other and error(config) == expected
    assert all(module.training for module in supernet.modules())


def test_a_configuration_that_does_not_fit_is_named(supernet):
    error, config = batch_error(supernet, *images(8).tensors), supernet.uniform(4)
    with pytest.raises(ValueError, match=r"config: .*missing: \['last'\]"):
        error(BitConfig(config.layers[:-1]))
    for wrong in ((5, 5), (4.0, 4)):
        with pytest.raises(ValueError, match=r"config\['pointwise'\]=.* is not allowed"):
            error(config.replace("pointwise", wrong))
    with pytest.raises(ValueError, match="is not a BitConfig"):
        error({name: (4, 4) for name in config})


@pytest.mark.filterwarnings("ignore:every pass runs the whole network")
def test_images_that_a_network_normalises_in_place_stay():
    x, y = images(8).tensors
    errors = {}
    for in_place in (True, False):
        own = x.clone()
        supernet = Supernet(Normalised(in_place, norms=False), own, (2, 3, 4))
        error = batch_error(supernet, own, y)
        configs = [supernet.uniform(b) for b in (2, 3, 2, 4, 4)]
        errors[in_place] = [error(config) for config in configs]
        supernet(own, configs[0])
        assert torch.equal(own, x)
    assert errors[True] == pytest.approx(errors[False], rel=1e-6)


def test_outputs_are_computed_anew_after_steps_or_weights_have_changed(supernet):
    (x, y), config = images(16).tensors, supernet.uniform(3)
    error = batch_error(supernet, x, y)
    before = error(config)
    fit_steps(supernet, x)
    assert error(config) == batch_error(supernet, x, y)(config) != before
    with torch.no_grad():
        supernet.layers["pointwise"].op.weight.mul_(1.5)
    assert error(config) == batch_error(supernet, x, y)(config)
    before = error(config)
    train(supernet, images(32), TrainConfig(epochs=1, batch_size=16, lr=0.1))
    assert error(config) == batch_error(supernet, x, y)(config) != before


def test_an_interrupted_pass_leaves_no_outputs_of_two_configurations(supernet):
    (x, y), a = images(16).tensors, supernet.uniform(3)
    b = supernet.uniform(4)
    c = BitConfig.of(dict(a) | {"pointwise": b["pointwise"]})
    error = batch_error(supernet, x, y)
    error(a)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = supernet.layers["pointwise"].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        error(b)
    handle.remove()
    for config in (c, a):
        assert error(config) == batch_error(supernet, x, y)(config)


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match="supernet is a TinyNet: a Supernet is needed"):
        batch_error(TinyNet(), *images(8).tensors)
