"""LSQ one number at a time, written from the equations of the LSQ paper."""

import math

import torch
from torch import Tensor


def naive_range(bits: int, signed: bool) -> tuple[int, int]:
    """(-Q_N, Q_P) of LSQ, section 2."""
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def naive_lsq(x: float, s: float, bits: int, signed: bool) -> tuple[float, float, float]:
    """x_hat, dx_hat/dx and dx_hat/ds of one number (LSQ, equations 1-3 and 5)."""
    low, high = naive_range(bits, signed)
    v = x / s
    if v <= low:
        return low * s, 0.0, float(low)
    if v >= high:
        return high * s, 0.0, float(high)
    return round(v) * s, 1.0, -v + round(v)


def naive_quantize(x: Tensor, s: float, bits: int, signed: bool) -> Tensor:
    """x_hat of a tensor, one number at a time; same shape and type."""
    values = [naive_lsq(number, s, bits, signed)[0] for number in x.flatten().tolist()]
    return torch.tensor(values, dtype=x.dtype).reshape(x.shape)


def naive_gradients(x: Tensor, s: float, bits: int, signed: bool, upstream: Tensor):
    """Gradients of sum(upstream * x_hat) for x (a tensor) and for s (a float)."""
    grad_x, grad_s = [], []
    for number, g in zip(x.flatten().tolist(), upstream.flatten().tolist(), strict=True):
        _, dx, ds = naive_lsq(number, s, bits, signed)
        grad_x.append(g * dx)
        grad_s.append(g * ds)
    return torch.tensor(grad_x, dtype=x.dtype).reshape(x.shape), math.fsum(grad_s)
