"""Quantizers: LSQ, with one learned step per bit-width, and weights of two or three values."""

from collections.abc import Callable, Iterable
from functools import partial
from math import log2

import torch
from torch import Tensor, nn

from .compilation import one_pass

GRANULARITIES = ("tensor", "channel")  # one range for all weights, or one per output channel

# Bits of weights of two or three values. A byte holds five of three values: 3^5 = 243 <= 256.
BINARY, TERNARY = 1, 8 / 5


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer of the `bits`-bit grid (LSQ, arXiv 1902.08153, section 2).

    Raises ValueError unless `bits` is a whole number from 2 to 16.
    """
    if bits not in range(2, 17):
        raise ValueError(f"bits={bits!r} is not allowed: a whole number from 2 to 16")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def most_bits(dtype: torch.dtype) -> int:
    """Bits of whole numbers that a floating-point type holds exactly: 8 of bfloat16, 24 of float32.

    These are the digits of its numbers.
    """
    return round(1 - log2(torch.finfo(dtype).eps))


def in_memory_order(first: Tensor, *others: Tensor, rows: int = 1) -> list[Tensor]:
    """Tensors of one shape as matrices (rows, values), in the memory order of the first tensor.

    They are views where the order does not have to change.
    """
    tensors = first, *others
    if _is_channels_last(first):
        tensors = tuple(x.permute(0, 2, 3, 1) for x in tensors)  # NCHW -> NHWC
    return [x.reshape(rows, -1) for x in tensors]


def shaped_like(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix of `in_memory_order(x)`, as a view in the shape of `x`."""
    if _is_channels_last(x):
        return matrix.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)  # NHWC -> NCHW
    return matrix.view(x.shape)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def quantize(x: Tensor, step: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    """x_hat = s * round(clip(x / s, q_min, q_max)) of rows x (R, N), with a step (R, 1) for each.

    Computes in the type of the step, at least in float32, so that programs which round between
    operations and those which do not agree. Returns the type of x. Source: LSQ, equations 1 and 2.
    """
    step = step.to(torch.promote_types(step.dtype, torch.float32))
    v = x.to(step.dtype) / step
    return (v.clamp(q_min, q_max).round() * step).to(x.dtype)


def gradients(
    x: Tensor, grad: Tensor, step: Tensor, q_min: Tensor, q_max: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (R, N) and step (R, 1) from the gradient of x_hat in `quantize`.

    Clipping is judged on v = x / s before rounding (LSQ, equations 3 and 5):
        dx_hat/dx = 1 where q_min < v < q_max, else 0
        dx_hat/ds = round(v) - v inside, q_min or q_max outside
    """
    exact = torch.promote_types(step.dtype, torch.float32)
    v = x.to(exact) / step.to(exact)
    inside = (q_min < v) & (v < q_max)
    grad_x = torch.where(inside, grad, 0)
    change = v.clamp(q_min, q_max).round() - torch.where(inside, v, 0)
    return grad_x, (grad.to(exact) * change).sum(1, keepdim=True).to(step.dtype)


class LSQ(torch.autograd.Function):
    """`quantize` with LSQ's gradients (arXiv 1902.08153), each in one pass over memory."""

    @staticmethod
    def forward(
        ctx, x: Tensor, step: Tensor, q_min: Tensor, q_max: Tensor, scale_step_gradient: bool
    ) -> Tensor:
        ctx.save_for_backward(x, step, q_min, q_max)
        ctx.scale_step_gradient = scale_step_gradient
        # Detached, because torch.compile would look at the history of what a view is of.
        (rows,) = in_memory_order(x.detach(), rows=step.numel())
        steps = step.detach().reshape(-1, 1)
        return shaped_like(one_pass(quantize, x.device.type)(rows, steps, q_min, q_max), x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, step, q_min, q_max = ctx.saved_tensors
        compute = gradients  # a second derivative (create_graph=True) needs its single operations
        if not torch.is_grad_enabled():
            compute = one_pass(gradients, x.device.type)
            x, grad, step = x.detach(), grad.detach(), step.detach()
        rows, steps = in_memory_order(x, grad, rows=step.numel()), step.reshape(-1, 1)
        grad_x, grad_step = compute(*rows, steps, q_min, q_max)
        if ctx.scale_step_gradient:
            grad_step = grad_step / (rows[0].shape[1] * q_max).sqrt()
        return shaped_like(grad_x, x), grad_step.reshape(step.shape), None, None, None


def lsq(
    x: Tensor, step: Tensor, q_min: Tensor, q_max: Tensor, scale_step_gradient: bool = False
) -> Tensor:
    """Fake-quantizes `x` (any shape) to integers from `q_min` to `q_max`, scalars, times `step`.

    Same shape (LSQ, equations 1-3). `step`: a scalar, or for weights (out, ...) one for each output
    channel, in any shape. With `scale_step_gradient` the gradient of a step is divided by
    sqrt(n * q_max), LSQ's g, where n is the number of values that the step quantizes.
    """
    return LSQ.apply(x, step, q_min, q_max, scale_step_gradient)


def _positive(step: Tensor) -> Tensor:
    # A tensor of zeros (a pruned layer, a dead input) has no scale: any positive step is exact.
    return torch.where(step > 0, step, torch.ones_like(step))


def lsq_step(x: Tensor, bits: int, signed: bool) -> Tensor:
    """LSQ's initial step 2 * mean|x| / sqrt(q_max), a scalar (arXiv 1902.08153, section 2.1)."""
    _, q_max = integer_range(bits, signed)
    return _positive(2 * x.detach().abs().mean() / q_max**0.5)


def nested_step(x: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Initial step of weights x, max(|mean - 3 std|, |mean + 3 std|) / 2^(bits - 1), a scalar.

    The grids of all bit-widths end at the same value, so that each grid is a part of the next finer
    one. Raises ValueError for an unsigned range. Source: RFQuant's release.
    """
    if not signed:
        raise ValueError("signed=False is not allowed: nested steps are for signed weights")
    x = x.detach()
    spread = 3 * x.std(correction=min(1, x.numel() - 1))  # one weight alone has no spread
    return _positive((x.mean().abs() + spread) / 2 ** (bits - 1))


INITIAL_STEPS = {"nested": nested_step, "lsq": lsq_step}


class Quantizer(nn.Module):
    """LSQ quantizer with one learned step per bit-width.

    `bits`: its bit-widths. `example`: a tensor of any shape that sets the initial steps by the rule
    `initial_step`. The range is signed if `example` holds a negative value, unless `signed` is
    given. `scale_step_gradient`: scale the gradients of the steps as LSQ does; RFQuant's release
    does not. `per_channel`: one step for each output channel of weights, and `example` holds these
    weights (out, ...). Raises ValueError if `bits` is empty or holds anything but whole
    numbers from 2 to 16. Source: LSQ (arXiv 1902.08153), with one step per bit-width as in RFQuant
    (arXiv 2401.01543).
    """

    def __init__(
        self,
        bits: Iterable[int],
        example: Tensor,
        signed: bool | None = None,
        initial_step: Callable[[Tensor, int, bool], Tensor] = lsq_step,
        scale_step_gradient: bool = False,
        per_channel: bool = False,
    ):
        super().__init__()
        self.bits = tuple(sorted(set(bits)))
        if not self.bits:
            raise ValueError("bits is empty: name at least one bit-width from 2 to 16")
        self.check_type(example.dtype)
        self.signed = bool(example.min() < 0) if signed is None else signed
        self.scale_step_gradient = scale_step_gradient
        self.per_channel = per_channel
        steps = [self._initial_steps(example, b, initial_step) for b in self.bits]
        self.steps = nn.Parameter(torch.stack(steps))  # (bit-widths) or (bit-widths, out)
        # Of a step that broadcasts to its weights. Steps are not stored so: tensors of 5 dimensions
        # could not be made channels-last.
        self.step_shape = (-1, *(1 for _ in example.shape[1:])) if per_channel else ()
        self.register_buffer("ranges", self._ranges(), persistent=False)

    def check_type(self, dtype: torch.dtype) -> None:
        """Raises ValueError if `dtype` cannot hold all whole numbers of the largest bit-width."""
        if self.bits[-1] > most_bits(dtype):
            raise ValueError(
                f"bits={self.bits[-1]} is not allowed for {dtype}: its whole numbers have "
                f"{most_bits(dtype)} bits at most"
            )

    def check_cast(self, change: Callable[[Tensor], Tensor]) -> None:
        """Raises ValueError, as `check_type` does, for the type that `change` gives to tensors."""
        self.check_type(change(self.steps.detach()[:0]).dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.check_cast(fn)  # `fn` may be that of .half()
        return super()._apply(fn, recurse)

    def _initial_steps(self, example: Tensor, bits: int, rule: Callable) -> Tensor:
        """A scalar, or (out,) per channel of weights (out, ...)."""
        if not self.per_channel:
            return rule(example, bits, self.signed)
        return torch.vmap(partial(rule, bits=bits, signed=self.signed))(example.detach())

    def _ranges(self) -> Tensor:
        """Smallest and largest integers (2, bit-widths)."""
        ranges = [integer_range(b, self.signed) for b in self.bits]
        return self.steps.new_tensor(ranges).T

    def position(self, bits: int) -> Tensor:
        """Position of `bits` among the bit-widths, shape (1,); raises ValueError for others."""
        if bits not in self.bits:
            raise ValueError(f"bits={bits!r} is not allowed here: one of {self.bits}")
        return torch.tensor([self.bits.index(bits)], device=self.steps.device)

    def step(self, bits: int) -> Tensor:
        """The positive step size at `bits`, a scalar; (out, 1, ...) if it is per channel.

        Raises ValueError for other bit-widths.
        """
        return self._step(self.position(bits))

    def _step(self, position: Tensor) -> Tensor:
        return self.steps.index_select(0, position).abs().reshape(self.step_shape)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Fake-quantizes `x` (any shape) at the bit-width of this `position`, shape (1,).

        The position is a tensor, so that one compiled program serves all bit-widths.
        """
        step = self._step(position)
        q_min, q_max = self.ranges.index_select(1, position).squeeze(1)
        return lsq(x, step, q_min, q_max, self.scale_step_gradient)

    # The sign of the range belongs to the checkpoint, because it comes from data.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.signed)

    def set_extra_state(self, state: Tensor) -> None:
        self.check_type(self.steps.dtype)  # load_state_dict(..., assign=True) may have changed it
        self.signed = bool(state)
        self.ranges.copy_(self._ranges())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


def _channel_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over each output channel, the first dimension, of the values that are `counted`."""
    others = tuple(range(1, values.dim()))
    total = (values * counted).sum(others, keepdim=True)
    return total / counted.sum(others, keepdim=True).clamp_min(1)


def binarize(w: Tensor) -> Tensor:
    """sign(w) * mean|w| of each output channel of weights (out, ...); the sign of 0 is +1.

    Source: XNOR-Net (arXiv 1603.05279), its binary-weight networks.
    """
    scale = _channel_mean(w.abs(), torch.ones_like(w))
    return torch.where(w < 0, -scale, scale)


def ternarize(w: Tensor) -> Tensor:
    """sign(w) * a where |w| > t, else 0, for each output channel of weights (out, ...).

    t = 0.7 mean|w|, and a is the mean of the |w| above t, both of the channel. Source: ternary
    weight networks (arXiv 1605.04711).
    """
    size = w.abs()
    kept = size > 0.7 * _channel_mean(size, torch.ones_like(w))
    return w.sign() * kept * _channel_mean(size, kept)


FEW_VALUES = {BINARY: binarize, TERNARY: ternarize}


class ScaledQuantizer(nn.Module):
    """Weights of two or three values, scaled in each output channel; no step is learned.

    `bits`: BINARY or TERNARY, the only bit-width that it offers. The gradient goes straight through
    to the weights, as in DoReFa-Net (arXiv 1606.06160, section 2.3). Raises ValueError for other
    bits.
    """

    def __init__(self, bits: float):
        super().__init__()
        if bits not in FEW_VALUES:
            raise ValueError(f"bits={bits!r} is not allowed: one of {list(FEW_VALUES)}")
        self.bits = (bits,)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Quantizes weights (out, ...); `position` is that of its only bit-width."""
        (bits,) = self.bits
        return FEW_VALUES[bits](x.detach()) + (x - x.detach())  # adds 0, with the gradient of x

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def create_weight_quantizer(
    bits: tuple[float, ...],
    weight: Tensor,
    initial_step: Callable[[Tensor, int, bool], Tensor],
    scale_step_gradient: bool,
    per_channel: bool = False,
) -> nn.Module:
    """The quantizer of weights with these candidate bits, checked by `bits.check_weight_bits`."""
    if len(bits) == 1 and bits[0] in FEW_VALUES:
        return ScaledQuantizer(*bits)
    return Quantizer(bits, weight, True, initial_step, scale_step_gradient, per_channel)
