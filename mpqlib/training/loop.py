"""One-shot training: one loop for the float network and for the supernet."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm.auto import tqdm

from ..data import InMemory, check_value, draw
from ..files import check_settings, check_writable, load_state, plain, save_state, set_tensors
from ..network.bits import BitConfig, Candidates, largest, sample
from ..network.supernet import Supernet, tie, tied_inputs
from .distributed import (
    SyncedNorms,
    average_gradients,
    copy_from_first,
    from_first,
    rank_and_size,
)
from .evaluation import check_dataset, move_channels_last, select_device
from .optimization import (
    average_weights,
    averaged_model,
    check_gradients,
    check_weights,
    create_optimizers,
    decay_by_region,
    learning_rate,
    part_of,
    set_learning_rates,
    step_learning_rate,
    step_sizes,
    step_travel,
)
from .scheduler import cosine, freeze, freeze_share, frozen_bits, is_decision, turbulence
from .speed import check_choice, faster_dtype, fitting_dtype, is_worth_compiling
from .step import OneShotStep, float_gradients

# Number of the training rules; stored runs name it. 3: those of RFQuant's release, as recorded in
# tests/data. In 2, step sizes and batch norms that no pass of a step uses stood still; now their
# momentum moves them. In 1, the grid term, initial steps, learning rates and freezing differed.
TRAINING_RULES = 3

NORM_IMAGES = 7000  # on which a float network's batch norms are measured, as in `recalibrate`

# Smallest and largest value allowed of settings; any other number is at least 0.
RANGES = {
    "batch_size": (1, math.inf),
    "momentum": (0, 1),
    "ema_decay": (0, 1),
    "label_smoothing": (0, 1),
    "schedule_parts": (1, 100_000),
    "freeze_every": (1, math.inf),
    "freeze_late": (0, 1),
    "freeze_late_every": (1, math.inf),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are those of RFQuant's release (arXiv 2401.01543).

    All schedules divide the training into `schedule_parts` equal parts, counted from 0. With the
    default, training of any length runs through the schedules of the release, whose parts are its
    150 epochs. numpy scalars become Python's numbers. Raises ValueError for a value that
    is not allowed, and TypeError for an unknown setting.
    """

    epochs: int = 150
    batch_size: int = 512  # images in a step, over all processes
    random_paths: int = 3  # random configurations in a step, beside the largest one
    schedule_parts: int = 150  # equal parts of training, in which the schedules count
    lr: float = 0.04  # peak learning rate of SGD; set once a part: warm-up, then a cosine
    warmup: float = 5  # parts
    momentum: float = 0.9  # Nesterov
    weight_decay: float = 2.5e-5
    region_decay: bool = True  # other decay inside the 2-bit clipping region: `decay_by_region`
    step_travel: float = 1.88  # sum of Adam's learning rates: how far a step size can move at most
    step_lr_limit: float = 0.01  # highest learning rate of Adam; only short runs would exceed it
    clip_value: float = 1.0  # gradient entries are clipped to +- this; math.inf: no clipping
    ema_decay: float = 0.9997  # of the averaged weights; unlike the release's, it warms up
    label_smoothing: float = 0.0
    scheduler: bool = True  # dynamic bit-width scheduler
    freeze_start: int = 6  # first part in which bit-widths may be frozen
    freeze_every: int = 2  # parts between two choices of what to freeze
    freeze_late: float = 0.72  # share of training after which the choice is made ...
    freeze_late_every: int = 15  # ... only every so many parts
    freeze_activations: bool = True  # the release: True for ResNet18, False for MobileNetV2
    freeze_any: bool = False  # also freeze smallest bits above 2, or above 3 if depth-wise
    idm: bool = True  # information distortion mitigation
    idm_weight: float = 0.01
    grid_weight: float = 0.1  # final weight of the quantization-error term, 0 for none
    grid_start: int = 40  # part after which that weight grows by a cosine
    # Whether the passes of a supernet run by torch.compile: never, always, or auto, which compiles
    # if the third step says that training takes at least another two hours.
    compile: str = "auto"
    # Of convolutions and linear layers: float32, bfloat16, or auto, which measures a few steps in
    # both and keeps the faster. A resumed run keeps it too, but a new one may measure otherwise.
    # bfloat16 holds the integers of 8 bits at most: with larger candidates, auto is float32.
    dtype: str = "float32"
    # Only in several processes: batch norms use the statistics of the whole batch, as one process
    # does, or (False) those of each process's share, as RFQuant's release and torch's default do.
    sync_norms: bool = True
    seed: int = 0

    def __post_init__(self):
        for setting in fields(self):
            value = _checked(setting.name, getattr(self, setting.name), setting.type)
            object.__setattr__(self, setting.name, value)  # the class is frozen
        if not self.warmup < self.schedule_parts:
            raise ValueError(
                f"warmup={self.warmup} is not allowed: fewer parts than "
                f"schedule_parts={self.schedule_parts}"
            )


def explain_text(value: object) -> str:
    """The end of a message about a number that YAML reads as text, such as 1e-3; else empty."""
    if isinstance(value, (Mapping, list, tuple)):
        entries = value.values() if isinstance(value, Mapping) else value
        return next(filter(None, map(explain_text, entries)), "")
    if not isinstance(value, str) or "e" not in value.lower():
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    dotted = np.format_float_scientific(number, min_digits=1, exp_digits=1)
    plain = np.format_float_positional(number, trim="-")
    return f". {value!r} is text in YAML: write {dotted} or {plain}"


def _checked(name: str, value: object, kind: type) -> bool | int | float | str:
    """The value of a setting as a `kind`; raises ValueError if it is not allowed."""
    if kind is str:
        check_choice(name, value)
        return str(value)
    truth = isinstance(value, (bool, np.bool_))
    if kind is bool:
        if not truth:
            raise ValueError(f"{name}={value!r} is not allowed: True or False")
        return bool(value)
    low, high = RANGES.get(name, (0, math.inf))
    allowed = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
    number = "a whole number" if kind is int else "a number"
    right = isinstance(value, Integral if kind is int else Real) and not truth
    # NaN is in no range.
    if not right or not low <= value <= high or (value == math.inf and name != "clip_value"):
        message = f"{name}={value!r} is not allowed: {number}, {allowed}"
        raise ValueError(message + explain_text(value))
    return kind(value)


def _rate(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> Callable[[int], float]:
    """The learning rate of `optimizer` as a function of the part, in training of `steps`."""
    c, parts = config, config.schedule_parts
    if isinstance(optimizer, torch.optim.SGD):
        return lambda part: learning_rate(part, parts, c.lr, c.warmup)
    peak = min(c.step_travel / max(step_travel(steps, parts), 1e-9), c.step_lr_limit)
    return lambda part: peak * step_learning_rate(part, parts)


@dataclass
class Epoch:
    """An unfinished epoch: what a checkpoint needs in order to resume in the middle of it."""

    seed: int  # of augmentation and dropout
    order: Tensor  # (N) indices of the training images
    row: dict  # its row of the history, without the losses
    sums: dict[str, Tensor]  # losses and accuracies, summed over its steps
    seconds: float = 0.0


class Batches(Dataset):
    """Batches of a data set: the item (seed, indices) is (images, labels) of these indices.

    A batch depends on its item alone: neither on the batches before it nor on the number of
    workers. So an epoch resumes at any step. Augmentation must draw from torch's global generator.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, item: tuple[int, list[int]]) -> list[Tensor]:
        seed, indices = item
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if isinstance(self.dataset, InMemory):
                return list(self.dataset.batch(indices))
            return default_collate([self.dataset[i] for i in indices])


@dataclass
class Run:
    """A model in training, and all that changes with it: what a checkpoint holds."""

    config: TrainConfig
    model: nn.Module
    images: int  # in the training set
    about: dict
    parameters: nn.ParameterList  # the model's
    average: AveragedModel  # of the parameters
    optimizers: list[torch.optim.Optimizer]
    schedules: list[LRScheduler]  # learning rates, one for each optimizer
    generator: torch.Generator  # of order, seeds and configurations, the same in every process
    candidates: dict[str, Candidates]
    first_step_sizes: Tensor  # of the quantizers before the first step
    history: list[dict]  # one row for each finished epoch
    dtype: str  # float32 or bfloat16; auto until the first step
    compile: str  # never or always; auto until the third step
    step: int = 0  # steps taken, over all epochs
    epoch: Epoch | None = None  # the unfinished one
    waited: float = 0.0  # seconds that this process has waited for images; no checkpoint holds it

    @classmethod
    def start(
        cls, config: TrainConfig, model: nn.Module, images: int, about: Mapping | None = None
    ) -> "Run":
        """A run before its first step. `images`: number of training images.

        Raises ValueError for fewer images than one batch, for `about` that cannot be stored, for
        bfloat16 with candidates above 8 bits, and for a batch or compilation that several processes
        cannot share.
        """
        if images < config.batch_size:
            raise ValueError(
                f"batch_size={config.batch_size} is not allowed: the data set has {images} images, "
                "which must fill at least one batch"
            )
        c, (_, world) = config, rank_and_size()
        if c.batch_size % world:
            raise ValueError(
                f"batch_size={c.batch_size} is not allowed: a multiple of {world}, the number of "
                "processes"
            )
        if c.compile == "always" and c.sync_norms and world > 1:
            raise ValueError(
                "compile='always' is not allowed for several processes with sync_norms=True: auto "
                "or never, or sync_norms=False"
            )
        candidates = model.candidates if isinstance(model, Supernet) else {}
        dtype = fitting_dtype(c.dtype, candidates)
        optimizers = create_optimizers(
            model,
            momentum=c.momentum,
            weight_decay=c.weight_decay,
            region_decay=c.region_decay,
        )
        steps = c.epochs * (images // c.batch_size)
        parameters = nn.ParameterList(model.parameters())
        return cls(
            config=config,
            model=model,
            images=images,
            about=plain(dict(about or {}), "about"),
            parameters=parameters,
            average=average_weights(parameters, c.ema_decay),
            optimizers=optimizers,
            schedules=[
                set_learning_rates(o, _rate(o, c, steps), steps, c.schedule_parts)
                for o in optimizers
            ],
            generator=torch.Generator().manual_seed(c.seed),
            candidates=candidates,
            first_step_sizes=step_sizes(model),
            history=[],
            dtype=dtype,
            compile=c.compile,
        )

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self.images // self.config.batch_size

    @property
    def syncs_norms(self) -> bool:
        """Whether batch norms use the statistics of several processes."""
        return self.config.sync_norms and rank_and_size()[1] > 1

    def when(self) -> str:
        """The epoch and step that come next, both counted from 1, for messages."""
        epoch, step = divmod(self.step, self.steps)
        return f"epoch {epoch + 1} of {self.config.epochs}, step {step + 1} of {self.steps}"

    @property
    def part(self) -> float:
        """The part of training that has passed, of the config's `schedule_parts`."""
        return self.step * self.config.schedule_parts / (self.steps * self.config.epochs)

    def start_epoch(self) -> None:
        """Draws the order of the next epoch's images."""
        row = {"epoch": len(self.history) + 1}
        if isinstance(self.model, Supernet):
            row["decisions"] = []
        seed = int(torch.randint(2**31, (), generator=self.generator))
        order = torch.randperm(self.images, generator=self.generator)
        self.epoch = Epoch(seed, order, row, sums={})

    def end_epoch(self) -> None:
        """Adds the epoch's row, with its mean losses, to the history."""
        means = {key: float(total / self.steps) for key, total in self.epoch.sums.items()}
        if isinstance(self.model, Supernet):
            moved = step_sizes(self.model) / self.first_step_sizes - 1
            means["steps_moved"] = float(moved.abs().mean())
        about = {"seconds": self.epoch.seconds, "dtype": self.dtype, "compile": self.compile}
        self.history.append(self.epoch.row | means | about)
        self.epoch = None

    def choose_candidates(self) -> dict | None:
        """Chooses candidates anew if a decision of the scheduler comes before the next step.

        Returns the step, the turbulence of each layer with a choice, and the frozen layers, or None
        if there is no decision. Without the scheduler, turbulence is measured, and nothing frozen.
        """
        c = self.config
        before, now = (
            part_of(step, self.steps * c.epochs, c.schedule_parts)
            for step in (self.step - 1, self.step)
        )
        every = c.freeze_start, c.freeze_every
        when = c.schedule_parts, *every, c.freeze_late, c.freeze_late_every
        decisions = [part for part in range(before + 1, now + 1) if is_decision(part, *when)]
        if not decisions:
            return None
        layers, full = self.model.layers, self.model.candidates
        turbulences = {
            name: turbulence(layers[name], self.candidates[name].weight)
            for name in self.model.searchable
        }
        turbulences = from_first(turbulences)  # another kind of GPU may round differently
        if c.scheduler:
            share = freeze_share(decisions[-1], c.schedule_parts, *every)
            most = None if c.freeze_any else frozen_bits(self.model.table)
            self.candidates = freeze(full, turbulences, share, c.freeze_activations, most)
        frozen = [name for name, own in self.candidates.items() if own != full[name]]
        return {"step": self.step, "turbulence": turbulences, "frozen": frozen}

    def draw_configs(self) -> list[BitConfig]:
        """The configurations of the next step: at the largest bits, and random ones.

        None for a float model.
        """
        if not isinstance(self.model, Supernet):
            return []
        paths = range(self.config.random_paths)
        drawn = [tie(sample(self.candidates, self.generator), self.model.table) for _ in paths]
        return [largest(self.candidates), *drawn]

    @cached_property
    def one_shot(self) -> OneShotStep:
        """How a supernet runs the passes of a step."""
        return OneShotStep(self.model, compile=self.compile == "always")

    def choose_dtype(self, x: Tensor, y: Tensor, configs: Sequence[BitConfig]) -> None:
        """Chooses the faster type for one step's gradients, measured on a copy of the model."""
        twin = replace(self, model=copy.deepcopy(self.model), compile="never")

        def step(name: str) -> None:
            twin.dtype = name
            twin.gradients(x, y, configs)

        with torch.random.fork_rng():  # dropout
            self.dtype = faster_dtype(step, x.device)

    def choose_compile(self, seconds: float) -> None:
        """Chooses whether to compile the passes of a supernet, by the `seconds` of the last step.

        This waits for the third step, because the first ones take longer. Norms that are synced
        are not compiled.
        """
        if self.compile != "auto" or self.step < 3:
            return
        left = seconds * (self.steps * self.config.epochs - self.step)
        device = self.parameters[0].device
        can = isinstance(self.model, Supernet) and not self.syncs_norms
        worth = can and is_worth_compiling(left, device)
        self.compile = from_first("always" if worth else "never")
        vars(self).pop("one_shot", None)  # it was not compiled

    def gradients(self, x: Tensor, y: Tensor, configs: Sequence[BitConfig]) -> dict[str, Tensor]:
        """Adds up one step's gradients at `configs`; returns its losses and accuracies."""
        with SyncedNorms() if self.syncs_norms else nullcontext():
            return self._gradients(x, y, configs)

    def _gradients(self, x: Tensor, y: Tensor, configs: Sequence[BitConfig]) -> dict[str, Tensor]:
        c, dtype = self.config, getattr(torch, self.dtype)
        if not isinstance(self.model, Supernet):
            return float_gradients(self.model, x, y, c.label_smoothing, dtype)
        late = (self.part - c.grid_start) / max(c.schedule_parts - c.grid_start, 1)
        begun = int(self.part) > c.grid_start
        return self.one_shot.gradients(
            x,
            y,
            self.candidates,
            configs[1:],
            idm_weight=c.idm_weight if c.idm else 0.0,
            grid_weight=cosine(0, c.grid_weight, late) if begun else 0.0,
            smoothing=c.label_smoothing,
            dtype=dtype,
        )

    def describe(self) -> dict:
        """Settings that must match before resuming."""
        about = {f"about[{key!r}]": value for key, value in self.about.items()}
        table = self.model.table if isinstance(self.model, Supernet) else []
        own = {"images": self.images, "tied_inputs": list(map(list, tied_inputs(table)))}
        own |= {f"bits of {info.name!r}": list(map(list, info.candidates)) for info in table}
        if isinstance(self.model, Supernet):
            own["scale_step_gradient"] = self.model.scale_step_gradient
        return asdict(self.config) | own | about

    def save(self, path: Path) -> None:
        """Writes a checkpoint, atomically.

        Raises FloatingPointError, before anything is written, if a weight is not finite.
        """
        check_weights(self.model, f"before {self.when()}")
        save_state(path, self.state())

    def state(self) -> dict:
        """What a checkpoint holds."""
        return {
            "settings": self.describe(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "generator": self.generator.get_state(),
            "candidates": {name: tuple(c) for name, c in self.candidates.items()},
            "first_step_sizes": self.first_step_sizes,
            "history": self.history,
            "dtype": self.dtype,
            "compile": self.compile,
            "step": self.step,
            "epoch": self.epoch and vars(self.epoch),
        }

    def load(self, path: Path) -> None:
        """Continues from the checkpoint that `save` wrote.

        Raises ValueError if the file is damaged or no checkpoint, if it was written under other
        settings (the message names them), or if it does not fit the model.
        """
        state = load_state(path)
        if state.keys() != self.state().keys():
            raise ValueError(
                f"{path} is not a checkpoint of training, or one of another version of mpqlib: "
                "remove it to start anew"
            )
        check_settings(path, state["settings"], self.describe())
        set_tensors(self.model, state["model"], path)
        self.average.load_state_dict(state["average"])
        for own, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own.load_state_dict(saved)
        for own, saved in zip(self.schedules, state["schedules"], strict=True):
            own.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.candidates = {name: Candidates(*c) for name, c in state["candidates"].items()}
        self.first_step_sizes = state["first_step_sizes"].to(self.first_step_sizes.device)
        self.history, self.step = state["history"], state["step"]
        self.dtype, self.compile = state["dtype"], state["compile"]
        self.epoch = state["epoch"] and Epoch(**state["epoch"])


class Checkpoint:
    """The file of a run, which continues from it if it exists; None writes no file.

    `minutes`: between two checkpoints within an epoch. Raises ValueError if it is no number from 0
    on, if `path` cannot be written, or as `Run.load` does.
    """

    def __init__(self, run: Run, path: str | Path | None, minutes: float):
        check_value("checkpoint_minutes", minutes, Real, "a number from 0", lambda v: v >= 0)
        self.run, self.path, self.minutes = run, path and Path(path), minutes
        if self.path:
            check_writable(self.path)
            if self.path.exists():
                run.load(self.path)
            if run.step != (first := from_first(run.step)):
                raise ValueError(
                    f"{self.path} is at step {run.step} here, but at step {first} for the first "
                    "process: all processes must read the same file"
                )
        self.written = time.monotonic()

    def write(self) -> None:
        """Writes the file, in one process alone."""
        if self.path and rank_and_size()[0] == 0:
            self.run.save(self.path)
        self.written = time.monotonic()

    def update(self) -> None:
        """Writes the file within an epoch if its time has come."""
        within = self.run.step % self.run.steps != 0
        if within and time.monotonic() - self.written >= 60 * self.minutes:
            self.write()


def update(run: Run, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Trains on images (N, C, H, W) and labels (N) for one step; returns losses and accuracies.

    Raises FloatingPointError, before the weights move, if a loss or a gradient is not finite.
    """
    configs = run.draw_configs()
    if run.dtype == "auto":
        run.choose_dtype(x, y, configs)
    losses = run.gradients(x, y, configs)
    losses = average_gradients(run.model, losses)
    check_gradients(run.model, losses, run.when())
    nn.utils.clip_grad_value_(run.parameters, run.config.clip_value)
    if isinstance(run.model, Supernet) and run.config.region_decay:
        decay_by_region(run.model, run.config.weight_decay, configs)
    for optimizer, schedule in zip(run.optimizers, run.schedules, strict=True):
        optimizer.step()
        # Fused optimizers do not count that they wrote over parameters; `search.error` reads this.
        increment_version([p for group in optimizer.param_groups for p in group["params"]])
        optimizer.zero_grad()
        schedule.step()
    run.average.update_parameters(run.parameters)
    run.step += 1
    return losses


class Shares(Sampler):
    """This process's share of each batch that is left of the run's epoch, as items of `Batches`.

    As in DistributedSampler, every image is in one share: each process takes the images at its rank
    and at every so many places behind it.
    """

    def __init__(self, run: Run):
        self.run = run

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        run, (rank, world) = self.run, rank_and_size()
        epoch, size = run.epoch, run.config.batch_size // world
        own = epoch.order[rank::world].tolist()
        for step in range(run.step % run.steps, run.steps):
            yield epoch.seed + step * world + rank, own[step * size : (step + 1) * size]


def load_batches(run: Run, dataset: Dataset, device: torch.device, workers: int) -> DataLoader:
    """Loads, in each iteration, what is left of the run's epoch, by `workers` that stay alive."""
    stored = isinstance(dataset, InMemory)  # on the device: nothing to load or to copy
    workers = 0 if stored else workers
    return DataLoader(
        Batches(dataset),
        batch_size=None,  # they are batches already
        sampler=Shares(run),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda" and not stored,  # so that copies wait for nothing
    )


def train_epoch(
    run: Run,
    batches: DataLoader,
    *,
    device: torch.device,
    title: str,
    after_step: Callable[[], object],
) -> None:
    """Runs the steps that are left of the run's epoch, and calls `after_step` after each."""
    epoch, (rank, world) = run.epoch, rank_and_size()
    done = run.step % run.steps
    bar = dict(total=run.steps, initial=done, leave=False, disable=rank > 0)
    started = time.perf_counter() - epoch.seconds
    with torch.random.fork_rng():
        asked = time.perf_counter()
        for x, y in tqdm(batches, title, **bar):
            run.waited += time.perf_counter() - asked
            if isinstance(run.model, Supernet) and (decision := run.choose_candidates()):
                epoch.row["decisions"].append(decision)
            # Dropout, too, depends on the epoch and the step alone.
            torch.manual_seed(epoch.seed - 1 - (run.step % run.steps * world + rank))
            x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
            y = y.to(device, non_blocking=True)
            began = time.perf_counter()
            losses = update(run, x, y)
            run.choose_compile(time.perf_counter() - began)
            for key, value in losses.items():
                epoch.sums[key] = epoch.sums.get(key, 0) + value
            epoch.seconds = time.perf_counter() - started
            after_step()
            asked = time.perf_counter()


def measure_norms(model: nn.Module, dataset: Dataset, device: torch.device, seed: int) -> None:
    """Measures the batch norms of a float network anew, on images as training reads them.

    Averaged weights need this: the statistics of training belong to the last weights. Norms that
    the model itself keeps in eval mode stay as they are. At most
    NORM_IMAGES images are drawn, augmented by `seed`; all processes draw the same ones.
    """
    chosen = torch.tensor(draw(dataset, NORM_IMAGES))
    # No batch of a single image: at 1x1 resolution it has no variance.
    count = max(min(math.ceil(len(chosen) / 128), len(chosen) // 2), 1)
    items = [(seed + i, part.tolist()) for i, part in enumerate(chosen.tensor_split(count))]
    batches = DataLoader(Batches(dataset), batch_size=None, sampler=items)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = {norm: copy.deepcopy(norm.state_dict()) for norm in norms}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        update_bn(batches, model, device)
    for norm in norms:
        if norm.num_batches_tracked == 0:  # it stays in eval mode, or does not run
            norm.load_state_dict(before[norm])
    model.eval()


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 10,
    about: Mapping | None = None,
    workers: int = 0,
    label: str = "training",
    watch: Callable[[Run], object] | None = None,
) -> tuple[nn.Module, list[dict]]:
    """Trains a float model, or a Supernet one-shot; returns its averaged copy and its history.

    The batch norms of a float model's averaged copy are measured on training images at the end. A
    Supernet is to be recalibrated at each configuration: see `evaluate`.

    `dataset`: items (image (C, H, W), label); augmentation must draw from torch's global generator.
    Images in memory (`data.InMemory`) are moved to the device once, and need no workers.
    `checkpoint`: a file that is written after each epoch, and within an epoch when
    `checkpoint_minutes` have passed since the last time. If the file exists, training resumes from
    it and gives the same numbers, bit for bit (CPU), as without interruption. Other initial weights
    or other images of the same number are not noticed then: say in `about` where both come from.
    Only one training at a time may write a checkpoint. `about`: further settings that must match
    before resuming, such as the names of model and data. `workers`: processes that load images,
    which each training process has for itself; they do not change the numbers. `label`: title of
    the progress bar. `watch`: called with the Run after every step.

    In several processes of torch.distributed, each trains on its share of every batch. All call
    `train` with the same arguments and hold the same weights; the first one writes the checkpoint
    and all read it. With `sync_norms` they compute what one process would, except for rounding and
    for the random numbers of augmentation and dropout, of which each process draws its own. The
    rounding of a supernet's values to grids enlarges a difference in the last digit: after 36 small
    steps of test_resnet in float64, mean losses differed by up to 0.1 (a float network: 1e-15). So
    another number of processes acts like another seed. RFQuant's release has no `sync_norms`: its
    batch norms use each GPU's share. Losses are means over all images, accuracies too.

    The history has one dict for each epoch: `epoch` (from 1), mean losses and accuracies,
    `seconds`, the `dtype` of the run, and for a Supernet `decisions`, a list with a dict for each
    decision of the scheduler: the `step` (from 0), the `turbulence` of layers and the `frozen`
    ones; and `steps_moved`, the mean relative change of the quantizers' step sizes since the start.

    Raises ValueError for a checkpoint that is damaged, was written under other settings, does not
    fit the model or cannot be written, for fewer images than one batch, for items that are no
    (image, label), for images of another type than the model's, for bfloat16 with candidates above
    8 bits, for outputs that are no logits (N, classes), and for labels that are not int64 or, on
    the CPU, no class of the model.
    Raises FloatingPointError, with epoch, step and layer, when losses, gradients or weights become
    NaN or infinite; the checkpoint stays as it was.
    """
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config={config!r} is not allowed: a TrainConfig is needed")
    check_dataset("dataset", dataset, model)
    check_value("workers", workers, Integral, "a whole number from 0", lambda v: v >= 0)
    device = select_device(device)
    model = move_channels_last(model, device).train()
    model.zero_grad()  # a gradient from before would count in the first step
    copy_from_first([*model.parameters(), *model.buffers()])
    if isinstance(dataset, InMemory):
        dataset = dataset.to(device)
    run = Run.start(config, model, len(dataset), about)
    saved = Checkpoint(run, checkpoint, checkpoint_minutes)
    batches = load_batches(run, dataset, device, workers)

    def after_step() -> None:
        if watch:
            watch(run)
            model.train()  # `batch_error`, for one, puts it into eval mode
        saved.update()

    try:
        while len(run.history) < config.epochs:
            if run.epoch is None:
                run.start_epoch()
            title = f"{label}, epoch {len(run.history) + 1} of {config.epochs}"
            train_epoch(run, batches, device=device, title=title, after_step=after_step)
            check_weights(model, f"after epoch {len(run.history) + 1} of {config.epochs}")
            run.end_epoch()
            saved.write()
    finally:
        if isinstance(model, Supernet):
            run.one_shot.remove()
    copy_from_first(model.buffers())  # without `sync_norms`, each process has statistics of its own
    averaged = averaged_model(model, run.average)
    if run.step and not isinstance(model, Supernet):
        measure_norms(averaged, dataset, device, config.seed)
    return averaged, run.history
