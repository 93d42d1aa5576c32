"""Conversion of unusual networks: each layer runs on its grid and is counted, or is refused."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import TensorDataset

import mpqlib
from mpqlib.network.bits import BitConfig, smallest
from mpqlib.network.cost import bitops, model_size
from mpqlib.network.supernet import Supernet


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small here: a second thread saves little, and costs much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def images(n: int = 4, size: int = 12) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64)


class Base(nn.Module):
    """Two convolutions, a norm and a classifier, to be wired by subclasses."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        self.double()

    def features(self, x):
        return self.conv2(self.bn1(self.conv1(x)).relu())

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class TwoNames(Base):
    """Layers that the network holds under two names."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.conv2)

    def features(self, x):
        return self.body(x)


class Flipped(Base):
    """Runs on every image and its mirror image."""

    def forward(self, x):
        return super().forward(torch.cat([x, x.flip(-1)])).unflatten(0, (2, -1)).sum(0)


class Frames(Base):
    """Folds the frames of (N, 5, 3, H, W) into the batch."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, (-1, 5)).mean(1)


class Recurrent(Base):
    """Calls one convolution three times, at last on values that can be negative."""

    def features(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for _ in range(2):
            x = self.conv2(x).relu() + 1
        return self.conv2(-10 * x)


class Attributes(Base):
    """Reads attributes of its layers."""

    def features(self, x):
        x = super().features(x.to(self.conv1.weight.dtype))
        padding = self.conv2.kernel_size[0] // 2 + int(self.conv2.bias is None)
        return F.avg_pool2d(x, 3, 1, padding) / self.fc.in_features


class Optional(Base):
    """Takes optional arguments after the images."""

    def forward(self, x, mask=None, is_feat=False, *, scale=2.0):
        if mask is not None:
            x = x * mask
        x = self.features(x)
        return x if is_feat else scale * self.fc(x.mean((2, 3)))


class Keyword(Base):
    def features(self, x):
        return self.conv2(input=self.bn1(self.conv1(input=x)).relu())


def tied() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 144, 4),
    ).double()
    model[3].weight = model[1].weight
    return model


CONVERTED = {
    "two names": (TwoNames, images),
    "flipped": (Flipped, images),
    "frames": (Frames, lambda: torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)),
    "recurrent": (Recurrent, images),
    "attributes": (Attributes, images),
    "optional arguments": (Optional, images),
    "keyword": (Keyword, images),
    "tied": (tied, images),
    "test_resnet": (lambda: timm.create_model("test_resnet").double(), lambda: images(2, 32)),
    "shufflenet": (
        lambda: torchvision.models.shufflenet_v2_x0_5(weights=None).double(),
        lambda: images(2, 32),
    ),
}


def macs_by_hand(model: nn.Module, x: Tensor) -> int:
    """Products per image: all numbers that convolutions and linear layers write, times fan-in."""
    counts, handles = [], []
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan_in = layer.weight[0].numel()
            count = lambda m, args, y, fan_in=fan_in: counts.append(y.numel() * fan_in)  # noqa: E731
            handles.append(layer.register_forward_hook(count))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    total, rest = divmod(sum(counts), len(x))
    assert not rest
    return total


@pytest.mark.parametrize("name", CONVERTED)
def test_every_layer_runs_on_its_grid_and_is_counted(name):
    build, draw = CONVERTED[name]
    model, x = build().eval(), draw()
    reference = copy.deepcopy(model)
    net = Supernet(model, x, (2, 4)).eval()
    with torch.no_grad():
        assert torch.equal(net(x), reference(x))
    assert sum(info.macs for info in net.table) == macs_by_hand(reference, x)
    assert net.float_parts == []
    used, config = {}, smallest(net.candidates)
    for layer, module in net.layers.items():
        record = lambda op, args, y, layer=layer: used.setdefault(layer, []).append(op.weight)  # noqa: E731
        module.op.register_forward_hook(record)
    net(x, config)
    assert set(used) == set(config)
    for layer, weights in used.items():
        for weight in weights:
            assert len(weight.unique()) <= 2 ** config[layer].weight


def test_a_layer_under_two_names_is_replaced_under_both():
    model, x = TwoNames(), images()
    net = Supernet(model, x, (2, 4))
    assert model.body[0] is model.conv1 and model.body[3] is model.conv2
    assert isinstance(model.body[1], nn.Identity) and model.bn1 is model.body[1]
    assert set(net.layers) == {"conv1", "conv2", "fc"}


def test_sign_and_steps_come_from_all_calls():
    model, x = Recurrent().eval(), images()
    read = []
    hook = model.conv2.register_forward_hook(lambda m, args, y: read.append(args[0].clone()))
    with torch.no_grad():
        model(x)
    hook.remove()
    net = Supernet(model, x, (2, 4))
    quantizer = net.layers["conv2"].act_quantizer
    assert len(read) == 3 and bool((read[0] >= 0).all()) and quantizer.signed
    values = torch.cat([r.flatten() for r in read])
    assert quantizer.step(4).item() == pytest.approx(2 * float(values.abs().mean()) / 7**0.5)


# Parts that stay float


class Transposed(Base):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2).double()

    def features(self, x):
        return self.up(super().features(x))


class Functional(Base):
    def features(self, x):
        return F.conv2d(self.bn1(self.conv1(x)).relu(), self.conv2.weight)


class Both(Base):
    """Uses one weight in a layer and in a function."""

    def features(self, x):
        return F.conv2d(super().features(x), self.conv2.weight)


class Attention(Base):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True).double()

    def features(self, x):
        x = super().features(x).flatten(2).mT
        return self.attention(x, x, x)[0].mT[..., None]


class OneDimensional(Base):
    def __init__(self):
        super().__init__()
        self.conv1d = nn.Conv1d(8, 8, 3).double()

    def features(self, x):
        return self.conv1d(super().features(x).flatten(2))[..., None]


@pytest.mark.parametrize(
    ("network", "part", "macs"),
    [
        (Transposed, "up (convolution)", 12 * 12 * 8 * 8 * 4),
        (Functional, "Functional.forward (convolution)", 10 * 10 * 8 * 8 * 9),
        (Both, "Both.forward (convolution)", 10 * 10 * 8 * 8 * 9),
        # Three projections, two products of 144 x 144 x 8 and the output projection
        (Attention, "attention (addmm, bmm, mm)", 4 * 144 * 64 + 2 * 144 * 144 * 8),
        (OneDimensional, "conv1d (convolution)", 142 * 8 * 8 * 3),
    ],
)
def test_what_stays_float_is_listed_and_warned_about(network, part, macs):
    x = images()
    with pytest.warns(UserWarning, match="MACs stay in float and count neither in BitOPs") as found:
        net = Supernet(network(), x, (2, 4))
    (listed,) = net.float_parts
    assert (listed.name, listed.macs) == (part, macs)
    total = macs + sum(info.macs for info in net.table)
    assert listed.share == pytest.approx(macs / total)
    assert f"{part} {macs / total:.1%}" in str(found[0].message)
    assert bool(net(x, net.uniform(2)).isfinite().all())


def test_attention_of_a_transformer_is_listed():
    x = torch.randn(1, 3, 32, 32)
    with pytest.warns(UserWarning, match=r"and \d+ more"):
        net = Supernet(torchvision.models.swin_t(weights=None), x, (2, 4))
    # The linear layers of its attention are called as functions: 24 of 53 layers.
    assert len(net.table) == 29
    assert sum("attn" in part.name for part in net.float_parts) == len(net.float_parts) == 12


# What is refused


def old_style_norm(conv: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(conv)


REPARAMETRISED = {
    "weight_norm": (old_style_norm, "remove_weight_norm"),
    "spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "new weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "new spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "pruned": (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), r"prune\.remove"),
}


class InAList(Base):
    def __init__(self):
        super().__init__()
        self.blocks = [self.conv1, self.conv2]

    def features(self, x):
        return self.blocks[1](self.blocks[0](x))


class TrainingBranch(Base):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(8, 4).double()

    def forward(self, x):
        x = self.features(x).mean((2, 3))
        return (self.fc(x), self.auxiliary(x)) if self.training else self.fc(x)


class Standardized(nn.Conv2d):
    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


class OwnWeights(Base):
    def __init__(self):
        super().__init__()
        self.conv2 = Standardized(8, 8, 3).double()


class Mirrored(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + super().forward(input.flip(-1))


class TwiceAsMany(Base):
    def __init__(self):
        super().__init__()
        self.conv2 = Mirrored(8, 8, 1).double()


class WithLSTM(Base):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8).double()

    def features(self, x):
        return self.lstm(super().features(x).flatten(2).mT)[0].mT[..., None]


class NotFinite(Base):
    def features(self, x):
        return self.conv2(self.conv1(x).log())


REFUSED = {
    "list": (InAList, r"'conv1' of class Conv2d computes with other weights.*list"),
    "training branch": (TrainingBranch, "'auxiliary', run in training mode only"),
    "more products": (TwiceAsMany, "'conv2': 131072 MACs by its shape, but torch counts 262144"),
    "own weights": (OwnWeights, "'conv2' of class Standardized computes with other weights"),
    "lstm": (WithLSTM, "LSTM 'lstm' cannot be counted"),
    "not finite": (NotFinite, "'conv2' reads values that are not finite"),
    "auxiliary heads": (
        lambda: torchvision.models.googlenet(weights=None, init_weights=False).double(),
        "'aux1.*training mode only.*aux_logits=False",
    ),
}


def assert_refused_and_unchanged(model: nn.Module, message: str, **arguments) -> None:
    before = list(model.named_modules(remove_duplicate=False))
    modes = [module.training for module in model.modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        Supernet(model, images(2, 32), **{"bits": (2, 4), **arguments})
    assert list(model.named_modules(remove_duplicate=False)) == before
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_quantized_is_refused_and_left_unchanged(name):
    build, message = REFUSED[name]
    model = build()
    if isinstance(model, Base):
        model.bn1.eval()  # a module in a mode of its own
    assert_refused_and_unchanged(model, message)


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_reparametrised_weight_is_refused_with_the_call_that_removes_it(kind):
    change, remedy = REPARAMETRISED[kind]
    model = Base()
    change(model.conv2)
    assert_refused_and_unchanged(model, f"'conv2' is not a plain parameter.*{remedy}")


def test_after_the_named_call_a_pruned_layer_converts():
    model = Base()
    prune.l1_unstructured(model.conv2, "weight", 0.5)
    prune.remove(model.conv2, "weight")
    assert len(Supernet(model, images(), (2, 4)).table) == 3


def dataset() -> TensorDataset:
    return TensorDataset(images(8), torch.arange(8) % 4)


WAYS_IN = {
    "a pass": lambda supernet, config: supernet(images(), config),
    "recalibrate": lambda supernet, config: mpqlib.recalibrate(supernet, dataset(), config),
    "evaluate": lambda supernet, config: mpqlib.evaluate(supernet, dataset(), config),
    "save_policy": lambda supernet, config: mpqlib.save_policy("nowhere", supernet, config),
    "train": lambda supernet, config: mpqlib.train(
        supernet, dataset(), mpqlib.TrainConfig(epochs=1, batch_size=4)
    ),
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_a_weight_reparametrised_after_conversion_is_refused(kind, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, remedy = REPARAMETRISED[kind]
    supernet = Supernet(Base(), images(), (2, 4))
    change(supernet.layers["conv2"].op)
    with pytest.raises(ValueError, match=rf"'conv2\.op' is not a plain parameter.*{remedy}"):
        WAYS_IN[way](supernet, supernet.uniform(4))
    assert not list(tmp_path.iterdir())


def test_after_the_named_call_a_pruned_layer_is_quantized_again():
    supernet, x = Supernet(Base(), images(), (2, 4)), images()
    op, config = supernet.layers["conv2"].op, supernet.uniform(2)
    prune.l1_unstructured(op, "weight", 0.5)
    in_float = supernet(x)
    prune.remove(op, "weight")
    assert torch.equal(supernet(x), in_float) and not torch.equal(supernet(x, config), in_float)


@pytest.mark.parametrize("part", ["norm", "bank"])
def test_a_norm_pruned_after_conversion_is_refused(part):
    supernet, x = Supernet(Base(), images(), (2, 4)), images()
    norm, config = getattr(supernet.layers["conv1"], part), supernet.uniform(2)
    prune.l1_unstructured(norm, "weight", 0.5)
    with pytest.raises(ValueError, match=r"norm of layer 'conv1' .* pruning"):
        supernet(x, config)
    prune.remove(norm, "weight")
    assert supernet(x, config).isfinite().all()


def test_a_compiled_network_or_part_is_refused():
    model, compiled = Base(), torch.compile(Base())
    with pytest.raises(ValueError, match="'the model' was compiled by torch"):
        Supernet(compiled, images(), (2, 4))
    model.conv2 = torch.compile(model.conv2)
    assert_refused_and_unchanged(model, "'conv2' was compiled by torch.compile")
    assert Supernet(compiled._orig_mod, images(), (2, 4)).table


def test_conversion_within_autocast_is_refused_by_name():
    with torch.autocast("cpu", torch.bfloat16):
        assert_refused_and_unchanged(Base(), "torch.autocast is on")


def test_refused_bits_leave_the_model_as_it_is():
    model, x = torchvision.models.resnet18(weights=None), torch.randn(2, 3, 32, 32)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"bits=\(2, 4, 32\)"):
        Supernet(model, x, (2, 4, 32))
    assert list(model.modules()) == modules
    assert len(Supernet(model, x, (2, 4, 8)).table) == 21


def test_a_converted_model_is_refused():
    model, x = Base(), images()
    net = Supernet(model, x, (2, 4))
    for converted in (model, net):
        with pytest.raises(ValueError, match=r"already holds quantized layers.*conv1"):
            Supernet(converted, x, (2, 4))


# Tied weights


def test_shared_weights_count_once_per_bit_width():
    model, x = tied(), images()
    net = Supernet(model, x, (2, 4))
    assert [(i.name, i.tied_to) for i in net.table if i.tied_to] == [("3", "1")]
    first, shared, last = 3 * 8, 8 * 8 * 9, 8 * 144 * 4
    for pair in ((2, 2), (4, 4), (2, 4)):
        bits = dict(zip(("1", "3"), pair, strict=True))
        config = {n: (bits.get(n, 8), bits.get(n, 8)) for n in net.layers}
        size = (first + last) * 8 + shared * sum(set(pair))
        assert model_size(net.table, BitConfig.of(config)) == size / 8
    # Equal bits mean equal quantized weights, also once the steps are trained.
    one, other = net.layers["1"], net.layers["3"]
    with torch.no_grad():
        one.weight_quantizer.steps[0].mul_(1.5)
    two = one.weight_quantizer.position(2)
    quantized = [layer.weight_quantizer(layer.op.weight, two) for layer in (one, other)]
    assert torch.equal(*quantized)
    assert bitops(net.table, net.uniform(2)) == sum(
        i.macs * b.weight * b.act for i in net.table for b in [net.uniform(2)[i.name]]
    )


# Depth-wise convolutions


@pytest.mark.parametrize(
    ("channels", "out", "groups", "depthwise"),
    [
        (8, 8, 8, True),
        (8, 16, 8, True),  # two filters a channel
        (8, 8, 4, False),
        (8, 4, 4, False),  # as many groups as filters, each of which reads two channels
        (8, 8, 1, False),
        (1, 8, 1, False),
    ],
)
def test_depthwise_is_one_input_channel_a_filter(channels, out, groups, depthwise):
    model = nn.Sequential(
        nn.Conv2d(3, channels, 1), nn.Conv2d(channels, out, 3, groups=groups), nn.Conv2d(out, 2, 1)
    ).double()
    info = Supernet(model, images(), (2, 3, 4)).table[1]
    assert info.depthwise is depthwise
    assert info.candidates.weight == ((3, 4) if depthwise else (2, 3, 4))


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.LazyInstanceNorm2d])
def test_a_norm_whose_statistics_all_bits_would_share_is_refused(norm):
    network = Base()
    arguments = () if issubclass(norm, nn.LazyInstanceNorm2d) else (8,)
    network.bn1 = norm(*arguments, track_running_stats=True).double()
    network(images())  # a lazy module becomes a plain one
    with pytest.raises(ValueError, match=r"'bn1'.*Build it with track_running_stats=False"):
        Supernet(network, images(), (2, 4))
    network.bn1 = nn.InstanceNorm2d(8)
    assert Supernet(network, images(), (2, 4)).table


class Wrapped(Base):
    """Returns its logits in a dict or in a tuple."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


@pytest.mark.parametrize("wrap", [lambda y: {"out": y}, lambda y: (y, y)], ids=["dict", "tuple"])
def test_outputs_that_are_no_tensor_are_refused(wrap):
    with pytest.raises(ValueError, match=r"Wrapped returns a (dict|tuple).*logits \(N, classes\)"):
        Supernet(Wrapped(wrap), images(), (2, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (images(0), r"of shape \(0, 3, 12, 12\) is empty"),
        (images().numpy(), "is a ndarray"),
        (images().float(), "is torch.float32, but the model computes in torch.float64"),
        (images().to(torch.uint8), "is torch.uint8, but"),
    ],
    ids=["empty", "numpy", "float32", "uint8"],
)
def test_an_example_that_does_not_fit_is_named(example, message):
    with pytest.raises(ValueError, match=f"^example {message}"):
        Supernet(Base(), example, (2, 4))
