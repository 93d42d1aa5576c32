"""Dynamic bit-width scheduler: the turbulence of layers, and which layers to freeze by it."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..network.bits import Candidates
from ..network.layers import QuantLinear
from ..network.quantizer import in_memory_order, integer_range
from ..network.supernet import LayerInfo

# Number of weights in a block. What is computed from a block fits into a processor's cache.
BLOCK = 2**18


def unstable_share(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Share of weights in the outer quarter of their quantization bin, a scalar.

    These are the weights with |w/s - round(w/s)| > 3/8, less than 1/8 from a rounding bound. In the
    two end bins, only the inner side counts. Source: RFQuant (arXiv 2401.01543), definition 3.1 and
    its release.
    """
    q_min, q_max = integer_range(bits, signed=True)
    count = torch.zeros((), dtype=torch.long, device=weight.device)
    for block in in_memory_order(weight)[0].squeeze(0).split(BLOCK):
        # Clipped values are integers, so that the outer sides of the end bins do not count.
        v = (block / step).clamp_(q_min, q_max)
        distance = v.frac_().abs_().sub_(1 / 2).abs_()  # to the nearest rounding bound, <= 1/2
        count -= distance.sub_(1 / 8).floor_().sum().long()  # the floor is -1 if it is near, else 0
    return count / weight.numel()


@torch.no_grad()
def turbulence(layer: QuantLinear, bits: Iterable[int]) -> float:
    """Mean of (unstable share / b) over the bit-widths b in `bits` (RFQuant).

    `bits`: current weight candidates of `layer`. A layer without its smallest bit-width has a lower
    turbulence, so that other layers take its place at the next decision.
    """
    shares = []
    for b in bits:
        weight, step = layer.op.weight, layer.weight_quantizer.step(b)
        if step.dim():  # per channel
            weight, step = weight / step, torch.ones_like(step.flatten()[0])
        shares.append(unstable_share(weight, step, b) / b)
    return float(torch.stack(shares).mean())


def cosine(start: float, end: float, progress: float) -> float:
    """Value that goes from `start` at progress 0 to `end` at progress 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def freeze_share(part: int, parts: int = 150, start: int = 6, every: int = 2) -> float:
    """Share of layers to freeze before `part` of `parts`: from 0.5 to 0.2 (RFQuant's release).

    A cosine over the number of decisions so far, of which `parts` / `every` would fit into
    training. `start` and `every`: see `is_decision`.
    """
    decisions = (part - start + 1) // every
    return cosine(0.5, 0.2, decisions / (parts / every))


def frozen_bits(table: Iterable[LayerInfo]) -> dict[str, int]:
    """The largest bit-width that may be frozen in each layer: 2, and 3 in depth-wise convolutions.

    RFQuant's release never freezes others, so candidates that begin above stay as they are.
    """
    return {info.name: 3 if info.depthwise else 2 for info in table}


def freeze(
    full: Mapping[str, Candidates],
    turbulences: Mapping[str, float],
    share: float,
    activations: bool = True,
    most: Mapping[str, int] | None = None,
) -> dict[str, Candidates]:
    """Candidates without the smallest bit-width in the most turbulent `share` of layers.

    The number of layers is rounded down. All other layers get their `full` candidates, even if they
    were frozen before. Layers with one weight candidate are not ranked. `activations`: where a
    layer's weight and activation candidates are the same, freeze both (RFQuant's configuration of
    ResNet18). `most`: a layer whose smallest bit-width is larger than this is not frozen, but takes
    its place in the ranking, as in RFQuant's release (`frozen_bits`); None freezes any. Raises
    ValueError for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share!r} is not allowed: a share of layers, from 0 to 1")
    ranked = sorted(
        (name for name, c in full.items() if len(c.weight) > 1),
        key=lambda name: turbulences[name],
        reverse=True,
    )
    chosen = ranked[: int(share * len(ranked))]
    frozen = {name for name in chosen if most is None or full[name].weight[0] <= most[name]}

    def reduced(c: Candidates) -> Candidates:
        both = activations and c.act == c.weight
        return Candidates(c.weight[1:], c.act[1:] if both else c.act)

    return {name: reduced(c) if name in frozen else c for name, c in full.items()}


def is_decision(
    part: int,
    parts: int = 150,
    start: int = 6,
    every: int = 2,
    late: float = 0.72,
    late_every: int = 15,
) -> bool:
    """Whether candidates are chosen again before `part` of `parts`, counted from 0.

    Training is divided into `parts`, the epochs of RFQuant's release. From part `start` on,
    candidates are chosen before every `every`-th part, and after the share `late` of training
    before every `late_every`-th one: 7, 9, ..., 107, 119, 134, 149 of 150.
    """
    turn = every if part < late * parts else late_every
    return part >= start and (part + 1) % turn == 0
