"""A supernet run again on the same images: layers before the first change are not run anew."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..network.bits import BitConfig, Bits, largest
from ..network.supernet import Supernet
from ..network.tracing import Tracer
from ..training.evaluation import batch_statistics, norms_at, outside_norms

Error = Callable[[BitConfig], float]


class Incremental(fx.Interpreter):
    """Logits (N, classes) of the images `x` (N, C, H, W) at one configuration after another.

    The outputs of all nodes are kept. A call runs only those that depend on a layer whose bits
    differ from the call before: in a search, where one layer changes at a time, half of them.
    Between calls nothing else may change, such as weights or the mode of a norm.
    """

    def __init__(self, supernet: Supernet, x: Tensor):
        super().__init__(fx.GraphModule(supernet.model, Tracer().trace(supernet.model)))
        self.supernet, self.x = supernet, x
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

    def fetch_args_kwargs_from_env(self, node: fx.Node) -> tuple[tuple, dict]:
        """A node's inputs; a copy of the first if it is written over (`x += y`, ReLU in place)."""
        args, kwargs = super().fetch_args_kwargs_from_env(node)
        operation = node.target
        if node.op == "call_module":
            operation = self.module.get_submodule(node.target)
        name = getattr(operation, "__name__", str(node.target))
        in_place = kwargs.get("inplace") or getattr(operation, "inplace", False)
        if in_place or name in ("iadd", "imul") or (name.endswith("_") and name[-2:] != "__"):
            args = (args[0].clone(), *args[1:])
        return args, kwargs


def batch_error(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Error:
    """The error a search minimises: cross-entropy on one batch of the search split.

    x: images (N, C, H, W); y: labels (N); `loss`: of logits (N, classes) and labels. Batch norms
    use the batch's own statistics, which any configuration has at once, without recalibration (as
    RFQuant's release does). Activations are kept from call to call (`Incremental`): ask for it anew
    once the weights have changed.
    """
    logits, outside = Incremental(supernet.eval(), x), outside_norms(supernet)

    @torch.inference_mode()
    def error(config: BitConfig) -> float:
        with batch_statistics(norms_at(supernet, config) + outside):
            return float(loss(logits(config), y))

    return error
