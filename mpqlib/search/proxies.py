"""How related work chooses bit-widths: by measures that stand for the error.

Each measure makes a `Sensitivity` table for `solve`, or is an error for `measure_sensitivity`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import exp

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network.bits import BitConfig, largest
from ..network.cost import bitops
from ..network.observation import eval_mode, hooked
from ..network.quantizer import Quantizer
from ..network.supernet import Supernet, tied_inputs
from ..training.evaluation import check_statistics
from ..training.step import check_labels, in_float32
from .error import BatchLogits, Error, hash_tensors, network_tensors, reference_error
from .limits import check_count, check_limits
from .moves import BIT_WIDTHS, Move
from .sensitivity import Sensitivity, Ties

Rating = Callable[[str, str, int], float]  # of a layer, "weight" or "act", and bits


def noise_to_signal(outputs: Tensor, target: Tensor) -> Tensor:
    """Power of `outputs` minus `target`, as a share of the power of `target`; a scalar.

    In decibels with the sign changed, this is the SQNR: -10 log10 of it.
    """
    return (outputs - target).square().sum() / target.square().sum()


def noise_error(supernet: Supernet, x: Tensor) -> Error:
    """Returns the error "noise of the outputs": `noise_to_signal` against float mode, for images x.

    Batch norms use the statistics of the batch, as in `batch_error`. It needs no labels.
    """
    logits = BatchLogits(supernet, x)

    def run_float() -> Tensor:
        with logits.mode():
            return in_float32(supernet(x))

    return reference_error(logits, run_float, noise_to_signal)


def lower_by_list(supernet: Supernet, table: Sensitivity, budget: float) -> BitConfig:
    """Lowers bits in the order of a list until the budget holds: the least noise goes first.

    `table`: from `measure_sensitivity` with `noise_error`, from the largest bits. The list holds
    each change of one bit-width of one layer, or of the activations of a tied group. A change that
    is above the present bits is passed over. `budget`: BitOPs per image. Raises ValueError for a
    budget that cannot be met, and for a table that is incomplete, of another network or from other
    bits. Source: "A practical mixed precision algorithm for post-training quantization" (arXiv
    2302.05397).
    """
    check_limits(supernet, budget)
    if not isinstance(table, Sensitivity):
        raise ValueError(f"table is a {type(table).__name__}: pass one of measure_sensitivity")
    table.check(supernet)
    if table.base != largest(supernet.candidates):
        raise ValueError("table does not start from the largest bits: measure it from there")
    config = table.base
    for (move,) in sorted((m for m in table.errors if len(m) == 1), key=table.errors.get):
        if bitops(supernet.table, config) <= budget:
            break
        if move.after < getattr(config[move.layer], move.part):
            group = _group(table.ties, move.layer) if move.part == "act" else (move.layer,)
            config = move._replace(tied=group).apply(config)
    return config


def _group(ties: Ties, layer: str) -> Sequence[str]:
    """The layers that share their activation bits with `layer`, itself included."""
    return next((group for group in ties if layer in group), (layer,))


def rate_bits(supernet: Supernet, rating: Rating) -> Sensitivity:
    """A table of the sum of `rating` over all bit-widths of all layers; no pass is run.

    `rating`: what one bit-width of one layer adds to the error.
    """
    base, ties = largest(supernet.candidates), tuple(tied_inputs(supernet.table))
    total = sum(rating(n, part, getattr(base[n], part)) for n in base for part in BIT_WIDTHS)
    errors = {}
    for name, choices in supernet.candidates.items():
        for part in BIT_WIDTHS:
            now = getattr(base[name], part)
            group = _group(ties, name) if part == "act" else (name,)
            for bits in getattr(choices, part):
                if bits != now:
                    change = sum(rating(n, part, bits) - rating(n, part, now) for n in group)
                    errors[(Move(name, part, now, bits),)] = total + change
    network = hash_tensors(network_tensors(supernet))
    return Sensitivity(base, total, errors, ties, network=network)


def hessian_traces(
    supernet: Supernet, x: Tensor, y: Tensor, probes: int = 32, seed: int = 0, batch_size: int = 16
) -> dict[str, float]:
    """Trace of the Hessian of the cross-entropy, for the weights of each layer, in float mode.

    `x`: images (N, C, H, W). `y`: labels (N). Hutchinson's estimate: the mean of v.Hv over `probes`
    random vectors v of -1 and +1. A vector spans all layers at once. This is noisier than a vector
    for each layer, but takes one pass instead of one for each layer; the mean is the same. Images
    run in batches of `batch_size`, which limit the memory. Batch norms are in eval mode.

    Raises ValueError for frozen weights, for unfit labels, and, as `check_statistics` does, if
    float mode has no statistics of its own. Source: HAWQ-V2 (arXiv 1911.03852).
    """
    check_statistics(supernet, None)
    check_count("probes", probes, 1)
    check_count("batch_size", batch_size, 1)
    if frozen := [n for n, c in supernet.layers.items() if not c.op.weight.requires_grad]:
        raise ValueError(f"the weights of {frozen} require no gradient: the Hessian needs it")
    weights = {name: layer.op.weight for name, layer in supernet.layers.items()}
    generator, own = torch.Generator().manual_seed(seed), list(weights.values())
    totals = dict.fromkeys(weights, 0.0)
    with eval_mode(supernet), torch.enable_grad():
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            outputs = in_float32(supernet(images))
            check_labels(outputs, labels)
            loss = F.cross_entropy(outputs, labels, reduction="sum") / len(x)
            slopes = torch.autograd.grad(loss, own, create_graph=True, materialize_grads=True)
            for _ in range(probes):
                signs = [torch.randint(2, w.shape, generator=generator).to(w) * 2 - 1 for w in own]
                along = sum((slope * v).sum() for slope, v in zip(slopes, signs, strict=True))
                products = torch.autograd.grad(
                    along, own, retain_graph=True, materialize_grads=True
                )
                for name, v, product in zip(weights, signs, products, strict=True):
                    totals[name] += float((v * product).sum()) / probes
    return totals


@torch.no_grad()
def hessian_table(
    supernet: Supernet, x: Tensor, y: Tensor, probes: int = 32, seed: int = 0
) -> Sensitivity:
    """A table of HAWQ's measure: mean Hessian trace of a layer times its squared rounding error.

    The parameters are those of `hessian_traces`. It rates weights alone: solve it with
    `equal_bits=True`. A negative trace, which is an error of the estimate, counts as 0. Source:
    HAWQ-V2 (arXiv 1911.03852), and HAWQ-V3 (arXiv 2011.10680) for the integer program.
    """
    traces = hessian_traces(supernet, x, y, probes, seed)

    def rating(name: str, part: str, bits: int) -> float:
        if part == "act":
            return 0.0
        layer = supernet.layers[name]
        weight, quantizer = layer.op.weight, layer.weight_quantizer
        if not isinstance(quantizer, Quantizer):  # weights of two or three values: no choice
            return 0.0
        noise = (quantizer(weight, quantizer.position(bits)) - weight).square().sum()
        return max(traces[name], 0.0) / weight.numel() * float(noise)

    return rate_bits(supernet, rating)


@torch.no_grad()
def similarities(supernet: Supernet, x: Tensor) -> Tensor:
    """Similarity (0 to 1) of the outputs of each two layers, in float mode: shape (layers, layers).

    `x`: images (N, C, H, W). Outputs of a layer are an N x features matrix F with centred columns;
    the similarity of two is <F F', G G'> / (|F F'| |G G'|), and 0 for outputs that are the same for
    all images. Of a layer that runs several times, the last call counts. Raises ValueError for
    fewer than two images, for outputs that are not finite, and, as `check_statistics` does, if
    float mode has no statistics of its own. Source: OMPQ (arXiv 2109.07865), which calls it ORM.
    """
    check_statistics(supernet, None)
    if len(x) < 2:
        raise ValueError(f"x holds {len(x)} images: similarities need at least 2")
    grams: dict[str, Tensor] = {}

    def keep(name: str, op: nn.Module, args: tuple, output: Tensor) -> None:
        features = output.flatten(1) - output.flatten(1).mean(0)
        gram = features @ features.T
        if not gram.isfinite().all():
            raise ValueError(f"outputs of {name!r} are not finite: check images and weights")
        grams[name] = (gram / gram.norm().clamp_min(torch.finfo(gram.dtype).tiny)).flatten()

    layers = supernet.layers
    handles = [layer.op.register_forward_hook(partial(keep, n)) for n, layer in layers.items()]
    with eval_mode(supernet), hooked(handles):
        supernet(x)
    stacked = torch.stack([grams[name] for name in layers])
    return stacked @ stacked.T


def orthogonality_table(supernet: Supernet, x: Tensor, beta: float = 10.0) -> Sensitivity:
    """A table of OMPQ's measure: bits are worth more in layers that resemble few other layers.

    `x`: as in `similarities`. A layer's importance is exp(-beta * (mean of its similarities to the
    others)), and each of its bits is worth the mean importance of this layer and all later ones. It
    rates weights alone: solve it with `equal_bits=True`. Source: OMPQ (arXiv 2109.07865) and its
    release, which takes the sum of the similarities. In a network of fifty layers, sums make worths
    so unequal that the program cannot tell most of them from 0.
    """
    matrix = similarities(supernet, x)
    others = max(1, len(matrix) - 1)
    means = ((matrix.sum(1) - matrix.diagonal()) / others).tolist()
    importance = [exp(-beta * mean) for mean in means]
    names = list(supernet.layers)
    worth = {n: sum(importance[i:]) / len(importance[i:]) for i, n in enumerate(names)}

    def rating(name: str, part: str, bits: int) -> float:
        return -worth[name] * bits if part == "weight" else 0.0

    return rate_bits(supernet, rating)
