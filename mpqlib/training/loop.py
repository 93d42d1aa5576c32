"""One-shot training: one loop for the float start and for the supernet."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..files import load_state, save_state
from ..network.bits import Candidates, sample
from ..network.supernet import Supernet
from .evaluation import select_dtype
from .optimization import (
    MovingAverage,
    average_gradients,
    decay_outside_region,
    learning_rate,
    optimizers_of,
)
from .scheduler import cosine, freeze, freeze_share, is_freeze_epoch, turbulence
from .step import float_gradients, one_shot_gradients


@dataclass(frozen=True)
class TrainConfig:
    """What a training run is made of; defaults are RFQuant's release (arXiv 2401.01543).

    Epochs count from 0. Raises ValueError for a value that is not allowed.
    """

    epochs: int = 150
    batch_size: int = 512  # images a step, over all processes
    random_paths: int = 3  # random configurations a step, beside the largest one
    lr: float = 0.04  # peak learning rate of SGD, cosine to 0
    warmup_epochs: float = 5
    momentum: float = 0.9  # Nesterov
    weight_decay: float = 2.5e-5
    region_decay: bool = True  # no decay inside the smallest bit-width's clipping region
    step_lr: float = 1e-5  # peak learning rate of the quantizers' steps, by Adam
    clip_value: float = 1.0  # each gradient entry is clipped to +- this
    ema_decay: float = 0.9997  # of the averaged weights that training returns
    label_smoothing: float = 0.0
    scheduler: bool = True  # dynamic bit-width scheduler
    freeze_start: int = 6  # first epoch at which bit-widths may be frozen
    freeze_every: int = 2
    freeze_late: float = 0.72  # share of training after which freezing is revised ...
    freeze_late_every: int = 15  # ... only this often
    freeze_activations: bool = True
    idm: bool = True  # information distortion mitigation
    idm_weight: float = 0.01
    grid_weight: float = 0.1  # final weight of the quantization-error term, 0 for none
    grid_start: float = 40 / 150  # share of training after which it grows by a cosine
    dtype: str = "float32"  # of convolutions and linears: float32, bfloat16, auto
    seed: int = 0

    def __post_init__(self):
        least = {"epochs": 0, "batch_size": 1, "random_paths": 0, "freeze_start": 0}
        least |= {"freeze_every": 1, "freeze_late_every": 1, "seed": 0}
        for name, value in asdict(self).items():
            low = least.get(name, 0)
            if isinstance(value, (int, float)) and not value >= low:
                raise ValueError(f"{name}={value!r} is not allowed: at least {low}")
            if name in least and value != int(value):
                raise ValueError(f"{name}={value!r} is not allowed: a whole number")


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Within the block, the global generator (dropout, augmentation) is seeded from `generator`."""
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed + (dist.get_rank() if dist.is_initialized() else 0))
        yield


def batches(
    dataset: Dataset, config: TrainConfig, generator: torch.Generator, workers: int = 0
) -> DataLoader:
    """One epoch of `dataset`, shuffled by the shared generator, this process's share of it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = torch.randperm(len(dataset), generator=generator)[rank::world].tolist()
    size = config.batch_size // world
    return DataLoader(Subset(dataset, order), size, drop_last=True, num_workers=workers)


def choose_candidates(
    supernet: Supernet, config: TrainConfig, epoch: int, current: dict[str, Candidates]
) -> tuple[dict[str, Candidates], dict[str, float]]:
    """Candidates for `epoch` under the scheduler, and every layer's turbulence."""
    turbulences = {name: turbulence(layer) for name, layer in supernet.layers.items()}
    c = config
    rhythm = c.freeze_start, c.freeze_every, c.freeze_late, c.freeze_late_every
    if c.scheduler and is_freeze_epoch(epoch, c.epochs, *rhythm):
        share = freeze_share((epoch - c.freeze_start) / max(c.epochs - c.freeze_start, 1))
        current = freeze(supernet.candidates, turbulences, share, c.freeze_activations)
    return current, turbulences


@dataclass
class Run:
    """All that changes while a model trains, and so all that a checkpoint holds."""

    config: TrainConfig
    model: nn.Module
    average: MovingAverage
    optimizers: list[torch.optim.Optimizer]
    generator: torch.Generator  # everything random comes from it, the same on every process
    candidates: dict[str, Candidates]
    history: list[dict]
    about: dict

    @classmethod
    def start(cls, config: TrainConfig, model: nn.Module, about: Mapping | None = None) -> "Run":
        """At the first epoch."""
        optimizers = optimizers_of(model, config.momentum, config.weight_decay, config.region_decay)
        candidates = model.candidates if isinstance(model, Supernet) else {}
        generator = torch.Generator().manual_seed(config.seed)
        average = MovingAverage(model, config.ema_decay)
        return cls(config, model, average, optimizers, generator, candidates, [], dict(about or {}))

    def describe(self) -> dict:
        """What must agree for a checkpoint to be gone on from."""
        return {"config": asdict(self.config), "about": self.about}

    def gradients(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Adds up one step's gradients; returns its losses and accuracies."""
        c, dtype = self.config, select_dtype(self.config.dtype, x.device)
        if not isinstance(self.model, Supernet):
            return float_gradients(self.model, x, y, c.label_smoothing, dtype)
        late = (len(self.history) / c.epochs - c.grid_start) / max(1 - c.grid_start, 1e-9)
        return one_shot_gradients(
            self.model,
            x,
            y,
            self.candidates,
            [sample(self.candidates, self.generator) for _ in range(c.random_paths)],
            idm_weight=c.idm_weight if c.idm else 0.0,
            grid_weight=cosine(0, c.grid_weight, max(late, 0)),
            smoothing=c.label_smoothing,
            dtype=dtype,
        )

    def set_learning_rate(self, epoch: float) -> None:
        """Both optimizers' learning rates at `epoch`, a real number."""
        share = learning_rate(epoch, self.config.epochs, self.config.warmup_epochs)
        peaks = (self.config.lr, self.config.step_lr)
        for optimizer, peak in zip(self.optimizers, peaks[: len(self.optimizers)], strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share

    def save(self, path: Path) -> None:
        """Writes everything, atomically."""
        state = self.describe() | {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
            "candidates": {name: [list(b) for b in c] for name, c in self.candidates.items()},
            "history": self.history,
        }
        save_state(path, state)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote; raises ValueError if that was another configuration."""
        state = load_state(path)
        saved, mine = (c["config"] | c["about"] for c in (state, self.describe()))
        if other := {k: v for k, v in saved.items() if mine.get(k) != v}:
            raise ValueError(f"{path} was trained with {other}: keep to that, or remove the file")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.candidates = {
            name: Candidates(*(tuple(b) for b in c)) for name, c in state["candidates"].items()
        }
        self.history = state["history"]


def update(run: Run, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One training step on images (N, C, H, W) and labels (N); returns its losses."""
    losses = run.gradients(x, y)
    average_gradients(run.model)
    nn.utils.clip_grad_value_(run.model.parameters(), run.config.clip_value)
    if isinstance(run.model, Supernet) and run.config.region_decay:
        decay_outside_region(run.model, run.config.weight_decay)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    run.average.update()
    return losses


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    about: Mapping | None = None,
    workers: int = 0,
    label: str = "training",
    watch: Callable[[Run], object] | None = None,
) -> tuple[nn.Module, list[dict]]:
    """Trains a float model, or a Supernet one-shot; returns its averaged copy and a row an epoch.

    `dataset`: items (image (C, H, W), label). `checkpoint`: written after every epoch; where it
    exists, training goes on from it, to the same numbers bit for bit (CPU). `about`: what else must
    agree with it, such as the names of model and data. `watch`: called after every step. Raises
    ValueError for a checkpoint of another configuration or fewer images than one batch.
    """
    if not (steps := len(dataset) // config.batch_size):
        raise ValueError(f"batch_size={config.batch_size}: at most the {len(dataset)} images here")
    one_shot = isinstance(model, Supernet)
    model = model.to(device, memory_format=torch.channels_last).train()
    run = Run.start(config, model, about)
    if checkpoint and checkpoint.exists():
        run.load(checkpoint)

    for epoch in range(len(run.history), config.epochs):
        started, losses, row = time.perf_counter(), [], {"epoch": epoch + 1}
        if one_shot:
            run.candidates, row["turbulence"] = choose_candidates(
                model, config, epoch, run.candidates
            )
            row["candidates"] = {name: list(c.weight) for name, c in run.candidates.items()}
        with seeded(run.generator):
            loader = batches(dataset, config, run.generator, workers)
            title = f"{label}, epoch {epoch + 1} of {config.epochs}"
            for step, (x, y) in enumerate(tqdm(loader, title, leave=False)):
                run.set_learning_rate(epoch + (step + 0.5) / steps)
                x = x.to(device, memory_format=torch.channels_last)
                losses.append(update(run, x, y.to(device)))
                if watch:
                    watch(run)
        row |= {key: float(sum(loss[key] for loss in losses) / steps) for key in losses[0]}
        run.average.copy_buffers(model)
        run.history.append(row | {"seconds": time.perf_counter() - started})
        if checkpoint:
            run.save(checkpoint)
    return run.average.module.eval(), run.history
