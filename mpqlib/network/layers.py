"""Layers that run at any candidate bit-width, or in float."""

import copy
from collections.abc import Callable

from torch import Tensor, nn
from torch.func import functional_call

from .bits import Bits, Candidates
from .quantizer import Quantizer, nested_step


class QuantLinear(nn.Module):
    """A linear layer with a weight and an activation quantizer; `bits = None` runs it in float.

    `op`: the float layer, unchanged. `example`: values that it reads; they set the initial steps
    and the sign of the activations. `float_input`: do not quantize the input (first layers read the
    image). `weight_step`: rule for the initial steps of the weights. `scale_step_gradient`: as in
    `Quantizer`. The arithmetic is the float layer's own forward, so subclasses keep their
    behaviour. Attributes of the float layer, such as `weight` or `in_features`, can be read here,
    too.
    """

    def __init__(
        self,
        op: nn.Module,
        example: Tensor,
        candidates: Candidates,
        float_input: bool = False,
        weight_step: Callable[[Tensor, int, bool], Tensor] = nested_step,
        scale_step_gradient: bool = False,
    ):
        super().__init__()
        self.op = op
        scaled = dict(scale_step_gradient=scale_step_gradient)
        self.weight_quantizer = Quantizer(candidates.weight, op.weight, True, weight_step, **scaled)
        self.act_quantizer = None if float_input else Quantizer(candidates.act, example, **scaled)
        self.bits: Bits | None = None

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear and nn.Conv2d
        if self.bits is None:
            return self.op(input)
        weight = self.weight_quantizer(self.op.weight, self.bits.weight)
        if self.act_quantizer is not None:
            input = self.act_quantizer(input, self.bits.act)
        return functional_call(self.op, {"weight": weight}, (input,))

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A copy under construction has no `op` yet.
            if name == "op" or name.startswith("_"):
                raise
            return getattr(self.op, name)


class QuantConvBN(QuantLinear):
    """A convolution, its two quantizers and its bank of batch norms.

    `norm`: the batch norm that follows in the float model, or None. Float mode uses it. The bank
    holds a copy of it per (weight bits, activation bits) pair, because every pair has statistics of
    its own (RFQuant, arXiv 2401.01543); with `pair_norms=False` all pairs share one copy.
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
        pairs = [Bits(w, a) for w in candidates.weight for a in candidates.act]
        keys = {self.norm_key(pair) for pair in pairs} if norm is not None else ()
        self.bank = nn.ModuleDict({key: copy.deepcopy(norm) for key in sorted(keys)})

    def norm_key(self, bits: Bits) -> str:
        """Name in the bank of the batch norm for `bits`."""
        return f"w{bits.weight}a{bits.act}" if self.pair_norms else "shared"

    def norm_at(self, bits: Bits | None) -> nn.Module:
        """The batch norm for `bits`, or for float mode if `bits` is None."""
        return self.norm if bits is None or not self.bank else self.bank[self.norm_key(bits)]

    def forward(self, input: Tensor) -> Tensor:
        return self.norm_at(self.bits)(super().forward(input))
