"""LSQ quantizers: integer ranges, straight-through rounding, one learned step per bit-width."""

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor, nn


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer of the `bits`-bit grid (LSQ, arXiv 1902.08153, section 2).

    Raises ValueError unless `bits` is a whole number from 2 to 16.
    """
    if bits not in range(2, 17):
        raise ValueError(f"bits={bits!r} is not allowed: a whole number from 2 to 16")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def in_memory_order(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of one shape as vectors of `dtype`, in the memory order of the first tensor.

    They are views where neither type nor order has to change.
    """
    first = tensors[0]
    if first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last):
        tensors = tuple(x.permute(0, 2, 3, 1) for x in tensors)  # NCHW -> NHWC
    return [x.reshape(-1).to(dtype) for x in tensors]


def shaped_like(vector: Tensor, x: Tensor) -> Tensor:
    """A vector in the memory order of `x`, as a view in the shape of `x`."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return vector.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)  # NHWC -> NCHW
    return vector.view(x.shape)


def quantize(x: Tensor, step: Tensor, q_min: int, q_max: int) -> Tensor:
    """x_hat = s * round(clip(x / s, q_min, q_max)) of a vector x (LSQ, equations 1 and 2)."""
    return (x / step).clamp_(q_min, q_max).round_().mul_(step)


def gradients(
    x: Tensor, x_hat: Tensor, grad: Tensor, step: Tensor, q_min: int, q_max: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x (a vector) and step (a scalar) from the gradient of x_hat in `quantize`.

    Clipping is judged on v = x / s before rounding (LSQ, equations 3 and 5):
        dx_hat/dx = 1 where q_min < v < q_max, else 0
        dx_hat/ds = round(v) - v inside, q_min or q_max outside
    Both cases of the second line equal x_hat / s - v * dx_hat/dx, which needs no second mask.
    """
    # hardtanh's gradient is the indicator of the open interval (q_min, q_max), in one pass.
    grad_x = torch.ops.aten.hardtanh_backward(grad, x / step, q_min, q_max)
    return grad_x, (torch.dot(grad, x_hat) - torch.dot(grad_x, x)) / step


@cache
def arithmetic(compile: bool) -> tuple[Callable, Callable]:
    """`quantize` and `gradients`, plain or compiled; compiled, each passes over memory once."""
    pair = quantize, gradients
    return tuple(torch.compile(f, dynamic=True) for f in pair) if compile else pair


class LSQ(torch.autograd.Function):
    """`quantize` with LSQ's gradients (arXiv 1902.08153)."""

    @staticmethod
    def forward(ctx, x, step, q_min: int, q_max: int, gradient_scale: float, compile: bool):
        quantize, ctx.gradients = arithmetic(compile)
        # Vectors, so that one compiled function serves tensors of every shape. In the type of the
        # step, because its gradient is a small difference of large sums: bfloat16 would lose it.
        vectors = in_memory_order(x.detach(), dtype=step.dtype)
        x_hat = shaped_like(quantize(*vectors, step.detach(), q_min, q_max), x)
        # The layers around keep both anyway, so saving them costs no memory. v is recomputed.
        ctx.save_for_backward(x, x_hat, step)
        ctx.range, ctx.gradient_scale = (q_min, q_max), gradient_scale
        return x_hat

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, x_hat, step = (saved.detach() for saved in ctx.saved_tensors)
        vectors = in_memory_order(x, x_hat, grad, dtype=step.dtype)
        grad_x, grad_step = ctx.gradients(*vectors, step, *ctx.range)
        return shaped_like(grad_x, x), grad_step * ctx.gradient_scale, None, None, None, None


def lsq(
    x: Tensor,
    step: Tensor,
    bits: int,
    signed: bool,
    scale_step_gradient: bool = False,
    compile: bool = False,
) -> Tensor:
    """Fake-quantizes `x` (any shape) with a scalar `step`; same shape (LSQ, equations 1-3).

    With `scale_step_gradient` the gradient of the step is divided by sqrt(numel * q_max), LSQ's g.
    `compile`: run by torch.compile, see `compile_quantizers`.
    """
    q_min, q_max = integer_range(bits, signed)
    scale = (x.numel() * q_max) ** -0.5 if scale_step_gradient else 1.0
    return LSQ.apply(x, step, q_min, q_max, scale, compile)


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
    does not. Raises ValueError if `bits` is empty or holds anything but whole numbers from 2 to 16.
    Source: LSQ (arXiv 1902.08153), with one step per bit-width as in RFQuant (arXiv 2401.01543).
    """

    def __init__(
        self,
        bits: Iterable[int],
        example: Tensor,
        signed: bool | None = None,
        initial_step: Callable[[Tensor, int, bool], Tensor] = lsq_step,
        scale_step_gradient: bool = False,
    ):
        super().__init__()
        self.bits = tuple(sorted(set(bits)))
        if not self.bits:
            raise ValueError("bits is empty: name at least one bit-width from 2 to 16")
        self.signed = bool(example.min() < 0) if signed is None else signed
        self.scale_step_gradient = scale_step_gradient
        self.compiled = False
        self.steps = nn.ParameterDict(
            {str(b): nn.Parameter(initial_step(example, b, self.signed)) for b in self.bits}
        )

    def step(self, bits: int) -> Tensor:
        """The positive step size at `bits`, a scalar; raises ValueError for other bit-widths."""
        if bits not in self.bits:
            raise ValueError(f"bits={bits!r} is not allowed here: one of {self.bits}")
        return self.steps[str(bits)].abs()

    def forward(self, x: Tensor, bits: int) -> Tensor:
        return lsq(x, self.step(bits), bits, self.signed, self.scale_step_gradient, self.compiled)

    # The sign of the range belongs to the checkpoint, because it comes from data.
    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.signed)

    def set_extra_state(self, state: Tensor) -> None:
        self.signed = bool(state)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


def compile_quantizers(model: nn.Module) -> None:
    """Makes all quantizers of `model` run by torch.compile, at every bit-width.

    Speed is limited by memory, and compiled code passes over memory once: the same values in about
    half the time, after some seconds of compiling. On a CPU this needs a C++ compiler.
    """
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.compiled = True
