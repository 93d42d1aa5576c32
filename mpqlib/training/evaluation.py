"""Accuracy of a float model or of a supernet's configuration, and batch-norm statistics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ..network.bits import BitConfig
from ..network.layers import QuantConvBN
from ..network.supernet import Supernet


def select_device(name: str = "auto") -> torch.device:
    """The device by name; "auto" is the accelerator torch finds, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    allowed = ["auto", "cpu", *([found.type] if found.type != "cpu" else [])]
    if name.split(":")[0] not in allowed:
        raise ValueError(f"device={name!r} is not available here: one of {allowed}")
    return found if name == "auto" else torch.device(name)


def select_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """What convolutions and linears compute in: "float32", "bfloat16", or "auto".

    "auto" is bfloat16 where the device has matrix units for it (CUDA from 8.0, a CPU with AMX),
    else float32. Raises ValueError for another name.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype={name!r} is not allowed: auto, float32 or bfloat16")
    if name == "auto":
        capable = {"cpu": torch.cpu._is_amx_tile_supported, "cuda": torch.cuda.is_bf16_supported}
        name = "bfloat16" if capable.get(torch.device(device).type, bool)() else "float32"
    return getattr(torch, name)


def decoded(dataset: Dataset) -> TensorDataset:
    """The items (image, label) of `dataset` as tensors in memory, to be read many times."""
    return TensorDataset(*next(iter(DataLoader(dataset, len(dataset)))))


class Evaluation(NamedTuple):
    """Which images were classified correctly (N,), and the mean cross-entropy."""

    correct: Tensor
    loss: float

    @property
    def top1(self) -> float:
        """Share of correct images, 0 to 1."""
        return float(self.correct.float().mean())


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    config: BitConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
) -> Evaluation:
    """Accuracy of a float model, or of a supernet at `config`, on (image, label) items."""
    # Before inference mode, which would leave weights that cannot be trained any further.
    model = model.to(device, memory_format=torch.channels_last).eval()
    correct, loss = [], 0.0
    with torch.inference_mode():
        for x, y in DataLoader(dataset, batch_size):
            x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
            logits = model(x) if config is None else model(x, config)
            correct.append((logits.argmax(1) == y).cpu())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
    return Evaluation(torch.cat(correct), loss / len(dataset))


def outside_norms(supernet: Supernet) -> list[_BatchNorm]:
    """The batch norms that belong to no layer: they run at every configuration."""
    convs = [layer for layer in supernet.layers.values() if isinstance(layer, QuantConvBN)]
    owned = {id(m) for conv in convs for m in (conv.norm, *conv.bank.values())}
    return [m for m in supernet.modules() if isinstance(m, _BatchNorm) and id(m) not in owned]


def norms_at(supernet: Supernet, config: BitConfig) -> list[_BatchNorm]:
    """The batch norms of layers that run at `config`: at most one of each bank."""
    layers = supernet.layers.items()
    norms = [layer.norm_at(config[n]) for n, layer in layers if isinstance(layer, QuantConvBN)]
    return [norm for norm in norms if isinstance(norm, _BatchNorm)]


@torch.no_grad()
def recalibrate(
    supernet: Supernet,
    dataset: Dataset,
    config: BitConfig,
    *,
    images: int = 7000,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
) -> None:
    """Measures the batch-norm statistics of `config` anew on the first `images` training images.

    The mean over batches replaces the running statistics (RFQuant's release: about 7,000 images).
    """
    supernet = supernet.to(device, memory_format=torch.channels_last).eval()
    norms = norms_at(supernet, config) + outside_norms(supernet)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over what follows
        norm.train()
    part = Subset(dataset, range(min(images, len(dataset))))
    for x, _ in DataLoader(part, batch_size):
        supernet(x.to(device, memory_format=torch.channels_last), config)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@contextmanager
def batch_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within the block, the batch norms normalise by the batch at hand and learn nothing."""
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.train().track_running_stats = False
        yield
    finally:
        for norm, (training, tracking) in zip(norms, before, strict=True):
            norm.train(training).track_running_stats = tracking
