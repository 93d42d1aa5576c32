"""One step of one-shot training: the gradients of the largest bits and of random ones."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network.bits import BitConfig, Candidates, largest
from ..network.supernet import Supernet
from .distortion import Distortions, grid_loss, lowest_layers


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of images whose label (N) has the largest of the logits (N, classes), a scalar."""
    return (logits.argmax(1) == y).float().mean()


def check_logits(logits: object) -> None:
    """Raises ValueError unless `logits` is a tensor (N, classes)."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model returns {shape}: a tensor of logits (N, classes) is needed")


def check_labels(logits: Tensor, y: Tensor) -> None:
    """Raises ValueError unless `y` holds a class, int64, for each of the logits (N, classes).

    Labels on an accelerator are not compared with the number of classes: this would wait for it.
    """
    check_logits(logits)
    count, classes = logits.shape
    if y.shape != (count,) or y.dtype != torch.int64:
        raise ValueError(
            f"labels are {y.dtype} of shape {tuple(y.shape)}: one class (torch.int64) for each of "
            f"{count} images is needed"
        )
    if y.device.type == "cpu" and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(
            f"labels {int(y.min())} to {int(y.max())}: the model has classes 0 to {classes - 1}"
        )


def in_float32(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 where they are: losses of 16 bits are too coarse."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def logits_in(
    dtype: torch.dtype, model: Callable[..., Tensor], x: Tensor, *config: BitConfig
) -> Tensor:
    """Runs the model with convolutions and linear layers in `dtype`; returns logits in float32.

    Logits in float64 stay in float64. Raises ValueError for other outputs than logits (N, classes).
    """
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(x, *config)
    check_logits(logits)
    return in_float32(logits)


def float_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    smoothing: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Adds the gradients of the cross-entropy of a float model; returns loss and accuracy.

    `x`: images (N, C, H, W); `y`: labels (N). `smoothing`: label smoothing.
    """
    logits = logits_in(dtype, model, x)
    check_labels(logits, y)
    loss = F.cross_entropy(logits, y, label_smoothing=smoothing)
    loss.backward()
    return {"loss": loss.detach(), "accuracy": accuracy(logits, y)}


class OneShotStep:
    """The passes of a training step, compiled or not.

    `compile`: run the network by torch.compile, which fuses batch norms, activations and
    quantizers. One program serves all configurations. To compile it takes a minute or more.
    `mode`: of torch.compile; "reduce-overhead" captures the passes as CUDA graphs.
    If it is compiled, hooks for IDM stay on the layers until `remove`.
    """

    def __init__(self, supernet: Supernet, compile: bool = False, mode: str = "default"):
        self.supernet = supernet
        self.model = torch.compile(supernet.model, mode=mode) if compile else supernet.model
        layers = {name: supernet.layers[name] for name in supernet.searchable}
        self.distortions = Distortions(layers, static=compile)

    def remove(self) -> None:
        """Takes all hooks off the layers."""
        self.distortions.remove()

    def run(self, x: Tensor, config: BitConfig) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) at `config`."""
        self.supernet.set_bits(config)
        return self.model(x.clone())  # a network may normalise its images in place

    def gradients(
        self,
        x: Tensor,
        y: Tensor,
        candidates: Mapping[str, Candidates],
        configs: Sequence[BitConfig],
        *,
        idm_weight: float = 0.0,
        grid_weight: float = 0.0,
        smoothing: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Adds the gradients of one step; see `one_shot_gradients`."""
        supernet, distortions = self.supernet, self.distortions
        lowest = [lowest_layers(config, candidates) for config in configs]
        with distortions.keep(set().union(*lowest)) if idm_weight else nullcontext():
            logits = logits_in(dtype, self.run, x, largest(candidates))
        check_labels(logits, y)
        loss = F.cross_entropy(logits, y, label_smoothing=smoothing)
        loss.backward()
        teacher = logits.detach().softmax(1)
        losses = {"loss": loss.detach(), "accuracy": accuracy(logits, y)}

        for config, names in zip(configs, lowest, strict=True):
            with distortions.compare(names) if idm_weight else nullcontext():
                student = logits_in(dtype, self.run, x, config)
            cross_entropy = F.cross_entropy(student, y, label_smoothing=smoothing)
            divergence = F.kl_div(student.log_softmax(1), teacher, reduction="batchmean")
            random_loss = (cross_entropy + divergence) / 2
            idm = grid = torch.zeros_like(random_loss)
            if idm_weight and names:
                idm = distortions.loss(names)
            if grid_weight:
                grid = grid_loss(supernet.layers, config, candidates)
            (random_loss + idm_weight * idm + grid_weight * grid).backward()

            row = {"loss_random": random_loss, "idm": idm, "accuracy_random": accuracy(student, y)}
            for key, value in row.items():
                losses[key] = losses.get(key, 0) + value.detach() / len(configs)
        return losses


def one_shot_gradients(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    candidates: Mapping[str, Candidates],
    configs: Sequence[BitConfig],
    **options,
) -> dict[str, Tensor]:
    """Adds the gradients of one step at the largest bits and at `configs`; returns the losses.

    `x`: images (N, C, H, W); `y`: labels (N). The loss at the largest bits is the cross-entropy.
    The loss at each configuration is half the cross-entropy, plus half the KL divergence from the
    outputs at the largest bits, plus `idm_weight` times the IDM loss of the layers at their
    smallest weight bits, plus `grid_weight` times the grid loss. `smoothing`: label smoothing.
    `dtype`: of convolutions and linear layers. `options`: these four, as in `OneShotStep`. Losses
    and accuracies at `configs` are means over them. Source: RFQuant (arXiv 2401.01543).
    """
    return OneShotStep(supernet).gradients(x, y, candidates, configs, **options)


def idm_gradient_share(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    candidates: Mapping[str, Candidates],
    configs: Sequence[BitConfig],
    idm_weight: float,
) -> float:
    """Norm of the IDM term's gradient over the norm of the task's, in one step.

    The task is the same step without IDM. Arguments as in `one_shot_gradients`. The supernet
    itself, its gradients and its batch-norm statistics stay as they are. A weight of 0.01 gives 0.2
    to 0.5% in RFQuant's set-up.
    """
    found = []
    for weight in (0.0, idm_weight):
        twin = copy.deepcopy(supernet).train()
        twin.zero_grad()
        with torch.random.fork_rng():  # the same dropout in both
            torch.manual_seed(0)
            one_shot_gradients(twin, x, y, candidates, configs, idm_weight=weight)
        found.append([p.grad for p in twin.parameters() if p.grad is not None])
    task, both = found
    idm = [b - a for a, b in zip(task, both, strict=True)]
    return float(nn.utils.get_total_norm(idm) / nn.utils.get_total_norm(task))
