"""The error that a search minimises, and passes that recompute only what a change affects."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from math import inf, isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..network.bits import BitConfig, Bits, largest
from ..network.observation import eval_mode
from ..network.supernet import Supernet, check_supernet
from ..network.tracing import Tracer
from ..training.evaluation import batch_norms, batch_statistics
from ..training.step import check_labels

Error = Callable[[BitConfig], float]


def without_nan(error: Error) -> Error:
    """Returns `error` with infinity in the place of NaN and of minus infinity.

    So a search never prefers a configuration whose error is not a finite number.
    """

    def finite_or_infinite(config: BitConfig) -> float:
        value = float(error(config))
        return value if isfinite(value) else inf

    return finite_or_infinite


class Incremental(fx.Interpreter):
    """Computes logits (N, classes) of the images `x` (N, C, H, W), configuration by configuration.

    Keeps the outputs of all operations. A call runs only those that depend on a layer whose bits
    differ from the call before. In a search, which changes one layer at a time, this halves the
    time. Everything runs anew after weights or step sizes were written over in place, as `train`
    and `fit_steps` do. A change that PyTorch does not count is not noticed, such as one through
    `.data`. Between calls nothing else may change, such as the mode of a batch norm.

    An operation that writes over its input gets a copy of it. A network that reads a tensor after
    it was written over cannot be run in parts: `divisible` is then False, a UserWarning names the
    operations, and each call runs the whole network.
    """

    def __init__(self, supernet: Supernet, x: Tensor):
        super().__init__(fx.GraphModule(supernet.model, Tracer().trace(supernet.model)))
        self.supernet, self.x = supernet, x
        self.last: dict[str, Bits] = {}
        self.parameters = list(supernet.parameters())
        self.written = _versions(self.parameters)
        self.overwritten: dict[fx.Node, set[fx.Node]] = {}  # operation -> inputs it writes over
        # Tensors made in inference mode do not count how often they were written over.
        with torch.inference_mode(False), torch.no_grad():
            reason = self._find_overwritten(largest(supernet.candidates))
        self.divisible = not reason
        if reason:
            warnings.warn(
                f"every pass runs the whole network, because {reason}: searches take about twice as"
                " long",
                stacklevel=2,
            )

    def _find_overwritten(self, config: BitConfig) -> str:
        """Finds the inputs that operations write over, by one pass at `config`.

        Returns why the network cannot be run in parts, or "" if it can.
        """
        self.supernet.set_bits(config)
        # A copy, because the first operation may write over the images.
        self.args_iter = iter([self.x.clone()])
        order = {node: i for i, node in enumerate(self.module.graph.nodes)}
        reason = ""
        for node in order:
            before = {n: _versions(value) for n, value in self.env.items()}
            self.env[node] = self.run_node(node)
            written = {n for n in before if _versions(self.env[n]) != before[n]}
            self.overwritten[node] = written & set(node.all_input_nodes)
            for n in written:
                if later := [user for user in n.users if order[user] > order[node]]:
                    reason = (
                        f"{later[0].name!r} reads {n.name!r} after {node.name!r} writes over it"
                    )
        self.env = {}
        return reason

    def __call__(self, config: BitConfig) -> Tensor:
        return self.run_changes(config) if self.divisible else self.supernet(self.x, config)

    def run_changes(self, config: BitConfig) -> Tensor:
        """Runs the operations that a change since the last call affects; returns the logits."""
        if (now := _versions(self.parameters)) != self.written:  # weights or steps have changed
            self.env, self.last, self.written = {}, {}, now
        self.supernet.set_bits(config)
        self.args_iter = iter([self.x])
        layers = self.supernet.layers
        # Set again at the end: after an interruption, outputs are of two configurations.
        last, self.last = self.last, {}
        changed = {layers[name] for name in config if config[name] != last.get(name)}
        stale: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            calls_changed = node.op == "call_module" and self.fetch_attr(node.target) in changed
            reads_stale = not stale.isdisjoint(node.all_input_nodes)
            if node not in self.env or calls_changed or reads_stale:
                stale.add(node)
                self.env[node] = self.run_node(node)
        self.last = dict(config)
        return self.env[node]

    def fetch_args_kwargs_from_env(self, node: fx.Node) -> tuple[tuple, dict]:
        """The inputs of an operation; those that it writes over are copied."""

        def fetch(source: fx.Node) -> object:
            value = self.env[source]
            return _copy(value) if source in self.overwritten.get(node, ()) else value

        return fx.node.map_arg(node.args, fetch), fx.node.map_arg(node.kwargs, fetch)


def _versions(value: object) -> list[int]:
    """How often each tensor of a value, such as a tuple of them, was written over."""
    versions = []

    def append(item: object) -> None:
        if isinstance(item, Tensor) and not item.is_inference():
            versions.append(item._version)

    fx.node.map_aggregate(value, append)
    return versions


def _copy(value: object) -> object:
    """A copy of a tensor, or of all tensors of a tuple or list."""
    return fx.node.map_aggregate(value, lambda v: v.clone() if isinstance(v, Tensor) else v)


def batch_error(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Error:
    """Returns the error that a search minimises: the loss on one batch of the search split.

    `x`: images (N, C, H, W). `y`: labels (N). `loss`: of logits (N, classes) and labels; the
    default is cross-entropy in nats. Batch norms use the statistics of the batch itself, so that no
    configuration needs recalibration (as in RFQuant's release, arXiv 2401.01543).

    Puts the supernet into eval mode. The error is computed in eval mode in any case; a supernet in
    another mode returns to it. Outputs of layers are kept between calls, until weights or step
    sizes change in place (see `Incremental`). Raises ValueError if there is no image, or not one
    label for each image; with the default loss, the error does so for unfit labels.
    """
    check_supernet("supernet", supernet)
    if not 0 < len(x) == len(y):
        raise ValueError(f"x holds {len(x)} images and y {len(y)} labels: one label for each image")
    logits, norms = Incremental(supernet.eval(), x), batch_norms(supernet)
    modules = list(supernet.modules())

    @torch.inference_mode()
    def error(config: BitConfig) -> float:
        supernet.check(config)
        training = any(module.training for module in modules)
        mode = eval_mode(supernet) if training else nullcontext()
        with mode, batch_statistics(norms):
            outputs = logits(config)
            if loss is F.cross_entropy:
                check_labels(outputs, y)
            return float(loss(outputs, y))

    return error
