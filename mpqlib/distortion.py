"""Information distortion mitigation: low-bit outputs are drawn to the high-bit ones."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from .layers import Bits, Candidates, QuantLinear


def lowest_layers(config: Mapping[str, Bits], candidates: Mapping[str, Candidates]) -> list[str]:
    """Layers that run at their smallest current weight bit-width, of more than one (RFQuant)."""
    return [
        name
        for name, bits in config.items()
        if bits.weight == min(candidates[name].weight) < max(candidates[name].weight)
    ]


@contextmanager
def captured(layers: Mapping[str, nn.Module], names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, the outputs (after the norm) of the named layers, by name."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str):
        def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            outputs[name] = output
            # The network goes on with a copy: what follows may write in place (ReLU, `+=`).
            return output.clone()

        return keep

    chosen = {name: layers[name] for name in names}  # an unknown name fails before any hook is set
    handles = [layer.register_forward_hook(hook(name)) for name, layer in chosen.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def idm_loss(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of the mean squared error to the largest bits' (detached) outputs (IDM).

    `outputs`: of the layers to mend, (N, C, H, W) each; `targets`: at least the same layers.
    Raises ValueError without any layer.
    """
    if not outputs:
        raise ValueError("no layer's outputs were given: IDM needs at least one")
    # A norm, because the gradient of mse_loss forgets channels-last, which slows the layers below.
    distances = (
        vector_norm(y - targets[name].detach()) / y.numel() ** 0.5 for name, y in outputs.items()
    )
    return sum(distance.square() for distance in distances)


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
