"""Accuracy of a float model or of a supernet's configuration, and batch-norm statistics."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ..data import check_value, draw
from ..network.bits import BitConfig
from ..network.layers import QuantConvBN
from ..network.observation import eval_mode, hooked
from ..network.supernet import Supernet, check_steps, check_supernet
from .step import check_labels, in_float32


def select_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; "auto" is the accelerator that torch finds, else the CPU.

    Raises ValueError for a device that this machine does not have.
    """
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name == "auto":
        return found
    allowed = ["cpu"]
    if found.type != "cpu":
        indexed = [f"{found.type}:{i}" for i in range(torch.accelerator.device_count())]
        allowed += [found.type, *indexed]
    if str(name) not in allowed:
        raise ValueError(f"device={str(name)!r} is not available here: one of {['auto', *allowed]}")
    return torch.device(name)


@torch.inference_mode(False)  # parameters that are moved inside it could no longer be trained
def move_channels_last(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves the model to the device, in the layout that is fastest for images (N, C, H, W).

    A model with 5-D tensors, such as weights of Conv3d, keeps its layout: PyTorch refuses them.
    """
    deep = any(t.dim() == 5 for t in (*model.parameters(), *model.buffers()))
    layout = torch.preserve_format if deep else torch.channels_last
    return model.to(device, memory_format=layout)


def check_dataset(name: str, dataset: Dataset, model: nn.Module | None = None) -> None:
    """Raises ValueError for what is no dataset of items (image, label), judged by the first item.

    `name`: in messages. `model`: also refuses images of a type that the model cannot read.
    """
    items = "a dataset of items (image, label), such as TensorDataset(images, labels)"
    taken_for_one = (Tensor, np.ndarray, tuple, str, Mapping, DataLoader, IterableDataset)
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, taken_for_one) or not sized:
        raise ValueError(f"{name} is a {type(dataset).__name__}: pass {items}")
    if not len(dataset):
        return
    with torch.random.fork_rng(devices=[]):  # augmentation draws from the global generator
        item = dataset[0]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        length = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise ValueError(f"{name} has items that are a {type(item).__name__}{length}: pass {items}")
    image, label = (torch.as_tensor(v) if isinstance(v, np.ndarray) else v for v in item)
    if not isinstance(image, Tensor) or image.dim() != 3:
        shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
        raise ValueError(
            f"{name} has images that are a {type(image).__name__}{shape}: a tensor (C, H, W) is "
            "needed"
        )
    if not isinstance(label, (Real, Tensor)):
        raise ValueError(f"{name} has labels that are a {type(label).__name__}: a class is needed")
    if model is not None:
        _check_type(name, image[None], model)


def _check_type(name: str, images: Tensor, model: nn.Module) -> None:
    """Raises ValueError for `images` (N, C, H, W) of a type that the model cannot read.

    It may read others than its own, as it can convert them itself: then it is tried.
    """
    own = next(model.parameters(), images)
    if images.dtype == own.dtype:
        return
    try:
        with eval_mode(model), torch.no_grad():
            model(images[:1].to(own.device, copy=True))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} holds images in {images.dtype}: the model reads {own.dtype}"
        ) from error


def check_images(images: Tensor, model: nn.Module) -> None:
    """Raises ValueError unless `images` (N, C, H, W) holds an image or more that `model` reads."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images is a {type(images).__name__}: a tensor (N, C, H, W) is needed")
    if images.dim() != 4:
        raise ValueError(f"images is of shape {tuple(images.shape)}: (N, C, H, W) is needed")
    if not len(images):
        raise ValueError("images is empty: at least one is needed")
    _check_type("images", images, model)


def decoded(dataset: Dataset) -> TensorDataset:
    """All items (image, label) of `dataset` as tensors in memory, for reading them many times.

    Raises ValueError for an empty dataset.
    """
    if not len(dataset):
        raise ValueError("dataset is empty: there is nothing to decode")
    return TensorDataset(*next(iter(DataLoader(dataset, len(dataset)))))


class Evaluation(NamedTuple):
    """Which images were classified correctly, bool (N,), and the mean cross-entropy in nats."""

    correct: Tensor
    loss: float

    @property
    def top1(self) -> float:
        """Share of images that were classified correctly, 0 to 1."""
        return float(self.correct.float().mean())

    def __repr__(self) -> str:
        numbers = f"top1={self.top1:.4f}, loss={self.loss:.4f}"
        return f"{type(self).__name__}({numbers}, images={len(self.correct)})"


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    config: BitConfig | None = None,
    *,
    calibration: Dataset | None = None,
    images: int = 7000,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
) -> Evaluation:
    """Accuracy and loss of a float model, or of a supernet at `config` (None: in float mode).

    `dataset`: items (image (C, H, W), label). `calibration`: training images, augmented as in
    training; with them, a supernet is recalibrated first, on `images` of them, drawn at random (see
    `recalibrate`). Every configuration needs this before it is evaluated, and so does float mode
    after one-shot training.

    Without `calibration`, the supernet's present statistics are used. Where the supernet has only
    been trained or loaded, they are those of training: this is allowed, but accuracy is often poor.
    The model runs in eval mode and returns to its earlier mode.

    Raises ValueError if a batch norm holds statistics that were measured for another configuration,
    for float mode after one-shot training without recalibration, for an empty dataset, for items
    that are no (image, label) or images of another type than the model's, for outputs that are no
    logits (N, classes), for labels that are no class of the model, for a step size of
    0, and for a `config` or `calibration` of a float model.
    """
    check_dataset("dataset", dataset, model)
    if not len(dataset):
        raise ValueError("dataset is empty: there is nothing to evaluate")
    check_value("images", images, Integral, "a whole number from 2", lambda v: v >= 2)
    check_value("batch_size", batch_size, Integral, "a whole number from 1", lambda v: v >= 1)
    device = select_device(device)
    if isinstance(model, Supernet):
        if calibration is not None:
            check_dataset("calibration", calibration, model)
            how = dict(images=images, device=device, batch_size=batch_size)
            recalibrate(model, calibration, config, **how)
        check_statistics(model, config)
    elif config is not None or calibration is not None:
        kind = type(model).__name__
        raise ValueError(f"config and calibration need a Supernet; this is a float model ({kind})")
    # Before inference mode, because weights that are moved inside it can no longer be trained.
    model = move_channels_last(model, device)
    correct, loss = [], 0.0
    with eval_mode(model), torch.inference_mode():
        for x, y in DataLoader(dataset, batch_size):
            x = x.to(device, memory_format=torch.channels_last)
            logits = model(x) if config is None else model(x, config)
            check_labels(logits, y.cpu())
            y = y.to(device)
            correct.append((logits.argmax(1) == y).cpu())
            loss += float(F.cross_entropy(in_float32(logits), y, reduction="sum"))
    return Evaluation(torch.cat(correct), loss / len(dataset))


def _conv_layers(supernet: Supernet) -> dict[str, QuantConvBN]:
    return {n: layer for n, layer in supernet.layers.items() if isinstance(layer, QuantConvBN)}


def batch_norms(supernet: Supernet) -> list[_BatchNorm]:
    """All batch norms of the network: every configuration uses them, and so does float mode.

    Banks are left out. They hold parameters and statistics, but only these modules compute.
    """
    banks = {layer.bank for layer in _conv_layers(supernet).values()}
    return [m for m in supernet.modules() if isinstance(m, _BatchNorm) and m not in banks]


class _Measured(NamedTuple):
    """Statistics that `recalibrate` left in a batch norm, and the configurations they belong to."""

    configs: frozenset
    mean: Tensor
    var: Tensor


@dataclass
class _RunningNorm:
    """A batch norm that keeps running statistics, as one configuration uses it.

    `row`: its row in the layer's bank, or None without a bank. The module that holds the statistics
    keeps what `recalibrate` left there in its attribute `measured`, by row. If its statistics
    differ from these, it was trained or loaded since, and their configuration is unknown.
    """

    module: _BatchNorm  # computes
    holder: nn.Module  # holds the statistics: the module itself, or a bank
    row: int | None

    @property
    def buffers(self) -> list[Tensor]:
        """Mean, variance and number of batches: views, so that they can be set in place."""
        held = self.holder
        tensors = held.running_mean, held.running_var, held.num_batches_tracked
        return [t if self.row is None else t[self.row] for t in tensors]

    def set_statistics(self, mean: Tensor, var: Tensor, config: BitConfig | None) -> None:
        """Sets the statistics and records that they belong to `config`."""
        configs, last = {_key(config)}, vars(self.holder).get("measured", {}).get(self.row)
        # Two configurations can share statistics, as in the first layer, which reads the same
        # images.
        if last and all(map(torch.allclose, last[1:], (mean.cpu(), var.cpu()))):
            configs |= last.configs
        running_mean, running_var, _ = self.buffers
        running_mean.copy_(mean)
        running_var.copy_(var)
        self.set_owners(configs)

    def set_owners(self, configs: Collection) -> None:
        """Records that the present statistics belong to `configs` alone, keys of `_key`."""
        mean, var, _ = (buffer.cpu().clone() for buffer in self.buffers)
        vars(self.holder).setdefault("measured", {})[self.row] = _Measured(
            frozenset(configs), mean, var
        )

    def measured_for(self) -> frozenset | None:
        """The configurations that the statistics belong to, or None if unknown."""
        last = vars(self.holder).get("measured", {}).get(self.row)
        present = [buffer.cpu() for buffer in self.buffers[:2]]
        return last.configs if last and all(map(torch.equal, last[1:], present)) else None


def _key(config: BitConfig | None) -> frozenset | None:
    """The configuration regardless of the order of its layers; None is float mode."""
    return config and frozenset(config.items())


def _running_norms(supernet: Supernet, config: BitConfig | None) -> dict[str, _RunningNorm]:
    """The batch norms that keep running statistics, as `config` uses them, by name."""
    owner = {layer.norm: (name, layer) for name, layer in _conv_layers(supernet).items()}
    names = {module: name for name, module in supernet.named_modules()}
    found = {}
    for module in batch_norms(supernet):
        if module.running_mean is None:
            continue
        if config is None or module not in owner:
            found[names[module]] = _RunningNorm(module, module, None)
        else:
            name, layer = owner[module]
            bits = config[name]
            label = f"{names[layer.bank]} (w{bits.weight}a{bits.act})"
            found[label] = _RunningNorm(module, layer.bank, layer.row(bits))
    return found


def _trained_one_shot(supernet: Supernet) -> bool:
    """Whether batch norms of bit-widths were trained on more batches than those of float mode."""
    return any(
        bool((layer.bank.num_batches_tracked > layer.norm.num_batches_tracked).any())
        for layer in _conv_layers(supernet).values()
        if isinstance(layer.norm, _BatchNorm) and layer.norm.running_mean is not None
    )


def check_statistics(supernet: Supernet, config: BitConfig | None) -> None:
    """Raises ValueError if batch norms hold statistics that do not belong to `config`.

    Also for a step size that is 0 or not finite.
    """
    if config is not None:
        supernet.check(config)
        check_steps(supernet)
    norms = _running_norms(supernet, config)
    known = {name: norm.measured_for() for name, norm in norms.items()}
    remedy = "pass calibration=<training images> to evaluate, or call recalibrate first"
    told = {name: configs for name, configs in known.items() if configs is not None}
    if wrong := [name for name, configs in told.items() if _key(config) not in configs]:
        raise ValueError(
            f"{len(wrong)} of {len(norms)} batch norms, such as {wrong[0]!r}, hold statistics of "
            f"another configuration, or of other step sizes: {remedy}"
        )
    unknown = [name for name, configs in known.items() if configs is None]
    if config is None and unknown and _trained_one_shot(supernet):
        raise ValueError(
            f"float mode after one-shot training: {len(unknown)} of {len(norms)} batch norms, such "
            f"as {unknown[0]!r}, hold no statistics of the present weights: {remedy}"
        )


def void_statistics(supernet: Supernet) -> None:
    """Makes `check_statistics` refuse the present statistics, except in float mode.

    For a change that moves what quantized layers put out, such as other step sizes.
    """
    for norm in _running_norms(supernet, None).values():
        norm.set_owners({None})
    for layer in _normed_layers(supernet).values():
        for row in range(len(layer.bank.running_mean)):
            _RunningNorm(layer.norm, layer.bank, row).set_owners(())


@contextmanager
def _averaging(norms: Sequence[_RunningNorm]) -> Iterator[None]:
    """Within the block, batch norms average the statistics of all batches; then all is as before.

    Batch norms are to be in eval mode before and are so again.
    """
    before = [(norm.module.momentum, [b.clone() for b in norm.buffers]) for norm in norms]
    try:
        for norm in norms:
            for buffer, start in zip(norm.buffers, (0, 1, 0), strict=True):
                buffer.fill_(start)
            norm.module.momentum = None  # PyTorch's cumulative average
            norm.module.train()
        yield
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.module.eval().momentum = momentum
            for buffer, value in zip(norm.buffers, buffers, strict=True):
                buffer.copy_(value)


@torch.no_grad()
def recalibrate(
    supernet: Supernet,
    dataset: Dataset,
    config: BitConfig | None,
    *,
    images: int = 7000,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
) -> None:
    """Sets the batch norms that `config` uses to statistics of some `images` of `dataset`.

    `config`: None is float mode, which needs its own recalibration after one-shot training.
    `dataset`: items (image (C, H, W), label) of the training split, augmented as in training: other
    images, such as those without the black borders of random crops, have other statistics than
    those that the weights have learned with. They may stand in any order, such as sorted by class.
    `images` of them are drawn at random; all are used if there are fewer. Images and augmentation
    are the same at each call; augmentation must draw from torch's global generator. In random
    order, the images are split into batches of equal size, give or take one image, of about
    `batch_size` each. While measuring, each batch is normalised by its own statistics. The running
    mean and (unbiased) variance become the plain mean over batches, as in RFQuant's release, which
    uses about 7,000 images (arXiv 2401.01543).

    Batch norms that several configurations share hold the statistics of the last one: recalibrate
    right before evaluating, or use `evaluate(..., calibration=dataset)`. All modules return to
    their earlier mode. After an error, the statistics are the old ones.

    Raises ValueError for another model, for what is no dataset of such items, if `images` is not a
    whole number of at least 2 or `batch_size` of at least 1, for fewer than two images in
    `dataset`, for a `config` of another supernet, and for statistics that are not finite.
    """
    check_supernet("supernet", supernet)
    check_dataset("dataset", dataset, supernet)
    check_value("images", images, Integral, "a whole number from 2", lambda v: v >= 2)
    check_value("batch_size", batch_size, Integral, "a whole number from 1", lambda v: v >= 1)
    if (count := min(images, len(dataset))) < 2:
        raise ValueError(f"dataset holds {count} images: recalibration needs at least 2")
    if config is not None:
        supernet.check(config)
    device = select_device(device)
    supernet = move_channels_last(supernet, device)
    norms = _running_norms(supernet, config)
    # No batch of a single image: at 1x1 resolution it has no variance.
    batches = min(-(-count // batch_size), count // 2)
    indices = [part.tolist() for part in torch.tensor(draw(dataset, count)).tensor_split(batches)]
    averaging = _averaging(list(norms.values()))
    with eval_mode(supernet), averaging, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of augmentation
        for x, _ in DataLoader(dataset, batch_sampler=indices):
            supernet(x.to(device, memory_format=torch.channels_last), config)
        # A batch norm that the forward pass skips keeps its statistics.
        found = {
            name: [buffer.clone() for buffer in norm.buffers[:2]]
            for name, norm in norms.items()
            if norm.buffers[2] > 0
        }
    for name, statistics in found.items():
        if not all(values.isfinite().all() for values in statistics):
            raise ValueError(f"statistics of {name!r} are not finite: check images and weights")
    for name, norm in norms.items():
        norm.set_statistics(*found.get(name, norm.buffers[:2]), config)


def _normed_layers(supernet: Supernet) -> dict[str, QuantConvBN]:
    """Layers that have a bank of batch norms with running statistics, by name."""
    return {
        name: layer
        for name, layer in _conv_layers(supernet).items()
        if layer.bank is not None and getattr(layer.norm, "running_mean", None) is not None
    }


def _keep_from_float(supernet: Supernet, config: BitConfig) -> None:
    """Records that batch norms which follow no convolution keep those of float mode at `config`."""
    for norm in _running_norms(supernet, config).values():
        if norm.row is None:
            norm.set_owners({None, _key(config)} | (norm.measured_for() or set()))


def _set_from_float(
    layer: QuantConvBN, name: str, config: BitConfig, shift: Tensor | float
) -> None:
    """Gives the layer at `config` the statistics of float mode, with the mean moved by `shift`."""
    norm = _RunningNorm(layer.norm, layer.bank, layer.row(config[name]))
    norm.set_statistics(layer.norm.running_mean + shift, layer.norm.running_var, config)


@torch.no_grad()
def copy_statistics(supernet: Supernet, config: BitConfig) -> None:
    """Sets the batch norms at `config` to the statistics of float mode.

    Raises ValueError for another model, for a `config` of another supernet, and, as
    `check_statistics` does, if float mode has no statistics of its own.
    """
    check_supernet("supernet", supernet)
    supernet.check(config)
    check_statistics(supernet, None)
    for name, layer in _normed_layers(supernet).items():
        _set_from_float(layer, name, config, 0.0)
    _keep_from_float(supernet, config)


@torch.no_grad()
def correct_means(supernet: Supernet, images: Tensor, config: BitConfig) -> None:
    """Moves the means of batch norms by what quantizing moves the outputs of their convolutions.

    `images`: (N, C, H, W), one batch of the training split. For each channel, the running mean at
    `config` becomes that of float mode, plus the mean output at `config` minus that in float mode.
    Variances stay those of float mode. The first layers come first, so that later ones read
    corrected inputs. Of a layer that runs several times, the last call counts. Layers without a
    batch norm are not corrected, nor are batch norms that follow no convolution.

    Raises ValueError for another model, for what is no tensor of images of the model's type, for
    images that make outputs which are not finite, for a `config` of another supernet, and, as
    `check_statistics` does, if float mode has no statistics of its own. Source: bias correction
    (arXiv 1906.04721, section 4.2), by means that are measured instead of derived.
    """
    check_supernet("supernet", supernet)
    check_images(images, supernet)
    supernet.check(config)
    check_statistics(supernet, None)
    normed, in_float = _normed_layers(supernet), {}

    def mean_output(name: str, output: Tensor) -> Tensor:
        mean = output.mean((0, 2, 3))
        if not mean.isfinite().all():
            raise ValueError(f"outputs of {name!r} are not finite: check images and weights")
        return mean

    def measure(name: str, op: nn.Module, args: tuple, output: Tensor) -> None:
        in_float[name] = mean_output(name, output)

    def correct(name: str, op: nn.Module, args: tuple, output: Tensor) -> None:
        shift = mean_output(name, output) - in_float[name]
        _set_from_float(normed[name], name, config, shift)

    with eval_mode(supernet):
        for hook, bits in ((measure, None), (correct, config)):
            with hooked([c.op.register_forward_hook(partial(hook, n)) for n, c in normed.items()]):
                supernet(images, bits)
    _keep_from_float(supernet, config)


@contextmanager
def batch_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within the block, batch norms normalise by the present batch and do not update statistics."""
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.train().track_running_stats = False
        yield
    finally:
        for norm, (training, tracking) in zip(norms, before, strict=True):
            norm.train(training).track_running_stats = tracking
