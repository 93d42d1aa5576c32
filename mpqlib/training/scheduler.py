"""Dynamic bit-width scheduler: turbulence, and which bit-widths are frozen because of it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..network.bits import Candidates
from ..network.layers import QuantLinear
from ..network.quantizer import in_memory_order, integer_range

# Weights visited at a time, so that what is computed from them stays in a processor's cache.
BLOCK = 2**18


def unstable_share(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Share of weights in the outer quarter of their quantization bin, a scalar.

    That is |w/s - round(w/s)| > 3/8: nearer than 1/8 to a rounding bound. In the two end bins only
    the inner side has one, which clipping w/s to the range gives, for clipped values are integers.
    Source: RFQuant (arXiv 2401.01543), definition 3.1 and its release.
    """
    q_min, q_max = integer_range(bits, signed=True)
    count = torch.zeros((), dtype=torch.long, device=weight.device)
    for block in in_memory_order(weight, dtype=weight.dtype)[0].split(BLOCK):
        v = (block / step).clamp_(q_min, q_max)
        distance = v.frac_().abs_().sub_(1 / 2).abs_()  # to the nearest rounding bound, <= 1/2
        count -= distance.sub_(1 / 8).floor_().sum().long()  # the floor is -1 when near, else 0
    return count / weight.numel()


@torch.no_grad()
def turbulence(layer: QuantLinear) -> float:
    """Unstable share over bit-width, averaged over the layer's weight candidates (RFQuant)."""
    quantizer = layer.weight_quantizer
    shares = [unstable_share(layer.op.weight, quantizer.step(b), b) / b for b in quantizer.bits]
    return float(torch.stack(shares).mean())


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def freeze_share(progress: float) -> float:
    """Share of layers to freeze: from 0.5 at the first freeze to 0.2 at the end (RFQuant)."""
    return cosine(0.5, 0.2, progress)


def freeze(
    full: Mapping[str, Candidates],
    turbulences: Mapping[str, float],
    share: float,
    activations: bool = True,
) -> dict[str, Candidates]:
    """Candidates once the most turbulent `share` of layers has lost its smallest bit-width.

    Layers with a single weight candidate are not ranked. Every other layer has its full set (back).
    `activations`: freeze the activation candidate too where a layer's two sets are the same
    (RFQuant's ResNet18 configuration). Raises ValueError for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share!r} of layers to freeze: allowed are 0 to 1")
    ranked = sorted(
        (name for name, c in full.items() if len(c.weight) > 1),
        key=lambda name: turbulences[name],
        reverse=True,
    )
    frozen = set(ranked[: round(share * len(ranked))])

    def reduced(c: Candidates) -> Candidates:
        both = activations and c.act == c.weight
        return Candidates(c.weight[1:], c.act[1:] if both else c.act)

    return {name: reduced(c) if name in frozen else c for name, c in full.items()}


def is_freeze_epoch(
    epoch: int,
    epochs: int,
    start: int = 6,
    every: int = 2,
    late: float = 0.72,
    late_every: int = 15,
) -> bool:
    """Whether candidates are chosen anew before `epoch` (from 0) of `epochs`.

    From epoch `start` on every `every` epochs until the share `late` of training, then every
    `late_every` (RFQuant's release: 6, 2, 72%, 15).
    """
    if epoch < start:
        return False
    turn = max(start, math.ceil(late * epochs))
    return (epoch - start) % every == 0 if epoch < turn else (epoch - turn) % late_every == 0
