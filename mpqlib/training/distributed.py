"""Training in several processes of torch.distributed, such as one for each GPU.

All processes hold the same weights and draw the same configurations. Each one computes the
gradients of its share of the batch; then they are averaged.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .evaluation import select_device

GRACE = 30  # seconds in which torchrun ends a process whose messages fail


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and the number of processes of torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def process_group(device: str = "auto") -> Iterator[torch.device]:
    """Within the block, the processes that `torchrun` started are one group; yields the device.

    `device`: as in `select_device`. Each process of a machine takes an accelerator of its own; on
    the CPU, they share it. Without torchrun there is one process and no group. Raises ValueError
    for a device that this machine does not have, and if it has fewer accelerators than processes.
    """
    found = select_device(device)
    if not dist.is_torchelastic_launched():
        yield found
        return
    if found.type != "cpu":
        number, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if found.index is not None or number >= count:
            raise ValueError(
                f"device={device!r} is not allowed for {os.environ['LOCAL_WORLD_SIZE']} processes "
                f"on this machine: 'cpu', or {found.type!r} for at most {count}"
            )
        found = torch.device(found.type, number)
        torch.accelerator.set_device_index(number)
    _init_process_group()
    yield found
    # Not after an error: the others may be waiting for this process, and it would wait for them.
    dist.destroy_process_group()


def _init_process_group() -> None:
    """Joins the group, by other names in torchrun's store after each restart.

    The store outlives a restart, so a process could read the address of one that is gone (PyTorch's
    issue 135712). Only on a single machine do all processes count the same restarts.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    with _messages():
        dist.init_process_group(store=store, rank=rank, world_size=world)


@contextmanager
def _messages() -> Iterator[None]:
    """Within the block, a message that fails raises its error only after `GRACE` seconds.

    It mostly fails because another process has ended. In these seconds, torchrun ends this process
    too, and shows the error of the other. It could not tell later which of two errors came first:
    it compares their times in whole seconds.
    """
    try:
        yield
    except RuntimeError:
        time.sleep(GRACE)
        raise


def from_first(value: Any) -> Any:
    """The `value` that the first process has, in every process. Any object that can be pickled.

    For what depends on the clock or on rounding, and must be the same everywhere.
    """
    if rank_and_size()[1] == 1:
        return value
    values = [value]
    with _messages():
        dist.broadcast_object_list(values)
    return values[0]


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Copies the first process's `tensors` into those of all others, in place."""
    if rank_and_size()[1] == 1:
        return
    for tensor in tensors:
        sent = tensor.contiguous()  # a copy of a channels-last tensor
        with _messages():
            dist.broadcast(sent, src=0)
        tensor.copy_(sent)


@torch.no_grad()
def average_gradients(model: nn.Module, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Averages gradients over all processes, in place; returns the means of the losses, scalars.

    One message, after all passes of a step have added up their gradients.
    DistributedDataParallel would send one in each pass. A value that is not finite in one process
    is not finite in all of them then.
    """
    _, world = rank_and_size()
    if world == 1:
        return dict(losses)
    # All processes run the same configurations, so that the same gradients exist in each.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    tensors = [*gradients, *losses.values()]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _messages():
        dist.all_reduce(flat)
    flat /= world
    means = flat.split([tensor.numel() for tensor in tensors])
    for gradient, mean in zip(gradients, means[: len(gradients)], strict=True):
        gradient.copy_(mean.view(gradient.shape))
    return dict(zip(losses, (mean.squeeze() for mean in means[len(gradients) :]), strict=True))


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes. Its gradient is the sum of theirs.

    The latter, because the result in each process depends on the tensor in every one.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        with _messages():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return SumOverProcesses.apply(grad)


def synced_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm of `x` (N, C, ...) in training mode, by the statistics of all processes.

    All must hold equally many values. torch's SyncBatchNorm does the same, but on GPUs alone.
    """
    rank, world = rank_and_size()
    values = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 is too coarse for a mean
    dims = [d for d in range(x.dim()) if d != 1]
    own = torch.stack(torch.var_mean(values, dims, correction=0))  # (2, C)
    # Each process fills its row of zeros, so that their sum holds all rows: (processes, 2, C).
    # Means of squares would need one row alone, but lose the variance of values far from zero.
    mine = torch.arange(world, device=x.device) == rank
    variances, means = SumOverProcesses.apply(own * mine[:, None, None]).unbind(1)
    mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
    if running_mean is not None:
        count = x.numel() // x.shape[1] * world
        running_mean.lerp_(mean.detach(), momentum)
        running_var.lerp_(var.detach() * (count / (count - 1)), momentum)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    channels = [1, -1, *(1 for _ in dims[1:])]
    return torch.addcmul(shift.view(channels), values, scale.view(channels)).to(x.dtype)


class SyncedNorms(TorchFunctionMode):
    """Within `with SyncedNorms():`, batch norms in training mode are `synced_batch_norm`.

    It takes the place of F.batch_norm, which all batch norms of torch and timm call. So it also
    serves the norms of a bank, which compute by `functional_call`.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm and kwargs.get("training"):
            func = synced_batch_norm
        return func(*args, **kwargs)
