"""Information distortion mitigation: low-bit outputs are drawn to the high-bit ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from ..network.bits import Bits, Candidates
from ..network.layers import QuantLinear


def lowest_layers(config: Mapping[str, Bits], candidates: Mapping[str, Candidates]) -> list[str]:
    """Layers that run at their smallest current weight bit-width, of more than one (RFQuant)."""
    return [
        name
        for name, bits in config.items()
        if bits.weight == min(candidates[name].weight) < max(candidates[name].weight)
    ]


@contextmanager
def reading(
    layers: Mapping[str, nn.Module], names: Iterable[str], read: Callable[[str, Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Within the block, `read(name, output)` of the named layers (after the norm), by name.

    It reads at once, because what follows may write over the output (an in-place ReLU, `+=`).
    """
    found: dict[str, Tensor] = {}

    def hook(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        found[name] = read(name, output)

    chosen = {name: layers[name] for name in names}  # an unknown name fails before any hook is set
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in chosen.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def captured(layers: Mapping[str, nn.Module], names: Iterable[str]):
    """Within the block, detached copies of the named layers' outputs (after the norm), by name."""
    return reading(layers, names, lambda name, output: output.detach().clone())


def distortions(
    layers: Mapping[str, nn.Module], names: Iterable[str], targets: Mapping[str, Tensor]
):
    """Within the block, the named layers' outputs less `targets`, by name; gradients flow."""
    return reading(layers, names, lambda name, output: output - targets[name])


def idm_loss(distortions: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of their mean squared distortion, a scalar (RFQuant's IDM).

    `distortions`: what the outputs (N, C, H, W) of the layers to mend are off the (detached) ones
    at the largest bits. Raises ValueError without any layer.
    """
    if not distortions:
        raise ValueError("no layer's distortion was given: IDM needs at least one")
    # By norms, because the gradient of mse_loss is not channels-last, which slows the layers below.
    return sum(vector_norm(d).square() / d.numel() for d in distortions.values())


def grid_loss(layers: Mapping[str, QuantLinear], config: Mapping[str, Bits]) -> Tensor:
    """Squared distance of latent weights to their grid points at `config`, summed: a scalar.

    Only points that the smallest bit-width's grid does not share count: those that a detour over
    that coarser grid moves (RFQuant's release; the detour is our reading of "shared", since every
    bit-width learns a step of its own).
    """
    total = torch.zeros(())
    for name, layer in layers.items():
        weight, quantize, bits = layer.op.weight, layer.weight_quantizer, config[name].weight
        with torch.no_grad():
            x_hat = quantize(weight, bits)
            detour = quantize(quantize(x_hat, quantize.bits[0]), bits)
            own = detour != x_hat
        total = total.to(weight) + ((weight - x_hat) * own).square().sum()
    return total
