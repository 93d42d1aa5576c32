"""CoRa: quantizes a float network and searches the ranks of adapters, with all weights frozen.

Source: CoRa, "Reclaiming Residual Knowledge" (arXiv 2408.00923), and its authors' core code.
"""

import copy
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import ceil, inf
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data import draw
from ..network.quantizer import GRANULARITIES
from ..search.limits import check_count
from ..training.evaluation import batch_statistics, decoded, select_device
from ..training.loop import RANGES
from ..training.step import check_labels, logits_in
from .adapters import FLOAT_BITS, Adapted, AdaptedConv2d, check_convolutions, convolutions

SWITCHES = ("teacher", "recalibrate", "norms_per_batch")  # options of `cora` that are True or False
# Options of `cora` that are whole numbers, and their smallest values
LEAST_COUNTS = {"adapter_bits": 2, "order": 1, "iterations": 0, "batch_size": 1, "seed": 0}
# Smallest and largest values of the others
RANGES_OF_NUMBERS = {
    "budget": (0, 1),  # a share of the weights
    "deviations": (0.1, inf),
    "start": (1e-6, 1),
    "lr": (0, inf),
    "clip": (0, inf),
    "gamma": (0, inf),
}


def rank_loss(
    logits: Tensor, targets: Tensor, spent: Tensor, budget: float, gamma: float
) -> Tensor:
    """Task loss plus gamma * exp(max(0, spent - budget)), a scalar.

    `targets`: labels (N,), for the cross-entropy; or the logits (N, classes) of a teacher, for the
    Kullback-Leibler divergence from its outputs. `spent`, `budget`: weights in adapters as a share
    of those in convolutions. Source: CoRa.
    """
    if targets.is_floating_point():
        log_p, log_q = targets.log_softmax(1), logits.log_softmax(1)
        task = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    else:
        task = F.cross_entropy(logits, targets)
    return task + gamma * (spent - budget).clamp(min=0).exp()


def draw_batches(count: int, size: int, batches: int, seed: int) -> Iterator[Tensor]:
    """Indices of `batches` random batches of `size` out of `count` images, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(batches):
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]


def search_ranks(
    adapted: Adapted,
    convs: Mapping[str, AdaptedConv2d],
    images: Tensor,
    targets: Tensor,
    budget: float,
    *,
    iterations: int,
    batch_size: int,
    lr: float = 0.01,
    clip: float = 0.2,
    gamma: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Learns the share of the full rank that each adapter keeps; returns the shares by name.

    `convs`: those of `adapted` to search, each after `cut_softly`, which sets the share it starts
    from. Nothing else learns. `images`: (N, C, H, W). `targets`, `budget`, `gamma`: as in
    `rank_loss`. Adam with the rate `lr`; gradients are clipped to +-`clip`, and shares to
    [1 / full rank, 1]. Raises FloatingPointError if the loss is not finite. Source: CoRa.
    """
    # Weights of the adapters of full rank, as a share of those in convolutions: omega in the paper
    omega = {name: c.rank * c.component / adapted.weights for name, c in convs.items()}
    shares = [conv.share for conv in convs.values()]
    optimizer = torch.optim.Adam(shares, lr=lr)
    batches = draw_batches(len(images), min(batch_size, len(images)), iterations, seed)
    for chosen in tqdm(batches, "ranks", total=iterations, leave=False):
        chosen = chosen.to(images.device)
        spent = sum(conv.share * omega[name] for name, conv in convs.items())
        logits = logits_in(torch.float32, adapted, images[chosen])
        loss = rank_loss(logits, targets[chosen], spent, budget, gamma)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss of the rank search is {loss.item()}: check images")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(shares, clip)
        optimizer.step()
        for conv in convs.values():
            conv.share.data.clamp_(1 / conv.rank, 1)
    return {name: conv.share.item() for name, conv in convs.items()}


def fit_ranks(
    wanted: Sequence[float], full: Sequence[int], component: Sequence[int], limit: float
) -> list[int]:
    """Whole ranks in the proportions of `wanted` whose adapters hold at most `limit` weights.

    `wanted`: ranks above 0 that need not be whole. `full`: largest ranks. `component`: weights of
    an adapter of rank 1. All ranks are `wanted` times one factor, the largest that fits, rounded
    up, and at least 1. What is then left goes to those that are nearest to their next rank, once
    each. So a few weights may be left over, fewer than the largest component that could still be
    added. Raises ValueError if ranks of 1 do not fit.
    """
    if sum(component) > limit:
        raise ValueError(
            f"limit={limit:g} weights cannot be met: adapters of rank 1 hold {sum(component)}"
        )

    def scaled(factor: float) -> list[int]:
        return [min(most, max(1, ceil(factor * w))) for w, most in zip(wanted, full, strict=True)]

    def held(ranks: Sequence[int]) -> int:
        return sum(rank * c for rank, c in zip(ranks, component, strict=True))

    largest = max(most / w for w, most in zip(wanted, full, strict=True))
    steps = range(2**24)
    at = bisect_right(steps, limit, key=lambda i: held(scaled(largest * i / len(steps)))) - 1
    factor = largest * at / len(steps)
    ranks = scaled(factor)
    for i in sorted(range(len(ranks)), key=lambda i: ranks[i] - factor * wanted[i]):
        if ranks[i] < full[i] and held(ranks) + component[i] <= limit:
            ranks[i] += 1
    return ranks


def check_cora_options(**options: object) -> None:
    """Raises ValueError for the value of an option of `cora` that is not allowed."""
    for name, value in options.items():
        if name in LEAST_COUNTS:
            check_count(name, value, LEAST_COUNTS[name])
            if name == "seed" and value > RANGES["seed"][1]:
                raise ValueError(f"seed={value!r} is not allowed: at most {RANGES['seed'][1]}")
        elif name in RANGES_OF_NUMBERS:
            if name != "start" or value is not None:
                _check_number(name, value, *RANGES_OF_NUMBERS[name])
        elif name in SWITCHES:
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not allowed: True or False")
        elif name == "granularity" and value not in GRANULARITIES:
            raise ValueError(f"{name}={value!r} is not allowed: one of {GRANULARITIES}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    right = isinstance(value, Real) and not isinstance(value, bool) and value < inf
    if not right or not low <= value <= high:
        allowed = f"a number from {low:g}" + (f" to {high:g}" if high < inf else "")
        allowed += "; it is a share of the weights, so 0.05 means 5%" if name == "budget" else ""
        raise ValueError(f"{name}={value!r} is not allowed: {allowed}")


def _read_images(calibration: Dataset) -> tuple[Tensor, Tensor]:
    """All images (N, C, H, W) and labels (N); raises ValueError for anything else."""
    if not isinstance(calibration, Dataset):
        raise ValueError(
            f"calibration is a {type(calibration).__name__}: pass a Dataset of (image, label), such"
            " as TensorDataset(images, labels)"
        )
    tensors = decoded(calibration).tensors
    if len(tensors) != 2 or tensors[0].dim() != 4 or tensors[1].dim() != 1:
        found = [tuple(t.shape) for t in tensors]
        raise ValueError(
            f"calibration holds tensors of shape {found}: (N, C, H, W) and (N,) are needed, from "
            "items (image, label)"
        )
    images, labels = tensors
    if not images.isfinite().all():
        raise ValueError("calibration holds images with values that are not finite")
    return images, labels


def _check_calibration(images: Tensor, network: nn.Module, recalibrate: bool) -> None:
    """Raises ValueError for images of another type than the weights, or too few to recalibrate."""
    wanted = next(iter(convolutions(network).values())).weight.dtype
    if images.dtype != wanted:
        raise ValueError(f"calibration holds images in {images.dtype}; the network is in {wanted}")
    if recalibrate and len(images) < 2:
        raise ValueError(f"calibration holds {len(images)} image: recalibrate needs at least 2")


@torch.no_grad()
def _recalibrate_norms(adapted: Adapted, images: Tensor) -> None:
    """Sets batch norms to the statistics of the images: the mean over batches of about 128.

    All else stays in eval mode, such as dropout.
    """
    modules = [m for m in adapted.modules() if isinstance(m, _BatchNorm)]
    norms = {norm: norm.momentum for norm in modules if norm.running_mean is not None}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's cumulative average
        norm.train()
    mixed = images[draw(images, len(images))]  # they may come class by class
    for x in mixed.tensor_split(ceil(len(images) / 128)):
        adapted(x)
    for norm, momentum in norms.items():
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def _outputs(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, classes) of a network in eval mode, in float32 or float64."""
    # A network may normalise its images in place.
    batches = (x.clone() for x in images.split(128))
    return torch.cat([logits_in(torch.float32, network, x) for x in batches])


def _place_adapters(
    adapted: Adapted, budget: float, exempt: Collection[str], order: int, start: float | None
) -> dict[str, AdaptedConv2d]:
    """Cuts the adapters softly before a search, and removes those that are not wanted.

    Returns the convolutions with adapters by name. Raises ValueError for a budget below adapters
    of rank 1, and for unknown names in `exempt`.
    """
    if isinstance(exempt, str) or not isinstance(exempt, Collection):
        raise ValueError(f"exempt={exempt!r} is not allowed: a list of names of convolutions")
    if unknown := [name for name in exempt if name not in adapted.convs]:
        raise ValueError(f"exempt names no convolution: {unknown}")
    kept = {}
    for name, conv in adapted.convs.items():
        if budget == 0 or name in exempt or conv.bits == FLOAT_BITS:
            conv.set_rank(0, adapted.adapter_bits)
        else:
            kept[name] = conv
    least = sum(conv.component for conv in kept.values()) / adapted.weights
    if kept and not budget >= least:
        enough = ceil(1e4 * least) / 1e4  # rounded up, so that the number shown is allowed
        raise ValueError(
            f"budget={budget!r} is not allowed: 0, or at least {enough}, which adapters of rank "
            f"1 in {len(kept)} convolutions need; `exempt` takes some of them out"
        )
    full = sum(c.rank * c.component for c in kept.values()) / adapted.weights
    for conv in kept.values():
        conv.cut_softly(min(1.0, budget / full) if start is None else start, order)
    return kept


def _set_ranks(
    adapted: Adapted,
    convs: Mapping[str, AdaptedConv2d],
    shares: Mapping[str, float],
    budget: float,
) -> None:
    """Gives the adapters of `convs` whole ranks within the budget. `shares`: from the search."""
    full, component = zip(*((c.rank, c.component) for c in convs.values()), strict=True)
    wanted = [shares[name] * conv.rank for name, conv in convs.items()]
    ranks = fit_ranks(wanted, full, component, budget * adapted.weights)
    for conv, rank in zip(convs.values(), ranks, strict=True):
        conv.set_rank(rank, adapted.adapter_bits)


@torch.inference_mode(False)  # the search needs gradients, wherever it is called
@torch.enable_grad()
def cora(
    network: nn.Module,
    calibration: Dataset,
    bits: int | Mapping[str, int] = 4,
    budget: float = 0.05,
    *,
    granularity: str = "channel",
    deviations: float = 3.0,
    adapter_bits: int = 8,
    exempt: Collection[str] = (),
    order: int = 4,
    start: float | None = None,
    iterations: int = 60,
    batch_size: int = 128,
    teacher: bool = False,
    recalibrate: bool = False,
    norms_per_batch: bool = False,
    lr: float = 0.01,
    clip: float = 0.2,
    gamma: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Adapted:
    """Quantizes the convolutions of a float network and puts low-rank adapters beside them.

    No weight is trained: the search learns the rank of each adapter, on calibration images.
    `network`: any with Conv2d; it stays as it is, the result is a copy in eval mode. All else stays
    in float: linear layers, norms, activations, and what `Adapted.float_parts` lists and a warning
    names, such as Conv1d, Conv3d and transposed convolutions. `calibration`: items (image
    (C, H, W), label), read into memory. `bits`: of the weights, one number or a mapping of all
    convolutions by name, such as a searched policy's; 32 leave a convolution in float, without
    adapter. `budget`: weights in adapters, as a share of those in convolutions, at most 1; 0
    quantizes without adapters.

    `granularity`: as in `quantize_weight`. `deviations`: as there; 3 is the release's, and 1000
    cuts no range, which was better on EfficientNet-Lite0 with a budget of 5%. `adapter_bits`: that
    adapters are stored in. `exempt`: convolutions without adapter. `order`: of the Butterworth
    kernel. `start`: share of the full rank in each layer before the search; None takes the one that
    meets the budget. `iterations`: of the search; 0 keeps the same share in each layer. `teacher`:
    follow the outputs of the float network instead of the labels. `recalibrate`: measure the
    statistics of batch norms anew on the calibration images, before the search and at the end.
    `norms_per_batch`: within the search, batch norms use the statistics of each batch, as in the
    release. By default they use those of the network, so that the search sees the network that it
    returns. `lr`, `clip`, `gamma`: as in `search_ranks`. `seed`: of the batches.

    Raises ValueError for a value that is not allowed, a budget below adapters of rank 1, images
    that are not finite, and a network that cannot be adapted (see `check_convolutions`). Source:
    CoRa (arXiv 2408.00923), by its release; the form of grouped and depth-wise adapters is our own.
    """
    how = dict(iterations=iterations, batch_size=batch_size, lr=lr, clip=clip, gamma=gamma)
    options = dict(budget=budget, granularity=granularity, deviations=deviations, start=start)
    options |= dict(adapter_bits=adapter_bits, order=order, seed=seed)
    switches = dict(teacher=teacher, recalibrate=recalibrate, norms_per_batch=norms_per_batch)
    check_cora_options(**options, **how, **switches)
    adapter_bits, device = int(adapter_bits), select_device(device)
    check_convolutions(network)
    images, targets = (tensor.to(device) for tensor in _read_images(calibration))
    _check_calibration(images, network, recalibrate)
    copied = copy.deepcopy(network).to(device).eval()
    outputs = _outputs(copied, images if teacher else images[:1])
    if teacher:
        targets = outputs
    else:
        check_labels(outputs.expand(len(targets), -1), targets.cpu())
    adapted = Adapted(copied, images[:1], bits, granularity, deviations, adapter_bits)
    convs = _place_adapters(adapted, budget, exempt, order, start)
    if recalibrate and (iterations or not convs):
        _recalibrate_norms(adapted, images)
    if convs:
        norms = [m for m in adapted.modules() if isinstance(m, _BatchNorm)]
        with batch_statistics(norms if norms_per_batch else []):
            shares = search_ranks(adapted, convs, images, targets, budget, **how, seed=seed)
        _set_ranks(adapted, convs, shares, budget)
        if recalibrate:
            _recalibrate_norms(adapted, images)
    return adapted
