"""A new last layer: everything else is that of the trained network, or it is refused."""

import pytest
import torch
from conftest import SMALL, TinyNet, images
from torch import nn

from mpqlib.network.bits import sample
from mpqlib.network.classifier import copy_all_but_last
from mpqlib.network.supernet import Supernet
from mpqlib.training.loop import train


def network(classes: int = 3, seed: int = 0) -> TinyNet:
    torch.manual_seed(seed)
    found = TinyNet()
    found.last = nn.Linear(12, classes)
    return found


def convert(model: nn.Module, bits=(2, 3, 4), seed: int = 1, **options) -> Supernet:
    return Supernet(model, images(16, seed).tensors[0], bits, **options)


@pytest.fixture(scope="module")
def trained() -> Supernet:
    return train(convert(network()), images(48), SMALL)[0]


def is_last(name: str) -> bool:
    return "last." in name


@pytest.mark.parametrize("classes", [3, 5])  # equal shapes are replaced as well
def test_a_supernet_keeps_all_tensors_but_those_of_its_last_layer(trained, classes):
    fresh = convert(network(classes, seed=5), seed=2)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    copy_all_but_last(trained, fresh)
    own = trained.state_dict()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, before[name] if is_last(name) else own[name]), name
    assert not torch.equal(before["model.last.op.weight"][:3], own["model.last.op.weight"])


def test_a_supernet_computes_the_same_features_at_all_bits(trained):
    fresh = convert(network(5, seed=5), seed=2)
    copy_all_but_last(trained, fresh)
    x, generator = images(8, seed=3).tensors[0], torch.Generator().manual_seed(0)
    seen = {}
    for supernet in (trained.eval(), fresh.eval()):
        last = supernet.layers["last"]
        last.register_forward_pre_hook(lambda _, inputs, key=supernet: seen.update({key: inputs}))
    for config in [sample(trained.candidates, generator) for _ in range(10)]:
        for supernet in (trained, fresh):
            supernet(x, config)
        assert torch.equal(seen[trained][0], seen[fresh][0])


def test_a_float_network_keeps_all_tensors_but_those_of_its_last_layer():
    model, fresh = network(3), network(4, seed=1)
    before = fresh.last.weight.clone()
    copy_all_but_last(model, fresh)
    assert torch.equal(fresh.last.weight, before)
    for name, tensor in model.state_dict().items():
        assert is_last(name) or torch.equal(fresh.state_dict()[name], tensor)


def with_last_norm(classes: int) -> nn.Sequential:
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, classes, 1), nn.BatchNorm2d(classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("classes", [3, 5])
def test_a_batch_norm_of_the_last_layer_belongs_to_it(classes):
    model, fresh = with_last_norm(3), with_last_norm(classes)
    model[2].running_mean += 5
    copy_all_but_last(model, fresh)
    assert torch.equal(fresh[0].weight, model[0].weight) and (fresh[2].running_mean == 0).all()


class Scaled(nn.Module):
    """Ends in Linear, batch norm, and a factor and an offset for each class."""

    def __init__(self, classes: int):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.norm, self.hidden = nn.BatchNorm1d(4), nn.Linear(4, 6)
        self.last, self.last_norm = nn.Linear(6, classes), nn.BatchNorm1d(classes)
        self.last_factor = nn.Parameter(torch.rand(classes))
        self.last_offset = nn.Parameter(torch.rand(classes))

    def forward(self, x):
        x = self.hidden(self.norm(self.features(x).mean((2, 3))))
        return self.last_norm(self.last(x.relu())) * self.last_factor + self.last_offset


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("convert", [lambda model: model, convert], ids=["float", "supernet"])
def test_all_that_is_behind_the_last_layer_belongs_to_it(classes, convert):
    torch.manual_seed(0)
    model, fresh = convert(Scaled(3)), convert(Scaled(classes))
    for tensor in [*model.parameters(), *model.buffers()]:  # as if it was trained
        if tensor.dtype != torch.bool:
            tensor.data += 5
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    copy_all_but_last(model, fresh)
    own = model.state_dict()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, before[name] if "last" in name else own[name]), name


def test_what_does_not_fit_is_refused_and_changes_nothing(trained):
    wide = network(5)
    wide.pointwise = nn.Conv2d(8, 12, 3, padding=1)
    cases = {
        r"bits or ties of layers \['depthwise', 'pointwise'\]": convert(network(5), (2, 3, 5)),
        r"of another shape \('model.pointwise": convert(wide),
        r"missing": network(5),  # a float network
        r"edge_bits=None": convert(network(5), edge_bits=None, overrides=trained.candidates),
    }
    for message, fresh in cases.items():
        before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            copy_all_but_last(trained, fresh)
        assert all(torch.equal(before[n], t) for n, t in fresh.state_dict().items())
