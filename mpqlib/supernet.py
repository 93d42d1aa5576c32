"""Any CNN of convolutions, linears and batch norms as a weight-sharing supernet."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import Bits, Candidates, QuantConvBN, QuantLinear


@dataclass(frozen=True)
class BitConfig(Mapping):
    """One bit-width per layer for weights and activations: immutable, hashable, a mapping.

    `layers`: pairs of layer name and Bits, in the network's order.
    """

    layers: tuple[tuple[str, Bits], ...]

    @classmethod
    def of(cls, bits: Mapping[str, tuple[int, int]]) -> "BitConfig":
        """From a mapping of layer name to (weight bits, activation bits)."""
        return cls(tuple((name, Bits(*pair)) for name, pair in bits.items()))

    @classmethod
    def from_json(cls, text: str) -> "BitConfig":
        """From what `to_json` wrote; raises ValueError where it is not name -> [int, int]."""
        if not isinstance(bits := json.loads(text), dict):
            raise ValueError(f"a configuration is name -> [int, int], not {bits!r}")
        for name, pair in bits.items():
            if not (isinstance(pair, list) and [type(b) for b in pair] == [int, int]):
                raise ValueError(f"bits of layer {name!r} are {pair!r}: two whole numbers expected")
        return cls.of(bits)

    def to_json(self) -> str:
        """As JSON: layer name -> [weight bits, activation bits]."""
        return json.dumps(dict(self.layers))

    def replace(self, layer: str, bits: Bits) -> "BitConfig":
        """A copy in which `layer`, one of this configuration's, has other bits."""
        if layer not in self:
            raise ValueError(f"layer={layer!r} is not in this configuration: one of {list(self)}")
        return BitConfig(tuple((n, bits if n == layer else b) for n, b in self.layers))

    def __getitem__(self, layer: str) -> Bits:
        return self._bits[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def _bits(self) -> dict[str, Bits]:
        return dict(self.layers)


@dataclass(frozen=True)
class LayerInfo:
    """One row of the layer table: what the cost model and the plots need to know of a layer."""

    name: str
    macs: int  # multiply-accumulates per image
    weights: int  # how many
    depthwise: bool
    candidates: Candidates


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


class Supernet(nn.Module):
    """A float CNN turned into one network that runs at every bit-width with shared weights.

    `model`: any CNN of Conv2d, Linear and batch norms that torch.fx can trace; it is changed in
    place. `example`: a calibration batch (N, C, H, W) that sets the steps, the activations' signs
    and the layer table. `bits`: candidates of ordinary layers; depth-wise convolutions drop those
    below `depthwise_min`. `edge_bits`: width of the first layers (their input stays float) and of
    the last ones, or None to treat them as ordinary. `overrides`: candidates of layers by name.
    `pair_norms`: a batch norm per bit-width pair, or one for all. Raises ValueError for an
    untraceable model, an unknown layer name, no or unfit bits. Source: RFQuant (arXiv 2401.01543).
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        bits: Iterable[int] = (2, 3, 4, 5, 6),
        *,
        depthwise_min: int = 3,
        edge_bits: int | None = 8,
        overrides: Mapping[str, Candidates] | None = None,
        pair_norms: bool = True,
    ):
        super().__init__()
        bits, overrides = tuple(sorted(set(bits))), dict(overrides or {})
        structure = _trace(model)
        edged = edge_bits is not None
        self.first, self.last = sorted(structure.first) * edged, sorted(structure.last) * edged
        if unknown := set(overrides) - set(structure.norms):
            raise ValueError(f"overrides name no layer: {sorted(unknown)}; {list(structure.norms)}")
        self.model, self.table = model, []
        seen = _observe(model, example, structure.norms)
        for name, norm in structure.norms.items():
            op, (x, positions) = model.get_submodule(name), seen[name]
            depthwise = getattr(op, "groups", 1) == op.weight.shape[0] > 1
            own = tuple(b for b in bits if b >= depthwise_min or not depthwise) or bits[-1:]
            own = (edge_bits,) if name in self.first + self.last else own
            candidates = Candidates(*(tuple(sorted(b)) for b in overrides.get(name, (own, own))))
            if isinstance(op, nn.Linear):
                layer = QuantLinear(op, x, candidates, name in self.first)
            else:
                norm_module = model.get_submodule(norm) if norm else None
                layer = QuantConvBN(op, x, candidates, name in self.first, norm_module, pair_norms)
            model.set_submodule(name, layer)
            if norm:
                model.set_submodule(norm, nn.Identity())
            count = op.weight.numel()
            self.table.append(LayerInfo(name, positions * count, count, depthwise, candidates))
        self.train(model.training)

    @property
    def layers(self) -> dict[str, QuantLinear]:
        """Layer name -> quantizable layer, in the network's order."""
        return {info.name: self.model.get_submodule(info.name) for info in self.table}

    @property
    def candidates(self) -> dict[str, Candidates]:
        """Layer name -> its full candidate set."""
        return {info.name: info.candidates for info in self.table}

    def uniform(self, bits: int) -> BitConfig:
        """Every layer at `bits`, or at its nearest candidate where it lacks them."""

        def nearest(offered: tuple[int, ...]) -> int:
            return min(offered, key=lambda b: (abs(b - bits), b))

        return BitConfig.of(
            {n: (nearest(c.weight), nearest(c.act)) for n, c in self.candidates.items()}
        )

    def check(self, config: BitConfig) -> None:
        """Raises ValueError where `config` misses a layer, names an unknown one or unfit bits."""
        candidates = self.candidates
        if wrong := set(config) ^ set(candidates):
            raise ValueError(f"layers unknown to this supernet, or missing: {sorted(wrong)}")
        for name, (weight, act) in config.items():
            if weight not in candidates[name].weight or act not in candidates[name].act:
                raise ValueError(f"bits {weight}/{act} of {name!r}: allowed {candidates[name]}")

    def set_bits(self, config: BitConfig | None) -> None:
        """Puts every layer at its bits in `config`, or in float without one."""
        if config is not None:
            self.check(config)
        for name, layer in self.layers.items():
            layer.bits = config and config[name]

    def forward(self, x: Tensor, config: BitConfig | None = None) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) at `config`, or in float without one."""
        self.set_bits(config)
        return self.model(x)


def largest(candidates: Mapping[str, Candidates]) -> BitConfig:
    """Every layer at its largest candidate bits."""
    return BitConfig.of({name: (max(c.weight), max(c.act)) for name, c in candidates.items()})


def smallest(candidates: Mapping[str, Candidates]) -> BitConfig:
    """Every layer at its smallest candidate bits."""
    return BitConfig.of({name: (min(c.weight), min(c.act)) for name, c in candidates.items()})


def sample(candidates: Mapping[str, Candidates], generator: torch.Generator) -> BitConfig:
    """Bits drawn per layer uniformly from its candidates (RFQuant, one-shot training)."""

    def draw(offered: tuple[int, ...]) -> int:
        return offered[int(torch.randint(len(offered), (), generator=generator))]

    return BitConfig.of({name: (draw(c.weight), draw(c.act)) for name, c in candidates.items()})
