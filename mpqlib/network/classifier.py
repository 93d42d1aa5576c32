"""A trained network whose last layer is replaced, for other classes."""

from torch import nn

from ..files import set_tensors
from .supernet import Supernet
from .tracing import trace


def _last_layers(network: nn.Module) -> list[str]:
    """Names of the modules that give the output, and of their batch norms."""
    if not isinstance(network, Supernet):
        found = trace(network)
        norms = [found.norms[name] for name in found.last]
        return sorted(found.last) + [norm for norm in norms if norm is not None]
    if not network.last:
        raise ValueError("fresh has edge_bits=None and names no last layers: build it with 8")
    return [f"model.{name}" for name in network.last]


def copy_all_but_last(trained: nn.Module, fresh: nn.Module) -> None:
    """Copies every tensor of `trained` into `fresh`, except those of the last layers.

    Both are float networks, or both are supernets. They may differ in their number of classes
    alone. The last layers, with their quantizers and the batch norms of convolutions, stay as they
    are in `fresh`, even if their shapes are equal: the classes are others. A batch norm behind a
    last linear layer is copied.
    Raises ValueError if any other tensor is missing, unexpected or of another shape or type, or if
    two supernets differ in candidates or in shared quantizers. `fresh` is then unchanged.
    """
    if isinstance(trained, Supernet) and isinstance(fresh, Supernet):
        choices, own = (
            {info.name: (info.candidates, info.tied_to, info.input_of) for info in network.table}
            for network in (trained, fresh)
        )
        if differ := [name for name in choices | own if choices.get(name) != own.get(name)]:
            raise ValueError(f"trained and fresh differ in the bits or ties of layers {differ}")
    last = tuple(f"{layer}." for layer in _last_layers(fresh))
    kept = {n: t for n, t in trained.state_dict().items() if not n.startswith(last)}
    own = {n: t for n, t in fresh.state_dict().items() if n.startswith(last)}
    set_tensors(fresh, kept | own, "the trained network")
