"""Optimizers, learning-rate schedule, region decay, averaged weights and the check for NaN."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..network.bits import Bits
from ..network.layers import QuantConvBN
from ..network.quantizer import Quantizer, integer_range
from ..network.supernet import Supernet, check_steps
from .scheduler import cosine

LOWEST_LR = 1e-5  # of the weights, at the start and at the end


def learning_rate(part: int, parts: int, peak: float, warmup: float) -> float:
    """Learning rate of the weights in `part` of `parts`, counted from 0 (RFQuant's release).

    A linear warm-up over the first `warmup` parts, then a cosine that begins at part 0.
    """
    lowest = min(LOWEST_LR, peak)
    if part < warmup:
        return lowest + (peak - lowest) * part / warmup
    return cosine(peak, lowest, part / parts)


def step_learning_rate(part: int, parts: int) -> float:
    """Learning rate of the step sizes in `part` of `parts`, as a share of the peak: a cosine."""
    return cosine(1, 0, part / parts)


def part_of(step: int, steps: int, parts: int) -> int:
    """The part, counted from 0, that `step` of `steps` lies in if they form `parts` equal parts."""
    return step * parts // steps


def step_travel(steps: int, parts: int) -> float:
    """Sum of Adam's learning rates over `steps`, for a peak of 1.

    Adam moves a parameter by about its learning rate at most, so this is how far a step size can
    move.
    """
    return sum(step_learning_rate(part_of(s, steps, parts), parts) for s in range(steps))


def set_learning_rates(
    optimizer: torch.optim.Optimizer, rate: Callable[[int], float], steps: int, parts: int
) -> LambdaLR:
    """Sets the learning rate of all parameters to `rate(part)` in each step.

    `steps`: of the whole training. Call `step()` of what is returned after each optimizer step.
    """
    for group in optimizer.param_groups:
        group["lr"] = 1.0  # LambdaLR multiplies it
    return LambdaLR(optimizer, lambda step: rate(part_of(step, max(steps, 1), parts)))


def create_optimizers(
    model: nn.Module,
    *,
    momentum: float,
    weight_decay: float,
    region_decay: bool,
) -> list[torch.optim.Optimizer]:
    """SGD with Nesterov momentum for weights and norms, Adam for the quantizers' steps (RFQuant).

    Their learning rates are set by `set_learning_rates`. Parameters that require no gradient are
    left out. Norms and biases do not decay, nor do the last layers of a supernet. With
    `region_decay`, the weights of its other layers do not decay here either: see
    `decay_by_region`. Raises ValueError if no parameter requires a
    gradient.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    own_steps = {id(quantizer.steps) for quantizer in quantizers}
    layers, last = (model.layers, model.last) if isinstance(model, Supernet) else ({}, [])
    convs = [layer for layer in layers.values() if isinstance(layer, QuantConvBN)]
    undecayed = {id(p) for layer in convs if layer.bank for p in layer.bank.parameters()}
    undecayed |= {id(layers[name].op.weight) for name in (layers if region_decay else last)}
    steps = [p for p in trained if id(p) in own_steps]
    others = [p for p in trained if id(p) not in own_steps]
    decayed = [p for p in others if p.dim() > 1 and id(p) not in undecayed]
    rest = [p for p in others if p.dim() <= 1 or id(p) in undecayed]

    optimizers = []
    if others:
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest}]
        # Fused: reads each weight once, where one operation after another reads it five times.
        sgd = torch.optim.SGD(groups, 1.0, momentum, nesterov=momentum > 0, fused=True)
        # A parameter may get its first gradient late, when the fused optimizer can no longer begin
        # its momentum.
        sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in others})
        optimizers.append(sgd)
    if steps:
        optimizers.append(torch.optim.Adam(steps, 1.0, fused=True))
    return optimizers


@torch.no_grad()
def decay_by_region(
    supernet: Supernet, weight_decay: float, configs: Sequence[Mapping[str, Bits]]
) -> None:
    """Adds weight decay to the gradients of the layers' weights (RFQuant's release).

    `configs`: those of the step's passes. A weight w decays by `weight_decay` * w. If it lies in
    the clipping region of 2 bits, this is multiplied by 1 - n, where n is the number of passes that
    run its layer with 2-bit weights. For a weight that layers share, n counts all of them. The last
    layers do not decay, nor does a weight without gradient.
    """
    layers = {n: layer for n, layer in supernet.layers.items() if n not in supernet.last}
    weights = {layer.op.weight: layer.op.weight.grad for layer in layers.values()}
    for weight, grad in weights.items():
        if grad is not None:
            grad.add_(weight, alpha=weight_decay)
    for name, layer in layers.items():
        weight, quantizer = layer.op.weight, layer.weight_quantizer
        passes = sum(1 for config in configs if config[name].weight == 2)
        if passes and weight.grad is not None:
            v = weight / quantizer.step(2)
            # Weights inside the region, 0 for the others: the gradient of hardtanh does just this.
            inside = torch.ops.aten.hardtanh_backward(weight, v, *integer_range(2, signed=True))
            weight.grad.sub_(inside, alpha=weight_decay * passes)


def step_sizes(model: nn.Module) -> Tensor:
    """All step sizes of the quantizers of `model`, a vector; empty without quantizers."""
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    sizes = [q.steps.detach().abs().flatten() for q in quantizers]
    return torch.cat(sizes) if sizes else torch.zeros(0)


def average_weights(parameters: nn.ParameterList, decay: float) -> AveragedModel:
    """Exponential moving average of parameters; call its `update_parameters(parameters)`.

    After n updates, the next one has the decay (1 + n) / (10 + n), at most `decay`. Parameters
    alone, because AveragedModel copies buffers at each update, and a supernet has thousands.
    """

    def move(averages: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        n = int(count) - 1
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, current, count)

    average = AveragedModel(parameters, multi_avg_fn=move)
    average.n_averaged += 1  # what it starts from counts as an average, so that it is not replaced
    return average


@torch.no_grad()
def averaged_model(model: nn.Module, average: AveragedModel) -> nn.Module:
    """A copy of `model` with averaged parameters and the model's buffers, in eval mode."""
    copied = copy.deepcopy(model)
    for p, mean in zip(copied.parameters(), average.module.parameters(), strict=True):
        p.copy_(mean)
    return copied.eval()


def check_gradients(model: nn.Module, losses: Mapping[str, Tensor], when: str) -> None:
    """Raises FloatingPointError if a loss or a gradient is NaN or infinite.

    The message holds `when` and the first layer whose weight or gradient is not finite. This waits
    for the device once; each step does so anyway when it copies its images there.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # The largest absolute value, because it cannot overflow, in contrast to a sum.
    largest = nn.utils.get_total_norm(gradients, math.inf)
    if not math.isfinite(sum(losses.values()) + largest):
        wrong = [f"{key}={float(v)}" for key, v in losses.items() if not math.isfinite(v)]
        _stop(model, when, ", ".join(wrong) or "the losses are finite, but not the gradients")


def check_weights(model: nn.Module, when: str) -> None:
    """Raises FloatingPointError, as `check_gradients` does, if a weight is NaN or infinite."""
    if not math.isfinite(nn.utils.get_total_norm(list(model.parameters()), math.inf)):
        _stop(model, when, "the losses are finite, but not the weights")


def _stop(model: nn.Module, when: str, what: str) -> None:
    """Raises FloatingPointError that says when, what and in which layer."""
    advice = "try a smaller lr, and check that all images are finite"
    raise FloatingPointError(f"{when}: {what}; {_first_not_finite(model)}: {advice}")


def _first_not_finite(model: nn.Module) -> str:
    """Names the first layer whose weight or gradient is not finite, or a step size of 0."""
    layers = list(model.layers) if isinstance(model, Supernet) else []
    if layers:
        try:
            check_steps(model)
        except ValueError as error:
            return str(error)
    for name, p in model.named_parameters():
        for kind, values in (("weight", p), ("gradient", p.grad)):
            if values is not None and not values.isfinite().all():
                own = [layer for layer in layers if name.startswith(f"model.{layer}.")]
                layer = max(own, key=len) if own else name.rpartition(".")[0]
                return f"the first layer that is not finite is {layer!r} ({kind} of {name!r})"
    return "weights and gradients of all layers are finite"
