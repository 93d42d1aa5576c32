"""Width of a network whose weights, at given bits, have a given size."""

from collections.abc import Callable, Mapping
from math import inf
from numbers import Real
from sys import float_info

import torch
from torch import nn

from ..models import WIDEST
from .tracing import LAYERS, trace

TOLERANCE = 0.01  # share of the size by which a network may miss it
NARROWEST = 1 / 64


def inner_layers(network: nn.Module) -> list[str]:
    """Names of the layers that neither read the image nor give the output, in their order.

    Raises ValueError if torch.fx cannot trace the network.
    """
    found = trace(network)
    return [name for name in found.norms if name not in found.first | found.last]


def weight_bytes(network: nn.Module, bits: Mapping[str, float], edge_bits: float) -> float:
    """Size in bytes of the weights of convolutions and linear layers, as `cost.model_size` counts.

    `bits`: of the weights of layers by name; all others have `edge_bits`. Raises ValueError for
    names of no layer, and for bits that are not numbers above 0.
    """
    layers = {n: m for n, m in network.named_modules() if isinstance(m, LAYERS)}
    if unknown := [name for name in bits if name not in layers]:
        raise ValueError(f"bits name no layer: {unknown}")
    for name, value in {"edge_bits": edge_bits, **bits}.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < inf:
            raise ValueError(f"bits of {name!r} are {value!r}: a number above 0 is needed")
    weights = {name: layer.weight for name, layer in layers.items()}  # kept: ids are used again
    # Layers that share a weight, at the same bits, store it once.
    sizes = {(id(w), bits.get(name, edge_bits)): w.numel() for name, w in weights.items()}
    return sum(count * width for (_, width), count in sizes.items()) / 8


def nearest_width(
    build: Callable[[float], nn.Module], bits: Mapping[str, float], edge_bits: float, size: float
) -> tuple[float, float]:
    """The width whose network is nearest to `size` bytes, and the size of that network.

    `build(width)`: the float network; wider ones must not be smaller. `bits`, `edge_bits`: as in
    `weight_bytes`. Channels are whole numbers, so the sizes that a network can have are steps.
    Raises ValueError if `size` lies outside the widths from NARROWEST to WIDEST.
    """
    if not isinstance(size, Real) or isinstance(size, bool) or not 0 < size <= float_info.max:
        raise ValueError(f"size={size!r} is not allowed: bytes, a number above 0")

    def bytes_at(width: float) -> float:
        with torch.device("meta"):  # shapes alone
            return weight_bytes(build(width), bits, edge_bits)

    guess = (size / bytes_at(1.0)) ** 0.5  # sizes grow about as the square of the width
    low = high = min(max(guess, NARROWEST), WIDEST)
    while low > NARROWEST and bytes_at(low) > size:
        low = max(0.8 * low, NARROWEST)
    while high < WIDEST and bytes_at(high) <= size:
        high = min(1.25 * high, WIDEST)
    if not bytes_at(low) <= size <= bytes_at(high):
        raise ValueError(
            f"size={size:.6g} bytes is not allowed: no width from {NARROWEST} to {WIDEST} has it"
        )
    while high - low > 3e-4 * low:  # the size crosses its target between them
        middle = (low + high) / 2
        low, high = (middle, high) if bytes_at(middle) <= size else (low, middle)
    found = {width: bytes_at(width) for width in (low, high)}
    return min(found.items(), key=lambda item: abs(item[1] - size))


def solve_width(
    build: Callable[[float], nn.Module], bits: Mapping[str, float], edge_bits: float, size: float
) -> float:
    """The width at which the network's weights have `size` bytes, at most 1% off.

    Arguments as in `nearest_width`. Raises ValueError, with the nearest size, if there is none.
    """
    width, found = nearest_width(build, bits, edge_bits, size)
    if abs(found / size - 1) > TOLERANCE:
        raise ValueError(
            f"size={size:.6g} bytes is met by no width within {TOLERANCE:.0%}: the nearest is "
            f"{found:.6g} bytes, at width {width:.4g}"
        )
    return width
