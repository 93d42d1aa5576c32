"""Information distortion mitigation (IDM): low-bit outputs are drawn to the high-bit ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from ..network.bits import Bits, Candidates
from ..network.layers import QuantLinear
from ..network.quantizer import integer_range


def lowest_layers(config: Mapping[str, Bits], candidates: Mapping[str, Candidates]) -> list[str]:
    """Layers that run at the smallest of their several current weight bit-widths (RFQuant)."""
    return [
        name
        for name, bits in config.items()
        if bits.weight == min(candidates[name].weight) < max(candidates[name].weight)
    ]


@contextmanager
def reading(
    layers: Mapping[str, nn.Module],
    names: Iterable[str],
    read: Callable[[str, int, Tensor], Tensor],
) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block, collects `read(name, call, output)` of the named layers.

    Yields layer name -> one value per call, in order; `call` counts a layer's calls from 0, as it
    may run several times in a pass. Outputs are those after the batch norm. They are read at once,
    because later operations may overwrite them (an in-place ReLU, `+=`).
    """
    found: dict[str, list[Tensor]] = {}

    def hook(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        calls = found.setdefault(name, [])
        calls.append(read(name, len(calls), output))

    chosen = {name: layers[name] for name in names}  # an unknown name fails before any hook is set
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in chosen.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def captured(layers: Mapping[str, nn.Module], names: Iterable[str]):
    """Within the block, collects detached copies of the named layers' outputs, one per call."""
    return reading(layers, names, lambda name, call, output: output.detach().clone())


def distortions(
    layers: Mapping[str, nn.Module],
    names: Iterable[str],
    targets: Mapping[str, Sequence[Tensor]],
):
    """Within the block, collects the named layers' outputs minus `targets`; gradients flow.

    `targets`: what `captured` collected. Each call is compared with the same call there.
    """
    return reading(layers, names, lambda name, call, output: output - targets[name][call])


def idm_loss(distortions: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Sum over layers of their mean squared distortion, a scalar (RFQuant's IDM).

    `distortions`: layer name -> outputs (N, C, H, W) of each call minus the (detached) outputs at
    the largest bits. The mean runs over the values of all calls. Outputs are those after the batch
    norm; RFQuant's release, as it runs, compares many of them after the ReLU, because operations in
    place overwrite what its hooks hold. Raises ValueError without a layer.
    """
    if not distortions:
        raise ValueError("distortions is empty: IDM needs at least one layer")
    total = 0
    for calls in distortions.values():
        # mse_loss would give gradients that are not channels-last, which slows the layers below.
        squares = sum(vector_norm(d).square() for d in calls)
        total = total + squares / sum(d.numel() for d in calls)
    return total


def grid_loss(
    layers: Mapping[str, QuantLinear],
    config: Mapping[str, Bits],
    candidates: Mapping[str, Candidates],
) -> Tensor:
    """Squared distance of latent weights to grid points shared with the smallest bits, a scalar.

    A weight counts if the integer that it rounds to is a multiple of 2^(bits - smallest), so that
    nested grids share the point, and if it is not clipped. So all of them count in a layer at its
    smallest current weight candidate. A layer's squares are added up over the first dimension
    (output channels) and averaged over the others; layers are added up. Layers with one weight
    candidate are left out. Source: RFQuant's release.
    """
    total = torch.zeros(())
    for name, layer in layers.items():
        offered = candidates[name].weight
        if len(offered) == 1:
            continue
        weight, bits = layer.op.weight, config[name].weight
        with torch.no_grad():
            step = layer.weight_quantizer.step(bits)
            q_min, q_max = integer_range(bits, signed=True)
            v = weight / step
            integers = v.round()
            counts = (integers % 2 ** (bits - min(offered)) == 0) & (q_min < v) & (v < q_max)
            x_hat = integers * step
        squares = ((weight - x_hat) * counts).square()
        total = total.to(weight) + squares.sum(0).mean()
    return total
