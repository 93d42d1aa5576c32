"""Any CNN of convolutions, linears and batch norms as a weight-sharing supernet."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize, prune

from .bits import BitConfig, Candidates, check_bits, check_config, check_overrides, smallest
from .compilation import can_compile
from .layers import QuantConvBN, QuantLinear, check_pairs
from .observation import Observation, check_quantized, observe
from .quantizer import GRANULARITIES, INITIAL_STEPS, Quantizer
from .tracing import LAYERS, Structure, trace


@dataclass(frozen=True)
class LayerInfo:
    """One row of the layer table: what the cost model and the plots need to know of a layer."""

    name: str
    macs: int  # multiply-accumulates per image, over all calls
    weights: int  # number of weights
    depthwise: bool
    candidates: Candidates
    tied_to: str | None = None  # an earlier layer with the same weights and weight quantizer
    input_of: str | None = None  # an earlier layer with the same input and activation quantizer


def tied_inputs(table: Iterable[LayerInfo]) -> list[tuple[str, ...]]:
    """Groups of layers that share their activation bits, because they read the same tensor."""
    groups: dict[str, list[str]] = {}
    for info in table:
        if info.input_of:
            groups.setdefault(info.input_of, [info.input_of]).append(info.name)
    return [tuple(group) for group in groups.values()]


def tie(config: BitConfig, table: Iterable[LayerInfo]) -> BitConfig:
    """`config` in which each group of `tied_inputs` has the activation bits of its first layer."""
    for first, *others in tied_inputs(table):
        for name in others:
            config = config.replace(name, config[name]._replace(act=config[first].act))
    return config


@dataclass(frozen=True)
class FloatPart:
    """A part of the network that always computes in float: not in the layer table."""

    name: str  # module and operations, such as "encoder.attn (addmm, bmm)"
    macs: int  # multiply-accumulates per image
    share: float  # of all MACs of the network


def _check_float_model(model: nn.Module) -> None:
    """Raises ValueError, with the layer's name, if `model` is not a plain float network.

    A reparametrised weight is computed anew in each pass, so a quantized one would be overwritten.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{name or 'the model'!r} was compiled by torch.compile: pass the network that was "
                "compiled, its attribute _orig_mod; training compiles the supernet itself"
            )
        if isinstance(module, (QuantLinear, Quantizer)):
            raise ValueError(f"the model already holds quantized layers ({name!r}): build it anew")
        if isinstance(module, _InstanceNorm) and module.running_mean is not None:
            raise ValueError(
                f"{name!r} ({type(module).__name__}) keeps running statistics, which all bit-widths"
                " would share. Build it with track_running_stats=False"
            )
        if isinstance(module, LAYERS):
            check_plain_weight(name, module)


def check_plain_weight(name: str, layer: nn.Module) -> None:
    """Raises ValueError, with a remedy, if the weight of the layer `name` is no plain parameter."""
    if layer._parameters.get("weight") is not None:
        return
    if parametrize.is_parametrized(layer, "weight"):
        remedy = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    elif prune.is_pruned(layer):
        remedy = "torch.nn.utils.prune.remove(layer, 'weight')"
    elif hasattr(layer, "weight_g"):
        remedy = "torch.nn.utils.remove_weight_norm(layer)"
    elif hasattr(layer, "weight_u"):
        remedy = "torch.nn.utils.remove_spectral_norm(layer)"
    else:
        remedy = "layer.weight = torch.nn.Parameter(...)"
    raise ValueError(
        f"the weight of layer {name!r} is not a plain parameter but computed in each pass, "
        f"which would overwrite the quantized weight. Call first: {remedy}"
    )


def _check_parameters(name: str, layer: QuantLinear) -> None:
    """Raises ValueError if the layer or its norm computes a parameter in each pass."""
    check_plain_weight(f"{name}.op", layer.op)
    bank = layer.bank if isinstance(layer, QuantConvBN) else None
    if bank is not None and bank._parameters.keys() != layer.norm._parameters.keys():
        raise ValueError(
            f"the norm of layer {name!r} has other parameters than those of its bit-widths: "
            f"remove pruning or a parametrization from {name + '.norm'!r} or {name + '.bank'!r}"
        )


def _check_example(model: nn.Module, example: Tensor) -> None:
    """Raises ValueError unless `example` holds one or more images in the type of the weights.

    Also within torch.autocast, which computes in another type.
    """
    if not isinstance(example, Tensor):
        raise ValueError(f"example is a {type(example).__name__}: pass a tensor (N, C, H, W)")
    if not example.numel():
        raise ValueError(f"example of shape {tuple(example.shape)} is empty: pass some images")
    types = {p.dtype for p in model.parameters()}
    if types and example.dtype not in types:
        wanted = " or ".join(sorted(map(str, types)))
        raise ValueError(f"example is {example.dtype}, but the model computes in {wanted}")
    if torch.is_autocast_enabled(example.device.type):
        raise ValueError("torch.autocast is on, so layers read rounded values: convert outside it")


def _is_depthwise(op: nn.Module) -> bool:
    """Whether each filter reads a single one of several input channels (nn.Conv2d's definition)."""
    return isinstance(op, nn.Conv2d) and op.groups == op.in_channels > 1


class _Replacement:
    """Replaces modules within `model` under all their names, and can undo it."""

    def __init__(self, model: nn.Module):
        self.model, self.replaced = model, []
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        for name in self.names[old]:
            self.model.set_submodule(name, new)
            self.replaced.append((name, old))

    def undo(self) -> None:
        for name, old in self.replaced:
            self.model.set_submodule(name, old)


class Supernet(nn.Module):
    """A float CNN turned into one network that runs at every bit-width with shared weights.

    `model`: any CNN of Conv2d, Linear and batch norms that torch.fx can trace; it is changed in
    place. `example`: calibration images (N, C, H, W). They set the initial steps, the activations'
    signs and the layer table. `bits`: candidates of ordinary layers; depth-wise convolutions drop
    those below `depthwise_min`. `edge_bits`: width of the first layers (their input stays float)
    and of the last ones, or None to treat them as ordinary layers. `overrides`: candidates of
    layers by name. `tie_inputs`: layers that read the same tensor, such as the first convolution of
    a residual block and its shortcut, share one activation quantizer and its bits; RFQuant's
    release does not tie them. `pair_norms`: a batch norm per bit-width pair, or one for all.
    `weight_steps`: initial steps of the weights, "nested" (RFQuant's release: all grids end at the
    same value) or "lsq" (LSQ's own, larger at few bits). `granularity`: one step for all weights
    of a layer ("tensor", as in RFQuant), or one for each output "channel". `scale_step_gradient`:
    scale the gradients of the steps as LSQ does; RFQuant's release does not. Initial steps of
    activations come from the float network; RFQuant's release takes them from its first quantized
    batch.

    Attributes: `table` describes the quantized layers, `float_parts` everything else that computes:
    other kinds of layers, and functions that the model calls itself, such as attention. Float parts
    count neither in BitOPs nor in model size; a UserWarning names them and their share of the MACs.

    Raises ValueError, and leaves the model unchanged, for bits or steps that are not allowed, an
    unknown layer name in `overrides`, an `example` that is no batch of images, and a model that
    torch.fx cannot trace, that already holds quantized layers, that was compiled, that returns no
    tensor, or in which a layer cannot be quantized or counted; and within torch.autocast. Source:
    RFQuant (arXiv 2401.01543).
    """

    @torch.inference_mode(False)  # parameters made in inference mode could not be trained
    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        bits: Iterable[int] = (2, 3, 4, 5, 6),
        *,
        depthwise_min: int = 3,
        edge_bits: int | None = 8,
        overrides: Mapping[str, Candidates] | None = None,
        tie_inputs: bool = False,
        pair_norms: bool = True,
        weight_steps: str = "nested",
        granularity: str = "tensor",
        scale_step_gradient: bool = False,
    ):
        super().__init__()
        can_compile(example.device.type if isinstance(example, Tensor) else "cpu")  # warns early
        bits = check_bits("bits", bits)
        edge = None if edge_bits is None else check_bits("edge_bits", (edge_bits,))
        (depthwise_min,) = check_bits("depthwise_min", (depthwise_min,))
        overrides = check_overrides(overrides or {})
        if weight_steps not in INITIAL_STEPS:
            raise ValueError(f"weight_steps={weight_steps!r} is not allowed: 'nested' or 'lsq'")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r} is not allowed: one of {GRANULARITIES}")
        self.granularity, self.scale_step_gradient = granularity, scale_step_gradient
        steps = dict(
            weight_step=INITIAL_STEPS[weight_steps],
            scale_step_gradient=scale_step_gradient,
            per_channel=granularity == "channel",
        )
        _check_float_model(model)
        structure = trace(model)
        _check_example(model, example)
        if unknown := set(overrides) - set(structure.norms):
            raise ValueError(
                f"overrides name layers that the network does not have: {sorted(unknown)}; it has "
                f"{list(structure.norms)}"
            )
        self.first = sorted(structure.first) if edge else []
        self.last = sorted(structure.last) if edge else []
        self.input_shape = tuple(example.shape[1:])  # (C, H, W)

        def candidates(name: str) -> Candidates:
            own = bits
            if _is_depthwise(model.get_submodule(name)):
                own = tuple(b for b in bits if b >= depthwise_min) or bits[-1:]
            if name in self.first + self.last:
                own = edge
            return overrides.get(name, Candidates(own, own))

        seen, rest = observe(model, example, structure.norms)
        self.table = _layer_table(model, {n: candidates(n) for n in seen}, seen, len(example))
        if tie_inputs:
            self.table = _tie_inputs(self.table, structure, seen, untied=self.first)
        counted = sum(info.macs for info in self.table)
        self.float_parts = list_float_parts(rest, counted, len(example))
        # Nothing has changed the model so far.
        self.model = model
        replacement = _Replacement(model)
        try:
            self._replace_layers(replacement, structure, seen, pair_norms, steps)
            self.set_bits(smallest(self.candidates))
            check_quantized(model, example, self.layers, seen)
        except BaseException:
            replacement.undo()
            raise
        self.set_bits(None)
        self.train(model.training)
        if self.float_parts:
            warn_about_float_parts(self.float_parts)

    def _replace_layers(
        self,
        replacement: _Replacement,
        structure: Structure,
        seen: Mapping[str, Observation],
        pair_norms: bool,
        steps: Mapping,
    ) -> None:
        """Puts quantized layers in the place of the model's layers and their batch norms."""
        made: dict[str, QuantLinear] = {}
        for info in self.table:
            op, norm = self.model.get_submodule(info.name), structure.norms[info.name]
            common = (op, seen[info.name].values, info.candidates, info.name in self.first)
            if isinstance(op, nn.Linear):
                layer = QuantLinear(*common, **steps)
            else:
                norm_module = self.model.get_submodule(norm) if norm else None
                layer = QuantConvBN(*common, norm=norm_module, pair_norms=pair_norms, **steps)
            if info.tied_to:
                layer.weight_quantizer = made[info.tied_to].weight_quantizer
            if info.input_of:
                layer.act_quantizer = made[info.input_of].act_quantizer
            made[info.name] = layer
            replacement.replace(op, layer)
            if norm:
                replacement.replace(norm_module, nn.Identity())

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
        """Every layer at `bits`, or at its nearest candidate if it lacks them."""

        def nearest(choices: tuple[int, ...]) -> int:
            return min(choices, key=lambda b: (abs(b - bits), b))

        return BitConfig.of(
            {n: (nearest(c.weight), nearest(c.act)) for n, c in self.candidates.items()}
        )

    def check(self, config: BitConfig) -> None:
        """Raises ValueError if `config` misses a layer, names an unknown one or has unfit bits.

        Also if pruning or a parametrization, put on a layer since, would replace its quantized
        weights or the norms of its bit-widths.
        """
        check_config("config", config, self.candidates)
        for name, layer in self.layers.items():
            _check_parameters(name, layer)
        for info in self.table:
            if info.input_of and config[info.name].act != config[info.input_of].act:
                raise ValueError(
                    f"config: {info.name!r} reads activations of {config[info.name].act} bits, but "
                    f"{info.input_of!r} reads the same tensor at {config[info.input_of].act} bits: "
                    "tie(config, supernet.table) gives both the bits of the first"
                )

    def set_bits(self, config: BitConfig | None) -> None:
        """Sets every layer to its bits in `config`, or to float if it is None."""
        if config is not None:
            self.check(config)
        for name, layer in self.layers.items():
            layer.set_bits(config and config[name])

    def forward(self, x: Tensor, config: BitConfig | None = None) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) at `config`, or in float if it is None."""
        self.set_bits(config)
        return self.model(x.clone())  # a network may normalise its images in place

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for module in self.modules():  # all of them, before anything is changed
            if isinstance(module, Quantizer):
                module.check_cast(fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        for name, layer in self.layers.items():  # all of them, before anything is changed
            check_pairs(layer, state_dict, f"{prefix}model.{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_supernet(name: str, model: nn.Module) -> None:
    """Raises ValueError if `model`, which error messages call `name`, is not a Supernet."""
    if not isinstance(model, Supernet):
        raise ValueError(f"{name} is a {type(model).__name__}: a Supernet is needed")


def check_steps(supernet: Supernet) -> None:
    """Raises ValueError, with the layer's name, if a step size is 0 or not finite.

    Values divided by such a step are not numbers.
    """
    for name, layer in supernet.layers.items():
        for part, quantizer in layer.named_children():
            if not isinstance(quantizer, Quantizer):
                continue
            for bits, steps in zip(quantizer.bits, quantizer.steps, strict=True):
                for step in steps.flatten().tolist():
                    if step == 0 or not isfinite(step):
                        raise ValueError(f"the step size of {name}.{part} at {bits} bits is {step}")


def _per_image(macs: int, images: int) -> int:
    return -(-macs // images)  # rounded up: a layer that does not read the images runs once a batch


def _layer_table(
    model: nn.Module,
    candidates: Mapping[str, Candidates],
    seen: Mapping[str, Observation],
    images: int,
) -> list[LayerInfo]:
    """The layer table of `model`; layers that share a Parameter and its candidates are tied."""
    table, owners = [], {}
    for name, own in candidates.items():
        op = model.get_submodule(name)
        owner = owners.setdefault((id(op.weight), own.weight), name)
        tied_to = None if owner == name else owner
        macs, weights = _per_image(seen[name].macs, images), op.weight.numel()
        table.append(LayerInfo(name, macs, weights, _is_depthwise(op), own, tied_to))
    return table


def _tie_inputs(
    table: Iterable[LayerInfo],
    structure: Structure,
    seen: Mapping[str, Observation],
    untied: Iterable[str],
) -> list[LayerInfo]:
    """The table with `input_of` set where layers read the same tensor and have its candidates.

    Values are compared, too, because an operation between two layers may write over the tensor.
    """
    first: dict[tuple, str] = {}
    tied = []
    for info in table:
        values, key = seen[info.name].values, (structure.inputs[info.name], info.candidates.act)
        owner = first.setdefault(key, info.name)
        same = owner != info.name and torch.equal(values, seen[owner].values)
        free = not {info.name, owner} & set(untied)
        tied.append(replace(info, input_of=owner) if same and free else info)
    return tied


def list_float_parts(rest: Mapping[str, int], counted: int, images: int) -> list[FloatPart]:
    """Float parts, the largest first.

    `rest`: their MACs over all `images`, from `observe`. `counted`: MACs of all other layers, per
    image.
    """
    macs = {name: _per_image(count, images) for name, count in rest.items()}
    total = sum(macs.values()) + counted
    parts = [FloatPart(name, count, count / total) for name, count in macs.items()]
    return sorted(parts, key=lambda part: -part.macs)


def warn_about_float_parts(parts: list[FloatPart], named: int = 5) -> None:
    """Warns of float parts: the first `named` of them by name, all with their share of the MACs."""
    listed = ", ".join(f"{part.name} {part.share:.1%}" for part in parts[:named])
    more = f" and {len(parts) - named} more (see float_parts)" if len(parts) > named else ""
    warnings.warn(
        f"{sum(part.share for part in parts):.1%} of the MACs stay in float and count neither in "
        f"BitOPs nor in model size: {listed}{more}",
        stacklevel=3,
    )
