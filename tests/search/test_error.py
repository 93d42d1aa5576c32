"""A run that goes on from the last one against one from the start."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import Normalised, TinyNet, images
from torch import nn

from mpqlib import models
from mpqlib.network.bits import BitConfig, Bits, largest, sample
from mpqlib.network.supernet import Supernet
from mpqlib.search.error import Incremental, batch_error, kl_error
from mpqlib.search.proxies import noise_error
from mpqlib.training.calibration import fit_steps
from mpqlib.training.evaluation import recalibrate
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


def run_with_batch_statistics(supernet, x, config=None):
    """Logits in float64; each batch norm is a copy that normalises by the batch."""
    plain = copy.deepcopy(supernet).eval()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.train()
    with torch.no_grad():
        return plain(x, config).double()


def kl_literally(target, logits):
    """Mean over images of sum of p log(p / q), from logits, number by number."""
    total = 0.0
    for row_p, row_q in zip(target.tolist(), logits.tolist(), strict=True):
        p, q = ([math.exp(v) for v in row] for row in (row_p, row_q))
        p, q = ([v / sum(row) for v in row] for row in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(target)


@pytest.mark.parametrize("reference", [None, "largest", "float"])
def test_kl_divergence_from_the_reference(supernet, reference):
    x = images(16).tensors[0]
    supernet.train()(images(32).tensors[0])  # running statistics unlike those of the batch
    options = {"reference": reference} if reference else {}
    error = kl_error(supernet, x, **options)
    if reference == "float":
        with torch.no_grad():
            target = supernet.eval()(x).double()
    else:
        target = run_with_batch_statistics(supernet, x, largest(supernet.candidates))
        assert error(largest(supernet.candidates)) == 0
    for bits in (2, 3, 2):
        config = supernet.uniform(bits).replace("pointwise", (4, 2))
        expected = kl_literally(target, run_with_batch_statistics(supernet, x, config))
        assert error(config) == pytest.approx(expected, rel=1e-4)
        assert expected > 1e-4


def test_kl_error_names_what_is_not_allowed(supernet):
    x = images(8).tensors[0]
    with pytest.raises(ValueError, match="reference='teacher' is not allowed: one of"):
        kl_error(supernet, x, "teacher")
    with pytest.raises(ValueError, match="x holds no images"):
        kl_error(supernet, x[:0])
    with pytest.raises(ValueError, match="a Supernet is needed"):
        kl_error(TinyNet(), x)


def test_float_reference_needs_statistics_of_its_own(supernet):
    x = images(16).tensors[0]
    train(supernet, images(32), TrainConfig(epochs=1, batch_size=16, lr=0.1))
    with pytest.raises(ValueError, match="float mode after one-shot training"):
        kl_error(supernet, x, "float")
    recalibrate(supernet, images(32), None)
    assert kl_error(supernet, x, "float")(supernet.uniform(3)) > 0


ERRORS = {
    "cross-entropy": lambda supernet, x, y: batch_error(supernet, x, y),
    "largest": lambda supernet, x, y: kl_error(supernet, x),
    "float": lambda supernet, x, y: kl_error(supernet, x, "float"),
    "noise": lambda supernet, x, y: noise_error(supernet, x),
}


def assign_state(supernet, x):
    state = {n: t * 1.5 if n.endswith("op.weight") else t for n, t in supernet.state_dict().items()}
    supernet.load_state_dict(state, assign=True)


def replace_weight(supernet, x):
    op = supernet.layers["pointwise"].op
    op.weight = nn.Parameter(op.weight.detach() * 1.5)


def set_data(supernet, x):
    weight = supernet.layers["pointwise"].op.weight
    weight.data = weight.data * 1.5


CHANGES = {
    "assigned state": assign_state,
    "replaced weight": replace_weight,
    "data set": set_data,
    "images": lambda supernet, x: x[:, 0].mul_(3),
    "statistics": lambda supernet, x: recalibrate(supernet, images(32), None),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_computed_anew_after_every_kind_of_change(supernet, name, change):
    (x, y), config = images(16).tensors, supernet.uniform(2)
    error = ERRORS[name](supernet, x, y)
    before = error(config)
    CHANGES[change](supernet, x)
    expected = ERRORS[name](supernet, x, y)(config)
    assert error(config) == expected
    changed = change != "statistics" or name == "float"
    assert (expected != pytest.approx(before, rel=1e-4)) == changed


class Scaled(nn.Module):
    """TinyNet, whose logits a parameter and a buffer of its own scale."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = TinyNet(), nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x):
        return self.net(x) * self.scale + self.shift


@pytest.mark.parametrize("name", ["scale", "shift"])
@pytest.mark.parametrize("assign", [True, False])
def test_parameters_and_buffers_of_the_network_itself_are_read_anew(name, assign):
    (x, y) = images(16).tensors
    supernet = Supernet(Scaled(), x, (2, 4))
    error, config = batch_error(supernet, x, y), supernet.uniform(2)
    before = error(config)
    state = supernet.state_dict()
    state[f"model.{name}"] = state[f"model.{name}"] + torch.arange(3)
    supernet.load_state_dict(state, assign=assign)
    assert error(config) == batch_error(supernet, x, y)(config) != before


def test_a_network_in_another_type_than_the_images_is_refused(supernet):
    x, y = images(16).tensors
    error, config = batch_error(supernet, x, y), supernet.uniform(2)
    error(config)
    supernet.double()
    with pytest.raises(RuntimeError, match="type"):
        error(config)
    exact = batch_error(supernet, x.double(), y)(config)
    supernet.float()
    assert error(config) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_16_bit_networks_are_as_fine_as_float32(supernet, name, dtype):
    x, y = images(16).tensors
    supernet.to(dtype).eval()
    x = x.to(dtype)
    error, config = ERRORS[name](supernet, x, y), supernet.uniform(2)
    value = error(config)
    assert float(torch.tensor(value, dtype=dtype)) != value  # no number of 16 bits
    if name == "cross-entropy":
        logits = run_with_batch_statistics(supernet, x, config)
        assert value == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
