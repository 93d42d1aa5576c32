"""Layers that can run at any candidate bit-width, or in float."""

import copy

from torch import Tensor, nn
from torch.func import functional_call

from .bits import Bits, Candidates
from .quantizer import Quantizer


class QuantLinear(nn.Module):
    """A linear layer with a weight and an activation quantizer; `bits = None` runs it in float.

    `op`: the float layer, kept as it is; `example`: an input it saw, from which the activation
    steps start; `float_input`: leave the input unquantized (the first layer reads the image).
    The float layer's own forward does the arithmetic, so a subclass keeps its behaviour.
    """

    def __init__(
        self, op: nn.Module, example: Tensor, candidates: Candidates, float_input: bool = False
    ):
        super().__init__()
        self.op = op
        self.weight_quantizer = Quantizer(candidates.weight, op.weight, signed=True)
        self.act_quantizer = None if float_input else Quantizer(candidates.act, example)
        self.bits: Bits | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return self.op(x)
        weight = self.weight_quantizer(self.op.weight, self.bits.weight)
        if self.act_quantizer is not None:
            x = self.act_quantizer(x, self.bits.act)
        return functional_call(self.op, {"weight": weight}, (x,))


class QuantConvBN(QuantLinear):
    """A convolution, both its quantizers and its bank of batch norms.

    `norm`: the batch norm that follows in the float model (an identity if there is none), used in
    float mode. The bank holds a copy of it per (weight bits, activation bits) pair, because every
    pair has statistics of its own (RFQuant, arXiv 2401.01543); `pair_norms=False` shares one.
    """

    def __init__(
        self,
        op: nn.Module,
        example: Tensor,
        candidates: Candidates,
        float_input: bool = False,
        norm: nn.Module | None = None,
        pair_norms: bool = True,
    ):
        super().__init__(op, example, candidates, float_input)
        self.norm = norm or nn.Identity()
        self.pair_norms = pair_norms
        pairs = [Bits(w, a) for w in candidates.weight for a in candidates.act]
        keys = {self.norm_key(pair) for pair in pairs} if norm is not None else ()
        self.bank = nn.ModuleDict({key: copy.deepcopy(norm) for key in sorted(keys)})

    def norm_key(self, bits: Bits) -> str:
        """Name of the batch norm that serves `bits` in the bank."""
        return f"w{bits.weight}a{bits.act}" if self.pair_norms else "shared"

    def norm_at(self, bits: Bits | None) -> nn.Module:
        """The norm that serves `bits`, or float mode where `bits` is None."""
        return self.norm if bits is None or not self.bank else self.bank[self.norm_key(bits)]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_at(self.bits)(super().forward(x))
