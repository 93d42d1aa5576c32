"""A supernet run again on the same images: layers before the first change are not run anew."""

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import Bits, QuantLinear
from .supernet import BitConfig, Supernet, largest

OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul}


class _Tracer(fx.Tracer):
    """Keeps every quantizable layer whole, its norms included."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (QuantLinear, _BatchNorm)) or super().is_leaf_module(module, name)


def traced(model: nn.Module) -> fx.GraphModule:
    """The network as a graph of layers (torch.fx) in which no operation overwrites its input."""
    graph = _Tracer().trace(model)
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = OUT_OF_PLACE.get(node.target, node.target)
            if "inplace" in node.kwargs:
                node.update_kwarg("inplace", False)
        elif node.op == "call_method" and not node.target.endswith("__"):
            node.target = node.target.removesuffix("_")  # add_ -> add
    return fx.GraphModule(model, graph)


@contextmanager
def out_of_place(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, none of `modules`, which have the option, overwrites its input."""
    try:
        for module in modules:
            module.inplace = False
        yield
    finally:
        for module in modules:
            module.inplace = True


class Incremental(fx.Interpreter):
    """Logits (N, classes) of the images `x` (N, C, H, W) at one configuration after another.

    The outputs of all nodes are kept. A call runs only those that depend on a layer whose bits
    differ from the call before: in a search, where one layer changes at a time, half of them.
    Between calls nothing else may change, such as weights or the mode of a norm.
    """

    def __init__(self, supernet: Supernet, x: Tensor):
        super().__init__(traced(supernet.model))
        self.supernet, self.x = supernet, x
        called = [n.target for n in self.module.graph.nodes if n.op == "call_module"]
        modules = [supernet.model.get_submodule(name) for name in called]
        self.inplace = [m for m in modules if getattr(m, "inplace", False)]
        self.last: dict[str, Bits] = {}
        config = largest(supernet.candidates)
        with torch.no_grad():
            # Not so where a network reads a tensor that an alias of it has written over.
            self.divisible = torch.allclose(self.changes(config), supernet(x, config))
        self.last, self.env = {}, {}

    def __call__(self, config: BitConfig) -> Tensor:
        return self.changes(config) if self.divisible else self.supernet(self.x, config)

    def changes(self, config: BitConfig) -> Tensor:
        """Runs what differs from the last call; returns the logits."""
        self.supernet.set_bits(config)
        self.args_iter = iter([self.x])
        changed = {name for name in config if config[name] != self.last.get(name)}
        stale: set[fx.Node] = set()
        with out_of_place(self.inplace):
            for node in self.module.graph.nodes:
                if (
                    node not in self.env
                    or node.target in changed
                    or not stale.isdisjoint(node.all_input_nodes)
                ):
                    stale.add(node)
                    self.env[node] = self.run_node(node)
        self.last = dict(config)
        return self.env[node]
