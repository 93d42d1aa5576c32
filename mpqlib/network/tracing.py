"""The structure of a float network: its layers, their batch norms and its edges, by torch.fx."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import QuantLinear

LAYERS = (nn.Conv2d, nn.Linear)  # what can be quantized


class Tracer(fx.Tracer):
    """Does not trace into layers that are or can be quantized, nor into batch norms.

    Subclasses of them, such as timm's, are not traced into either.
    """

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        kept = isinstance(module, (QuantLinear, *LAYERS, _BatchNorm))
        return kept or super().is_leaf_module(module, name)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        # The images are the only input. Optional arguments keep their defaults, as in model(x).
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]


@dataclass
class Structure:
    """What tracing finds of a network, by layer name."""

    norms: dict[str, str | None]  # layer -> its batch norm, in the order of first calls
    first: set[str]  # layers that read the image
    last: set[str]  # layers that no other layer reads
    inputs: dict[str, str]  # layer -> the operation whose output it reads, if it runs once


def _following_norm(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the batch norm that reads the convolution `node`, if each has no other partner."""
    user = next(iter(node.users)) if len(node.users) == 1 else node
    calls = [n for n in node.graph.nodes if n.op == "call_module" and n.target == user.target]
    is_norm = calls == [user] and isinstance(modules[user.target], _BatchNorm)
    return user.target if is_norm and isinstance(modules[node.target], nn.Conv2d) else None


def _structure(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Structure:
    found = Structure({}, set(), set(), {})
    nearest: dict[fx.Node, set[str]] = {}  # node -> layers it depends on through no other layer
    for node in graph.nodes:
        above = set().union(*(nearest[source] for source in node.all_input_nodes))
        nearest[node] = above
        if node.op == "call_module" and isinstance(modules[node.target], LAYERS):
            again = (
                node.target in found.norms
            )  # a layer that is called twice has no norm of its own
            found.norms[node.target] = None if again else _following_norm(node, modules)
            found.inputs[node.target] = node.name if again else node.all_input_nodes[0].name
            found.first |= set() if above else {node.target}
            found.last = found.last - above | {node.target}
            nearest[node] = {node.target}
    return found


def _copy_modules(model: nn.Module) -> nn.Module:
    """A copy that shares its parameters with `model`: tracing may change other attributes."""
    values = [v for m in model.modules() for v in (*m._parameters.values(), *vars(m).values())]
    return copy.deepcopy(model, {id(v): v for v in values if isinstance(v, Tensor)})


def trace(model: nn.Module) -> Structure:
    """Layers, their batch norms and the edges of `model`, which stays as it is.

    Raises ValueError if torch.fx cannot trace the model, if it holds no layer to quantize, or if a
    layer runs in training mode alone or in evaluation mode alone.
    """
    name, modules = type(model).__name__, dict(model.named_modules())
    scratch, found = _copy_modules(model), {}
    for training in (True, False):
        try:
            graph = Tracer().trace(scratch.train(training))
        except Exception as error:
            raise ValueError(f"{name} cannot be traced by torch.fx: {error}") from error
        found[training] = _structure(graph, modules)
    training, evaluation = found[True].norms, found[False].norms
    for mode, only in (("training", training), ("evaluation", evaluation)):
        if extra := sorted(only.keys() - (training.keys() & evaluation.keys())):
            raise ValueError(
                f"{name}: {len(extra)} layers, such as {extra[0]!r}, run in {mode} mode only. "
                f"Remove this branch before conversion (in torchvision: aux_logits=False)"
            )
    if not evaluation:
        raise ValueError(f"{name} holds no Conv2d or Linear to quantize")
    # A norm belongs to a layer only if it does so in both modes.
    norms = {n: norm if training[n] == norm else None for n, norm in evaluation.items()}
    return replace(found[False], norms=norms)
