"""A policy comes back as it was stored, or names what does not fit."""

import copy
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import TinyNet, images
from torch import nn

import mpqlib
from mpqlib.files import save_weights
from mpqlib.network.bits import Candidates, sample
from mpqlib.network.supernet import Supernet
from mpqlib.report.policy import describe_policy
from mpqlib.training.evaluation import evaluate, recalibrate


def unlike_its_start(supernet):
    """Changes every tensor and every sign, so that a value that is not restored shows."""
    with torch.no_grad():
        for tensor in supernet.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1).add_(0.01)
    layer = next(iter(supernet.layers.values()))
    layer.weight_quantizer.set_extra_state(torch.tensor(not layer.weight_quantizer.signed))
    return supernet


@pytest.fixture
def config(supernet):
    return sample(supernet.candidates, torch.Generator().manual_seed(5))


@pytest.fixture
def stored(supernet, config, tmp_path):
    recalibrate(supernet, images(32), config)
    return mpqlib.save_policy(tmp_path, supernet, config, {"model": "tiny", "note": "mine"})


def change(path, **entries):
    """Rewrites entries of a policy file; None removes an entry."""
    policy = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in policy.items() if v is not None}))


def test_a_policy_of_a_named_network_comes_back_in_one_call(tmp_path):
    torch.manual_seed(0)
    x = images(8).tensors[0].repeat(1, 1, 4, 4)  # (8, 3, 32, 32)
    supernet = Supernet(mpqlib.models.create("test_resnet", 3), x, (2, 4))
    config = sample(supernet.candidates, torch.Generator().manual_seed(1))
    about = {"model": "test_resnet", "classes": 3}
    unlike_its_start(supernet)
    path = mpqlib.save_policy(tmp_path, supernet, config, about)
    policy = mpqlib.load_policy(str(path))
    assert torch.equal(policy(x), supernet.eval()(x, config))
    assert not policy.training and policy.config == config and policy.about["classes"] == 3


def test_a_policy_computes_exactly_what_was_evaluated(supernet, config, tmp_path):
    data = images(32)
    evaluate(supernet, data, config, calibration=data)
    path = mpqlib.save_policy(tmp_path, supernet, config)
    policy = mpqlib.load_policy(path, model=TinyNet())
    assert torch.equal(policy(data.tensors[0]), supernet.eval()(data.tensors[0], config))


def test_a_policy_loaded_in_inference_mode_can_be_trained(tmp_path):
    torch.manual_seed(0)
    x = images(8).tensors[0].repeat(1, 1, 4, 4)  # (8, 3, 32, 32)
    supernet = Supernet(mpqlib.models.create("test_resnet", 3), x, (2, 4))
    about = {"model": "test_resnet", "classes": 3}
    path = mpqlib.save_policy(tmp_path, supernet, supernet.uniform(4), about)
    with torch.inference_mode():
        policy = mpqlib.load_policy(path)
    policy(x).sum().backward()
    layers = policy.supernet.layers.values()
    assert all(layer.op.weight.grad is not None for layer in layers)


@pytest.mark.parametrize("pair_norms", [True, False])
@pytest.mark.parametrize("edge_bits", [8, None])
def test_a_policy_of_an_own_network_comes_back(tmp_path, pair_norms, edge_bits):
    torch.manual_seed(0)
    x = images(16, seed=1).tensors[0]
    overrides = {"pointwise": Candidates((3, 5), (2, 6))}
    options = dict(pair_norms=pair_norms, edge_bits=edge_bits, overrides=overrides)
    supernet = unlike_its_start(Supernet(TinyNet(), x, (2, 3, 4), **options))
    config = sample(supernet.candidates, torch.Generator().manual_seed(2))
    path = mpqlib.save_policy(tmp_path, supernet, config)
    loaded = mpqlib.load_policy(path, model=TinyNet())
    assert torch.equal(loaded(x), supernet.eval()(x, config))
    assert loaded.supernet.candidates == supernet.candidates
    again = loaded.supernet.uniform(3)  # every other configuration, too
    assert torch.equal(loaded.supernet(x, again), supernet(x, again))


class Standardised(TinyNet):
    """Normalises each image by itself, which an image of zeros would not survive."""

    def forward(self, x):
        return super().forward(
            (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
        )


def test_a_policy_of_a_float64_network_that_normalises_each_image_comes_back(tmp_path):
    x = images(32).tensors[0].double()
    supernet = Supernet(Standardised().double(), x, (2, 3, 4), scale_step_gradient=True)
    config = supernet.uniform(3)
    path = mpqlib.save_policy(tmp_path, supernet, config)
    policy = mpqlib.load_policy(path, model=Standardised().double())
    assert torch.equal(policy(x), supernet.eval()(x, config))
    quantizer = policy.supernet.layers["pointwise"].weight_quantizer
    assert policy.supernet.scale_step_gradient and quantizer.scale_step_gradient


def test_the_statistics_of_the_policy_come_back(stored, supernet, config):
    test = images(24, seed=3)
    expected = evaluate(supernet, test, config)
    found = evaluate(mpqlib.load_policy(stored, model=TinyNet()), test)
    assert found.loss == expected.loss and torch.equal(found.correct, expected.correct)


def test_statistics_of_another_configuration_are_not_stored(supernet, config, tmp_path):
    recalibrate(supernet, images(32), supernet.uniform(4))
    recalibrate(supernet, images(32), supernet.uniform(2))
    mixed = supernet.uniform(4).replace("pointwise", supernet.uniform(2)["pointwise"])
    with pytest.raises(ValueError, match="statistics of another configuration"):
        mpqlib.save_policy(tmp_path, supernet, mixed)
    assert not list(tmp_path.iterdir())


def test_the_policy_file_says_what_it_refers_to(stored, supernet, config):
    policy = json.loads(stored.read_text())
    assert stored.name == "policy.json" and policy["note"] == "mine"
    assert policy["input_shape"] == [3, 8, 8] and policy["first"].keys() == {"stem.0"}
    assert policy["layers"] == {name: list(bits) for name, bits in config.items()}


def test_weights_can_lie_elsewhere(stored, tmp_path):
    elsewhere = tmp_path / "elsewhere.safetensors"
    (tmp_path / "supernet.safetensors").rename(elsewhere)
    with pytest.raises(FileNotFoundError, match=r"supernet\.safetensors does not exist.*weights="):
        mpqlib.load_policy(stored, model=TinyNet())
    assert mpqlib.load_policy(stored, weights=elsewhere, model=TinyNet())


def test_other_weights_are_refused(stored, supernet, tmp_path):
    save_weights(tmp_path / "supernet.safetensors", unlike_its_start(supernet), {})
    with pytest.raises(ValueError, match=r"does not hold the weights of .*SHA-256"):
        mpqlib.load_policy(stored, model=TinyNet())


def test_a_changed_byte_of_the_weights_is_noticed(stored, tmp_path):
    file = tmp_path / "supernet.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        mpqlib.load_policy(stored, model=TinyNet())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        mpqlib.load_policy(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is not JSON"),
        ("[1]", "is no policy"),
        ('{"layers": {}}', "is no policy"),
        ("\xff", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
    ],
)
def test_a_file_that_is_no_policy_is_named(tmp_path, content, message):
    file = tmp_path / "policy.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"policy\.json {message}"):
        mpqlib.load_policy(file)


def test_another_cost_model_is_named(stored):
    change(stored, cost_model="0: something else")
    with pytest.raises(ValueError, match="cost model '0: something else'"):
        mpqlib.load_policy(stored, model=TinyNet())


@pytest.mark.parametrize("key", ["tie_inputs", "float_outputs"])
def test_a_policy_of_an_earlier_version_is_named(stored, key):
    content = json.loads(stored.read_text())
    del content[key]
    stored.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="written by an earlier version of mpqlib"):
        mpqlib.load_policy(stored, model=TinyNet())


def test_a_network_without_a_name_must_be_given(stored):
    with pytest.raises(ValueError, match=r"lacks \['classes'\].*pass model=<your float network>"):
        mpqlib.load_policy(stored)


def test_a_name_that_is_no_known_network_says_how_to_give_it(supernet, config, tmp_path):
    recalibrate(supernet, images(32), config)
    path = mpqlib.save_policy(tmp_path, supernet, config, {"model": "mynet", "classes": 3})
    with pytest.raises(ValueError, match=r"name='mynet' .* pass model=<your float network>"):
        mpqlib.load_policy(path)
    assert mpqlib.load_policy(path, model=TinyNet()).config == config


def test_a_converted_network_can_be_given(stored, supernet, config):
    x = images(4).tensors[0]
    expected = supernet.eval()(x, config)
    other = unlike_its_start(copy.deepcopy(supernet))
    assert torch.equal(mpqlib.load_policy(stored, model=other)(x), expected)


class Wider(TinyNet):
    """TinyNet with more channels in its point-wise convolution."""

    def __init__(self):
        super().__init__()
        self.pointwise, self.last = nn.Conv2d(8, 16, 1), nn.Linear(16, 3)


class Renamed(TinyNet):
    """TinyNet with another name for its classifier."""

    def __init__(self):
        super().__init__()
        self.head, self.last = self.last, nn.Identity()

    def forward(self, x):
        return self.head(super().forward(x))


@pytest.mark.parametrize("network", [Wider, Renamed])
def test_a_network_that_does_not_fit_is_named(stored, network):
    with pytest.raises(ValueError, match=r"the network does not fit .*policy\.json"):
        mpqlib.load_policy(stored, model=network())


class WithSiLU(TinyNet):
    """TinyNet with another activation function."""

    def __init__(self):
        super().__init__()
        self.stem[2] = nn.SiLU()


class WithEps(TinyNet):
    """TinyNet with the epsilon that TensorFlow's networks have in one norm."""

    def __init__(self):
        super().__init__()
        self.norm.eps = 1e-3


class WithPadding(TinyNet):
    """TinyNet with another padding in its first convolution."""

    def __init__(self):
        super().__init__()
        self.stem[0] = nn.Conv2d(3, 8, 3, 2, 1, bias=False, padding_mode="reflect")


class WithShift(TinyNet):
    """TinyNet that reads its image one pixel further."""

    def forward(self, x):
        return super().forward(x.roll((1, 1), (2, 3)))


class Float32(TinyNet):
    """TinyNet that computes in float32 alone."""

    def forward(self, x):
        return super().forward(x.float())


class Random(TinyNet):
    """TinyNet that drops features in each mode."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1, training=True))


@pytest.mark.parametrize("build", [Float32, Random])
def test_networks_of_one_type_or_with_random_numbers_are_known_again(build, tmp_path):
    supernet = Supernet(build(), images(16).tensors[0], (2, 3, 4))
    before = torch.random.get_rng_state()
    path = mpqlib.save_policy(tmp_path, supernet, supernet.uniform(3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert mpqlib.load_policy(path, model=build()).config == supernet.uniform(3)
    with pytest.raises(ValueError, match="something else with the same weights"):
        mpqlib.load_policy(path, model=WithSiLU())


def test_other_processors_may_add_in_another_order(stored, monkeypatch):
    convolve = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda *args: convolve(*args) * (1 + 1e-12))
    assert mpqlib.load_policy(stored, model=TinyNet())


def test_a_policy_of_other_bits_is_refused(stored):
    other = Supernet(TinyNet(), images(16).tensors[0], (3, 4, 5), depthwise_min=4)
    with pytest.raises(ValueError, match=r"does not fit .* 3, 4 \(weights\).* 4, 5 \(weights\)"):
        mpqlib.load_policy(stored, model=other)


@pytest.mark.parametrize("build", [WithSiLU, WithEps, WithPadding, WithShift])
@pytest.mark.parametrize("converted", [False, True])
def test_a_network_of_another_build_is_refused(stored, build, converted):
    network = build()
    if converted:
        network = Supernet(network, images(16).tensors[0], (2, 3, 4))
    with pytest.raises(ValueError, match=r"does not fit .*policy\.json.* something else with the"):
        mpqlib.load_policy(stored, model=network)


def test_another_image_size_is_noticed(stored):
    larger = Supernet(TinyNet(), torch.randn(4, 3, 16, 16), (2, 3, 4))
    with pytest.raises(ValueError, match="G BitOPs, not"):
        mpqlib.load_policy(stored, model=larger)


CHANGES = [
    *({"layers": wrong} for wrong in (None, [], {"last": [2]}, {"last": [2, 4, 4]})),
    *({"candidates": wrong} for wrong in ({}, [], {"last": [2]})),
    *({"input_shape": wrong} for wrong in ([], "abc", [3, 16, 16])),
    *({"bitops_g": wrong} for wrong in ("x", math.nan, 1)),
    *({"pair_norms": "x"}, {"first": {}}, {"note": "yours"}, {"another": 1}),
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_changed_policy_file_is_noticed(stored, changes):
    change(stored, **changes)
    with pytest.raises(ValueError, match=r"policy\.json (was changed|is no policy)"):
        mpqlib.load_policy(stored, model=TinyNet())


def test_exchanged_bits_of_the_same_cost_are_noticed(stored):
    policy = json.loads(stored.read_text())
    layers = policy["layers"] | {"pointwise": policy["layers"]["pointwise"][::-1]}
    layers |= {"depthwise": policy["layers"]["depthwise"][::-1]}
    assert layers != policy["layers"]
    change(stored, layers=layers)
    with pytest.raises(ValueError, match=r"policy\.json was changed"):
        mpqlib.load_policy(stored, model=TinyNet())


def test_a_folder_is_no_policy(stored, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder: give the path of a policy\.json"):
        mpqlib.load_policy(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        mpqlib.load_policy(stored, weights=tmp_path, model=TinyNet())


def test_a_loaded_policy_can_be_saved_again_with_its_entries(stored, tmp_path):
    policy = mpqlib.load_policy(stored, model=TinyNet())
    again = mpqlib.save_policy(tmp_path / "b", policy.supernet, policy.config, policy.about)
    assert mpqlib.load_policy(again, model=TinyNet()).about["note"] == "mine"


def test_entries_are_plain_or_refused_before_anything_is_written(stored, supernet, config):
    before = {path: path.read_bytes() for path in stored.parent.iterdir()}
    with pytest.raises(ValueError, match=r"about\['a'\].*cannot be stored"):
        mpqlib.save_policy(stored.parent, supernet, config, {"a": torch.ones(2)})
    assert {path: path.read_bytes() for path in stored.parent.iterdir()} == before
    mpqlib.save_policy(stored.parent, supernet, config, {"lr": np.float32(0.5)})
    assert mpqlib.load_policy(stored, model=TinyNet()).about["lr"] == 0.5


def interrupted(monkeypatch, call, save):
    """Runs `save`, interrupted at its `call`-th renaming of a file; returns whether it was."""
    calls = itertools.count()
    replace = os.replace

    def interrupt(*args):
        if next(calls) == call:
            raise KeyboardInterrupt
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        try:
            save()
        except KeyboardInterrupt:
            return True
    return False


def test_after_interruptions_the_earlier_or_the_new_policy_loads(supernet, tmp_path, monkeypatch):
    twin, config = copy.deepcopy(supernet), supernet.uniform(4)

    def load():
        return mpqlib.load_policy(tmp_path / "policy.json", model=copy.deepcopy(twin)).about["n"]

    def save(n):
        unlike_its_start(supernet)
        mpqlib.save_policy(tmp_path, supernet, config, {"n": n})

    save(n := 0)
    interruptions = 0
    for first, second in itertools.product(range(5), repeat=2):
        for call in (first, second):
            n, before = n + 1, load()
            was_interrupted = interrupted(monkeypatch, call, lambda n=n: save(n))
            assert load() in ((before, n) if was_interrupted else (n,))
            interruptions += was_interrupted
    assert interruptions >= 20
    save(n + 1)
    assert {p.name for p in tmp_path.iterdir()} == {"policy.json", "supernet.safetensors"}


def test_bits_that_are_no_candidates_are_refused(supernet, tmp_path):
    wrong = supernet.uniform(2).replace("pointwise", (7, 7))
    with pytest.raises(ValueError, match="pointwise"):
        describe_policy(supernet, wrong, "", {})
    with pytest.raises(ValueError, match="pointwise"):
        mpqlib.save_policy(tmp_path, supernet, wrong)
    assert not list(tmp_path.iterdir())
