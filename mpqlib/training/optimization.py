"""How weights, norms and steps move: optimizers, schedule, region decay, averaging."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from ..network.quantizer import Quantizer, integer_range
from ..network.supernet import Supernet
from .scheduler import cosine


def learning_rate(epoch: float, epochs: float, warmup: float) -> float:
    """Share of the peak learning rate at `epoch` (a real number): linear warm-up, then cosine."""
    if epoch < warmup:
        return epoch / warmup
    return cosine(1, 0, (epoch - warmup) / max(epochs - warmup, 1e-9))


def optimizers_of(
    model: nn.Module, momentum: float, weight_decay: float, region_decay: bool
) -> list[torch.optim.Optimizer]:
    """SGD with Nesterov momentum for weights and norms, Adam for the quantizers' steps (RFQuant).

    Norms and biases do not decay; nor do, with `region_decay`, the weights of a supernet's layers,
    which `decay_outside_region` decays. Learning rates are set anew before each step.
    """
    steps = [p for m in model.modules() if isinstance(m, Quantizer) for p in m.steps.values()]
    layers = model.layers.values() if isinstance(model, Supernet) and region_decay else ()
    undecayed = {id(layer.op.weight) for layer in layers}
    taken = {id(p) for p in steps}
    decayed, rest = [], []
    for p in model.parameters():
        if id(p) not in taken:
            (rest if p.dim() <= 1 or id(p) in undecayed else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest}]
    # Fused: one pass over memory, where one operation after another takes five.
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=True)
    # From the start, for a norm of the bank is met late, and fused it cannot begin later.
    sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in decayed + rest})
    return [sgd, torch.optim.Adam(steps, lr=0.0, fused=True)] if steps else [sgd]


@torch.no_grad()
def decay_outside_region(supernet: Supernet, weight_decay: float) -> None:
    """Adds weight decay to the gradients of weights that the smallest bit-width clips.

    Adaptive region weight decay (RFQuant's release): inside its clipping region, none decays.
    """
    for layer in supernet.layers.values():
        weight, quantizer = layer.op.weight, layer.weight_quantizer
        bits = quantizer.bits[0]
        q_min, q_max = integer_range(bits, signed=True)
        # Weights that are inside, else 0, as hardtanh's gradient; in place, for there are many.
        v = weight / quantizer.step(bits)
        inside = torch.ops.aten.hardtanh_backward(weight, v, q_min, q_max)
        weight.grad.sub_(inside.sub_(weight), alpha=weight_decay)


def average_gradients(model: nn.Module) -> None:
    """Averages gradients over the processes of torch.distributed; nothing to do with one."""
    if dist.is_initialized():
        for p in model.parameters():
            if p.grad is not None:  # the same ones everywhere: configurations are shared
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


class MovingAverage(nn.Module):
    """Exponential moving average of a model's parameters; `module` is the averaged model.

    The decay warms up as (1 + n) / (10 + n) over n updates. Buffers are not averaged but copied,
    when asked for: torch's AveragedModel copies them at each update, thousands in a bank of norms.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.mine, self.theirs = list(self.module.parameters()), list(model.parameters())
        self.decay = decay
        self.register_buffer("updates", torch.tensor(0))

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the model's present parameters."""
        n = int(self.updates)
        weight = 1 - min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.mine, self.theirs, weight)
        self.updates += 1

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Takes over the model's present buffers, such as running statistics."""
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
