"""The error that a search minimises, and passes that recompute only what a change affects."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from math import inf, isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from ..network.bits import BitConfig, Bits, largest
from ..network.layers import QuantLinear
from ..network.observation import eval_mode
from ..network.supernet import Supernet, check_supernet
from ..network.tracing import Tracer
from ..training.evaluation import batch_norms, batch_statistics, check_statistics
from ..training.step import check_labels, check_logits, in_float32

# Of a configuration. It can have an attribute `images`, the tensor (N, C, H, W) that it reads.
Error = Callable[[BitConfig], float]
Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (N, classes), and labels or other logits

REFERENCES = ("largest", "float")


def without_nan(error: Error) -> Error:
    """Returns `error` with infinity in the place of NaN and of minus infinity.

    So a search never prefers a configuration whose error is not a finite number.
    """

    @wraps(error)  # keeps the attribute `images`
    def finite_or_infinite(config: BitConfig) -> float:
        value = float(error(config))
        return value if isfinite(value) else inf

    return finite_or_infinite


class Incremental(fx.Interpreter):
    """Computes logits (N, classes) of the images `x` (N, C, H, W), configuration by configuration.

    Keeps the outputs of all operations. A call runs only those that depend on a layer whose bits
    differ from the call before. In a search, which changes one layer at a time, this halves the
    time. Everything runs anew after images, weights, step sizes or buffers were written over, as
    `train` and `fit_steps` do, replaced, or converted to another type; `state` is then another
    object. A change that PyTorch does not count is not noticed, such as `weight.data.mul_(2)`.
    Between calls nothing else may change, such as the mode of a batch norm.

    An operation that writes over its input gets a copy of it. A network that reads a tensor after
    it was written over cannot be run in parts: `divisible` is then False, a UserWarning names the
    operations, and each call runs the whole network.
    """

    def __init__(self, supernet: Supernet, x: Tensor):
        super().__init__(supernet.model, graph=Tracer().trace(supernet.model))
        self.supernet, self.x = supernet, x
        self.last: dict[str, Bits] = {}
        self.state: list[tuple] = []
        self.kept: list[Tensor] = []  # so that no other tensor takes the place in memory
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
        order = {node: i for i, node in enumerate(self.graph.nodes)}
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
        self.refresh()
        return self.run_changes(config) if self.divisible else self.supernet(self.x, config)

    def refresh(self) -> None:
        """Drops all outputs if the images or what the network computes with have changed."""
        statistics = [b for norm in batch_norms(self.supernet) for b in norm.buffers()]
        tensors = [self.x, *network_tensors(self.supernet), *statistics]
        state = [(t.data_ptr(), t.dtype, t.shape, *_versions(t)) for t in tensors]
        if state != self.state:
            self.env, self.last = {}, {}
            self.state, self.kept = state, [t.detach() for t in tensors]

    def run_changes(self, config: BitConfig) -> Tensor:
        """Runs the operations that a change since the last call affects; returns the logits."""
        self.supernet.set_bits(config)
        self.args_iter = iter([self.x])
        layers = self.supernet.layers
        # Set again at the end: after an interruption, outputs are of two configurations.
        last, self.last = self.last, {}
        changed = {layers[name] for name in config if config[name] != last.get(name)}
        stale: set[fx.Node] = set()
        for node in self.graph.nodes:
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


def network_tensors(supernet: Supernet) -> Iterator[Tensor]:
    """Yields the tensors that the network computes with, except statistics of batch norms.

    The present bits, which every pass writes over, are no such tensors.
    """
    yield from supernet.parameters()
    for module in supernet.modules():
        if not isinstance(module, (QuantLinear, _BatchNorm)):
            yield from module.buffers(recurse=False)


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all values, in their own types."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy())
    return digest.hexdigest()[:16]


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


class BatchLogits:
    """Logits (N, classes) of one batch of images `x` (N, C, H, W), configuration by configuration.

    Batch norms use the statistics of the batch itself, so that no configuration needs recalibration
    (as in RFQuant's release, arXiv 2401.01543). Logits are in float32, or in float64 if the network
    computes in it. Puts the supernet into eval mode. Passes run in eval mode in any case; a
    supernet in another mode returns to it. Raises ValueError for another model, and if `x` holds no
    image.
    """

    def __init__(self, supernet: Supernet, x: Tensor):
        check_supernet("supernet", supernet)
        if not isinstance(x, Tensor) or not len(x):
            raise ValueError("x holds no images: a tensor (N, C, H, W) is needed")
        self.supernet, self.x = supernet, x
        self.passes, self.norms = Incremental(supernet.eval(), x), batch_norms(supernet)

    @property
    def state(self) -> object:
        """Another object after weights or images have changed, from the next pass on."""
        return self.passes.state

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Within the block, the supernet is in eval mode; its batch norms use the batch."""
        training = any(module.training for module in self.supernet.modules())
        with eval_mode(self.supernet) if training else nullcontext(), batch_statistics(self.norms):
            yield

    def __call__(self, config: BitConfig) -> Tensor:
        self.supernet.check(config)
        with self.mode():
            return in_float32(self.passes(config))


def batch_error(supernet: Supernet, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Error:
    """Returns the error that a search minimises: the loss on one batch of the search split.

    `x`: images (N, C, H, W). `y`: labels (N). `loss`: of logits (N, classes) and labels; the
    default is cross-entropy in nats. Without labels, use `kl_error`. Modes, batch norms and types
    are as in `BatchLogits`. Outputs of layers are kept between calls, until weights, step sizes or
    images change (see `Incremental`). Raises ValueError if there is no image, or not one label for
    each image; with the default loss, the error does so for unfit labels.
    """
    check_supernet("supernet", supernet)
    if not 0 < len(x) == len(y):
        raise ValueError(f"x holds {len(x)} images and y {len(y)} labels: one label for each image")
    logits = BatchLogits(supernet, x)

    @torch.inference_mode()
    def error(config: BitConfig) -> float:
        outputs = logits(config)
        if loss is F.cross_entropy:
            check_labels(outputs, y)
        return float(loss(outputs, y))

    error.images = logits.x
    return error


def reference_error(logits: BatchLogits, reference: Callable[[], Tensor], loss: Loss) -> Error:
    """Returns the error "loss of the logits and of those of a reference", without labels.

    `reference`: computes logits (N, classes) of the same images; it does so again after weights or
    images have changed.
    """
    state, target = None, None

    @torch.inference_mode()
    def error(config: BitConfig) -> float:
        nonlocal state, target
        outputs = logits(config)
        if state is not logits.state:
            state, target = logits.state, reference()
        return float(loss(outputs, target))

    error.images = logits.x
    return error


def kl_divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images of KL(softmax(target) || softmax(logits)) in nats, a scalar.

    `logits`, `target`: (N, classes). Raises ValueError for other outputs.
    """
    check_logits(logits)
    log_p, log_q = target.log_softmax(1), logits.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def kl_error(supernet: Supernet, x: Tensor, reference: str = "largest") -> Error:
    """Returns an error without labels: the mean KL divergence from a reference, in nats.

    `x`: images (N, C, H, W) without labels. `reference`: whose class probabilities a configuration
    is compared with. "largest" is the supernet at its largest bits, for a trained one, with the
    statistics of the batch. "float" is the float network in eval mode, with its running statistics,
    for a supernet without training. Configurations run as in `batch_error`. The reference is
    computed again after weights, step sizes or images have changed. Raises ValueError for a value
    that is not allowed and, as `check_statistics` does, if float mode has no statistics of its own;
    the error does so for outputs that are no logits.
    """
    if reference not in REFERENCES:
        raise ValueError(f"reference={reference!r} is not allowed: one of {REFERENCES}")
    logits = BatchLogits(supernet, x)

    def run_float() -> Tensor:
        check_statistics(supernet, None)
        with eval_mode(supernet):
            return in_float32(supernet(x))

    def run_largest() -> Tensor:
        return logits(largest(supernet.candidates))

    if reference == "float":
        check_statistics(supernet, None)
        return reference_error(logits, run_float, kl_divergence)
    return reference_error(logits, run_largest, kl_divergence)
