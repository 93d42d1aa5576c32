"""Any CNN of convolutions, linears and batch norms as a weight-sharing supernet."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .bits import BitConfig, Candidates
from .layers import QuantConvBN, QuantLinear
from .tracing import _observe, _trace


@dataclass(frozen=True)
class LayerInfo:
    """One row of the layer table: what the cost model and the plots need to know of a layer."""

    name: str
    macs: int  # multiply-accumulates per image
    weights: int  # how many
    depthwise: bool
    candidates: Candidates


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
        self.input_shape = tuple(example.shape[1:])  # (C, H, W)
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

    @property
    def searchable(self) -> list[str]:
        """Names of the layers that have more than one weight bit-width to choose from."""
        return [info.name for info in self.table if len(info.candidates.weight) > 1]

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
