"""Step sizes with the least rounding error, for a supernet that is used without training."""

from functools import partial
from math import ceil, inf
from numbers import Integral

import torch
from torch import Tensor, nn

from ..data import check_value
from ..network.observation import eval_mode, hooked
from ..network.quantizer import Quantizer, integer_range
from ..network.supernet import Supernet, check_supernet
from .evaluation import check_images, check_statistics, void_statistics

SHARES = torch.logspace(-1.3, 0, 81)  # of the largest step that is tried, 4% from one to the next
SAMPLE = 2**15  # values that a layer reads, at most, for the step sizes of its activations


def least_squares_step(rows: Tensor, bits: int, signed: bool) -> Tensor:
    """The step of each row (R, N) with the least squared rounding error; shape (R,).

    It is searched on a grid, from a twentieth of the step that clips no value up to that step. With
    2 bits and a single value far above all others, a smaller step could be better. A row of zeros
    gets the step 1.
    """
    q_min, q_max = integer_range(bits, signed)
    largest = rows.amax(1) / q_max
    if signed:
        largest = torch.maximum(largest, rows.amin(1) / q_min)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    best, least = largest, torch.full_like(largest, inf)
    for share in SHARES.tolist():
        step = share * largest
        rounded = (rows / step[:, None]).round_().clamp_(q_min, q_max).mul_(step[:, None])
        error = rounded.sub_(rows).square_().sum(1)
        best = torch.where(error <= least, step, best)
        least = torch.minimum(error, least)
    return best


def _sample_inputs(supernet: Supernet, images: Tensor, batch_size: int) -> dict[Quantizer, Tensor]:
    """Values that each activation quantizer reads in float mode, at most about SAMPLE a quantizer.

    If there are more, they are drawn at random, equally many from each batch. Raises ValueError for
    values that are not finite.
    """
    found: dict[Quantizer, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    batches = images.tensor_split(ceil(len(images) / batch_size))
    count = SAMPLE // len(batches)

    def keep(name: str, quantizer: Quantizer, _: nn.Module, args: tuple) -> None:
        values = args[0].flatten()
        if not values.isfinite().all():
            raise ValueError(f"layer {name!r} reads values that are not finite: check the images")
        if len(values) > count:
            chosen = torch.randint(len(values), (count,), generator=generator)
            values = values[chosen.to(values.device)]
        found.setdefault(quantizer, []).append(values)

    handles = [
        layer.register_forward_pre_hook(partial(keep, name, layer.act_quantizer))
        for name, layer in supernet.layers.items()
        if layer.act_quantizer is not None
    ]
    with hooked(handles):
        for x in batches:
            supernet(x)
    return {quantizer: torch.cat(parts) for quantizer, parts in found.items()}


@torch.no_grad()
def fit_steps(supernet: Supernet, images: Tensor, batch_size: int = 32) -> None:
    """Sets all step sizes to those with the least squared rounding error (`least_squares_step`).

    Of weights by the weights themselves, of activations by what the layers read of `images`
    (N, C, H, W) in float mode. Statistics of batch norms stay, but belong to the earlier steps:
    `evaluate` and `save_policy` refuse them until `recalibrate`, `correct_means` or
    `copy_statistics` has set them for a configuration.
    `batch_size`: images in a pass.
    Raises ValueError for another model, without images of its type, for a `batch_size` that is no
    whole number from 1, for values that are not finite, and, as `check_statistics` does, if float
    mode has no statistics of its own.
    """
    check_supernet("supernet", supernet)
    check_statistics(supernet, None)
    check_images(images, supernet)
    check_value("batch_size", batch_size, Integral, "a whole number from 1", lambda v: v >= 1)
    for name, layer in supernet.layers.items():
        if not layer.op.weight.isfinite().all():
            raise ValueError(f"the weight of {name!r} holds values that are not finite")
    with eval_mode(supernet):
        read = _sample_inputs(supernet, images, batch_size)
    for layer in supernet.layers.values():
        quantizer, weight = layer.weight_quantizer, layer.op.weight
        if isinstance(quantizer, Quantizer):  # weights of two or three values have no step
            rows = weight.flatten(1) if quantizer.per_channel else weight.reshape(1, -1)
            _set_steps(quantizer, rows)
    for quantizer, values in read.items():
        _set_steps(quantizer, values[None])
    void_statistics(supernet)


def _set_steps(quantizer: Quantizer, rows: Tensor) -> None:
    """Fits the steps at each bit-width to `rows` (R, N): one row, or one for each channel."""
    for steps, bits in zip(quantizer.steps, quantizer.bits, strict=True):
        steps.copy_(least_squares_step(rows, bits, quantizer.signed).reshape(steps.shape))
