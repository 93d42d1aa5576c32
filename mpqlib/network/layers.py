"""Layers that run at any candidate bit-width, or in float."""

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .bits import Bits, Candidates
from .quantizer import Quantizer, create_weight_quantizer, nested_step


class QuantLinear(nn.Module):
    """A linear layer with a weight and an activation quantizer; `bits = None` runs it in float.

    `op`: the float layer, unchanged. `example`: values that it reads; they set the initial steps
    and the sign of the activations. `float_input`: do not quantize the input (first layers read the
    image). `weight_step`: rule for the initial steps of the weights. `scale_step_gradient`,
    `per_channel` (of the weights): as in `Quantizer`. The arithmetic is the float layer's own
    forward, so subclasses keep their behaviour. Attributes of the float layer, such as `weight` or
    `in_features`, can be read here, too.
    """

    def __init__(
        self,
        op: nn.Module,
        example: Tensor,
        candidates: Candidates,
        float_input: bool = False,
        weight_step: Callable[[Tensor, int, bool], Tensor] = nested_step,
        scale_step_gradient: bool = False,
        per_channel: bool = False,
    ):
        super().__init__()
        self.op = op
        scaled = dict(scale_step_gradient=scale_step_gradient)
        self.weight_quantizer = create_weight_quantizer(
            candidates.weight, op.weight, weight_step, scale_step_gradient, per_channel
        )
        self.act_quantizer = None if float_input else Quantizer(candidates.act, example, **scaled)
        self.pairs = [Bits(w, a) for w in candidates.weight for a in candidates.act]
        # Positions of a pair's weight bits, of its activation bits and of the pair itself. As data,
        # they let one program compute at every bit-width.
        w, a = len(candidates.weight), len(candidates.act)
        positions = [(i, j, i * a + j) for i in range(w) for j in range(a)]
        positions = torch.tensor(positions, device=op.weight.device)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("position", positions[0].clone(), persistent=False)
        self.bits: Bits | None = None

    def set_bits(self, bits: Bits | None) -> None:
        """Sets the bits of the next passes, one of `pairs`; None is float mode."""
        self.bits = bits
        if bits is not None:
            self.position.copy_(self.positions[self.pairs.index(bits)])

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear and nn.Conv2d
        if self.bits is None:
            return self.op(input)
        weight = self.weight_quantizer(self.op.weight, self.position[0:1])
        if self.act_quantizer is not None:
            input = self.act_quantizer(input, self.position[1:2])
        return functional_call(self.op, {"weight": weight}, (input,))

    # The pairs belong to the checkpoint, because step sizes and norms lie in their order, without
    # names. As float64, because TERNARY is no whole number.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.pairs, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: the pairs were compared before anything was loaded."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        check_pairs(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A copy under construction has no `op` yet.
            if name == "op" or name.startswith("_"):
                raise
            return getattr(self.op, name)


def _listed(pairs: Iterable[tuple[float, float]]) -> str:
    """The bits of weights and of activations in `pairs`, in words."""
    weight = ", ".join(f"{bits:g}" for bits in dict.fromkeys(w for w, _ in pairs))
    act = ", ".join(f"{bits:g}" for bits in dict.fromkeys(a for _, a in pairs))
    return f"{weight} (weights) and {act} (activations)"


def check_pairs(layer: QuantLinear, state: Mapping[str, Tensor], prefix: str) -> None:
    """Raises ValueError if step sizes or norms in `state` belong to other bits than the layer's.

    `prefix`: of the layer's tensors in `state`.
    """
    by_bits = tuple(prefix + part for part in ("weight_quantizer.", "act_quantizer.", "bank."))
    name, stored = prefix.removesuffix("."), state.get(f"{prefix}_extra_state")
    if stored is None and any(name.startswith(by_bits) for name in state):
        raise ValueError(
            f"layer {name!r} is stored without its bit-widths, so its step sizes and norms cannot "
            "be assigned: an earlier version of mpqlib wrote them; use that version"
        )
    if stored is not None and stored.tolist() != layer.get_extra_state().tolist():
        raise ValueError(
            f"layer {name!r} is stored with the bits {_listed(stored.tolist())}, but this "
            f"supernet has {_listed(layer.pairs)}: build it with the stored bits"
        )


def stack_tensors(module: nn.Module, count: int) -> nn.Module:
    """A copy of `module` in which each parameter and buffer is `count` copies of it, stacked."""
    stacked = copy.deepcopy(module)
    for part in stacked.modules():
        for name, p in part.named_parameters(recurse=False):
            rows = p.detach().expand(count, *p.shape).clone()
            setattr(part, name, nn.Parameter(rows, p.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.expand(count, *buffer.shape).clone())
    return stacked


class QuantConvBN(QuantLinear):
    """A convolution, its two quantizers and its bank of batch norms.

    `norm`: the batch norm that follows in the float model, or None. Float mode uses it. The bank
    holds its parameters and statistics once for each (weight bits, activation bits) pair, stacked,
    because every pair has statistics of its own (RFQuant, arXiv 2401.01543); with
    `pair_norms=False` all pairs share one row.
    """

    def __init__(
        self,
        op: nn.Module,
        example: Tensor,
        candidates: Candidates,
        float_input: bool = False,
        *,
        norm: nn.Module | None = None,
        pair_norms: bool = True,
        **steps,
    ):
        super().__init__(op, example, candidates, float_input, **steps)
        self.norm = norm or nn.Identity()
        self.pair_norms = pair_norms
        rows = len(self.pairs) if pair_norms else 1
        self.bank = norm and stack_tensors(norm, rows)
        if not pair_norms:
            self.positions[:, 2] = 0

    def row(self, bits: Bits) -> int:
        """The row of the bank that belongs to `bits`."""
        return int(self.positions[self.pairs.index(bits), 2])

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if self.bits is None or self.bank is None:
            return self.norm(output)
        row = self.position[2:3]
        tensors = dict(self.bank.named_parameters()) | dict(self.bank.named_buffers())
        own = {name: t.index_select(0, row).squeeze(0) for name, t in tensors.items()}
        output = functional_call(self.norm, own, (output,))
        if self.norm.training:  # which has changed the statistics
            for name, statistics in self.bank.named_buffers():
                statistics.index_copy_(0, row, own[name].unsqueeze(0))
        return output
