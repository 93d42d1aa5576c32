"""Optimizers, learning-rate schedule, region decay, averaged weights and the check for NaN."""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..network.quantizer import Quantizer, integer_range
from ..network.supernet import Supernet
from .scheduler import cosine


def learning_rate(epoch: float, epochs: float, warmup: float) -> float:
    """Learning rate at `epoch`, a real number, as a share of the peak: linear warm-up, cosine."""
    if epoch < warmup:
        return epoch / warmup
    return cosine(1, 0, (epoch - warmup) / max(epochs - warmup, 1e-9))


def schedule_learning_rate(
    optimizer: torch.optim.Optimizer, steps: int, epochs: int, warmup: float
) -> LambdaLR:
    """Multiplies the optimizer's learning rate by `learning_rate` at the middle of each step.

    `steps`: steps in an epoch. Call `step()` of what is returned after each optimizer step.
    """
    return LambdaLR(optimizer, lambda step: learning_rate((step + 0.5) / steps, epochs, warmup))


def create_optimizers(
    model: nn.Module,
    *,
    lr: float,
    step_lr: float,
    momentum: float,
    weight_decay: float,
    region_decay: bool,
) -> list[torch.optim.Optimizer]:
    """SGD with Nesterov momentum for weights and norms, Adam for the quantizers' steps (RFQuant).

    `lr`: of SGD; `step_lr`: of Adam. Parameters that require no gradient are left out. Norms and
    biases do not decay. With `region_decay`, the weights of a supernet's layers do not decay here
    either: see `decay_outside_region`. Raises ValueError if no parameter requires a gradient.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    own_steps = {id(p) for quantizer in quantizers for p in quantizer.steps.values()}
    layers = model.layers.values() if isinstance(model, Supernet) and region_decay else ()
    undecayed = {id(layer.op.weight) for layer in layers}
    steps = [p for p in trained if id(p) in own_steps]
    others = [p for p in trained if id(p) not in own_steps]
    decayed = [p for p in others if p.dim() > 1 and id(p) not in undecayed]
    rest = [p for p in others if p.dim() <= 1 or id(p) in undecayed]

    optimizers = []
    if others:
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest}]
        # Fused: reads each weight once, where one operation after another reads it five times.
        sgd = torch.optim.SGD(groups, lr, momentum, nesterov=momentum > 0, fused=True)
        # Some batch norms get their first gradient late, when the fused optimizer can no longer
        # begin their momentum.
        sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in others})
        optimizers.append(sgd)
    if steps:
        optimizers.append(torch.optim.Adam(steps, step_lr, fused=True))
    return optimizers


@torch.no_grad()
def decay_outside_region(supernet: Supernet, weight_decay: float) -> None:
    """Adds weight decay to the gradients of the weights that the smallest bit-width clips.

    Weights inside the clipping region do not decay (adaptive region weight decay, RFQuant's
    release). A weight that several layers share decays once, if at least one of them clips it. A
    weight without gradient stays as it is.
    """
    sharing = defaultdict(list)
    for layer in supernet.layers.values():
        sharing[layer.op.weight].append(layer.weight_quantizer)
    for weight, quantizers in sharing.items():
        if weight.grad is None:
            continue
        inside = weight
        for quantizer in quantizers:
            bits = quantizer.bits[0]
            v = weight / quantizer.step(bits)
            # Weights inside the region, 0 for the others: the gradient of hardtanh does just this.
            limits = integer_range(bits, signed=True)
            inside = torch.ops.aten.hardtanh_backward(inside, v, *limits)
        weight.grad.sub_(inside.sub_(weight), alpha=weight_decay)


def average_gradients(model: nn.Module) -> None:
    """Averages gradients over the processes of torch.distributed, if it is in use."""
    if dist.is_initialized():
        for p in model.parameters():
            # All processes run the same configurations, so that the same gradients exist in each.
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


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
    """Names the first layer whose weight or gradient is not finite."""
    layers = list(model.layers) if isinstance(model, Supernet) else []
    for name, p in model.named_parameters():
        for kind, values in (("weight", p), ("gradient", p.grad)):
            if values is not None and not values.isfinite().all():
                own = [layer for layer in layers if name.startswith(f"model.{layer}.")]
                layer = max(own, key=len) if own else name.rpartition(".")[0]
                return f"the first layer that is not finite is {layer!r} ({kind} of {name!r})"
    return "weights and gradients of all layers are finite"
