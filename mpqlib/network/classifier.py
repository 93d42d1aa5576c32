"""A trained network whose last layer is replaced, for other classes."""

import copy

from torch import nn

from ..files import set_tensors
from .supernet import Supernet
from .tracing import Tracer, trace


def _last_parts(network: nn.Module) -> list[str]:
    """Names of the last layers, and of modules and parameters behind them, such as batch norms."""
    supernet = isinstance(network, Supernet)
    if supernet and not network.last:
        raise ValueError("fresh has edge_bits=None and names no last layers: build it with 8")
    model, last = (network.model, network.last) if supernet else (network, trace(network).last)
    names, behind = set(last), set()
    for node in Tracer().trace(copy.deepcopy(model)).nodes:  # tracing may change the model
        is_behind = not behind.isdisjoint(node.all_input_nodes)
        if is_behind or (node.op == "call_module" and node.target in last):
            behind.add(node)
        if is_behind and node.op == "call_module":
            names.add(node.target)
        if is_behind:
            names |= {n.target for n in node.all_input_nodes if n.op == "get_attr"}
    return sorted(f"model.{name}" if supernet else name for name in names)


def copy_all_but_last(trained: nn.Module, fresh: nn.Module) -> None:
    """Copies every tensor of `trained` into `fresh`, except those of the last layers.

    Both are float networks, or both are supernets. They may differ in their number of classes
    alone. The last layers, with their quantizers and all that is behind them, such as a batch norm,
    stay as they are in `fresh`, even if their shapes are equal: the classes are others.
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
    last = tuple(f"{name}." for name in _last_parts(fresh))
    kept = {n: t for n, t in trained.state_dict().items() if not f"{n}.".startswith(last)}
    own = {n: t for n, t in fresh.state_dict().items() if f"{n}.".startswith(last)}
    set_tensors(fresh, kept | own, "the trained network")
