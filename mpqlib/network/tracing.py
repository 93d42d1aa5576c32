"""The structure of a float network, found by torch.fx and by one pass."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import QuantLinear


class Tracer(fx.Tracer):
    """Keeps whole all layers that are or can be quantized or paired, subclasses (timm's) too."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        kept = isinstance(module, (QuantLinear, nn.Conv2d, nn.Linear, _BatchNorm))
        return kept or super().is_leaf_module(module, name)


@dataclass
class _Structure:
    """What tracing finds: layers in order, the norm that follows each, and the network's edges."""

    norms: dict[str, str | None]  # layer -> its batch norm
    first: set[str]  # layers that read the image
    last: set[str]  # layers that no other layer reads


def _following_norm(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The batch norm that alone reads the convolution `node`, and only it, if there is one."""
    user = next(iter(node.users)) if len(node.users) == 1 else node
    calls = [n for n in node.graph.nodes if n.op == "call_module" and n.target == user.target]
    is_norm = calls == [user] and isinstance(modules[user.target], _BatchNorm)
    return user.target if is_norm and isinstance(modules[node.target], nn.Conv2d) else None


def _trace(model: nn.Module) -> _Structure:
    """Layers, conv-norm pairs and edges of `model`; raises ValueError if torch.fx cannot trace."""
    try:
        graph = Tracer().trace(model)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be traced by torch.fx: {error}") from error
    modules = dict(model.named_modules())
    found = _Structure({}, set(), set())
    nearest: dict[fx.Node, set[str]] = {}  # node -> the layers whose outputs reach it unmixed
    for node in graph.nodes:
        above = set().union(*(nearest[source] for source in node.all_input_nodes))
        nearest[node] = above
        if node.op == "call_module" and isinstance(modules[node.target], (nn.Conv2d, nn.Linear)):
            again = node.target in found.norms  # a layer called twice has no norm of its own
            found.norms[node.target] = None if again else _following_norm(node, modules)
            found.first |= set() if above else {node.target}
            found.last = found.last - above | {node.target}
            nearest[node] = {node.target}
    if not found.norms:
        raise ValueError(f"{type(model).__name__} holds no Conv2d or Linear to quantize")
    return found


def _observe(model: nn.Module, example: Tensor, names: Iterable[str]) -> dict[str, list]:
    """One float pass: layer name -> [its first input (a copy), output positions per image]."""
    seen: dict[str, list] = {}

    def record(name: str, op: nn.Module, args: tuple, y: Tensor) -> None:
        seen.setdefault(name, [args[0].clone(), 0])  # what follows may write in place
        seen[name][1] += y[0].numel() // op.weight.shape[0]  # (channels, places) -> places

    hooks = [model.get_submodule(n).register_forward_hook(partial(record, n)) for n in names]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return seen
