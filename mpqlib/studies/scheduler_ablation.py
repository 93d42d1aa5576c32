"""Scheduler and IDM, each on or off: train four arms, search policies and measure them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from numbers import Integral, Real
from pathlib import Path

import torch

from ..data import Splits
from ..files import remembered
from ..models import create
from ..network.bits import check_bits
from ..network.cost import bitops_at
from ..network.supernet import Supernet
from ..report.runs import measure
from ..search.error import batch_error
from ..search.greedy import check_options, greedy
from ..training.evaluation import decoded
from ..training.loop import TrainConfig, train

ARMS = {
    "plain": dict(scheduler=False, idm=False),
    "scheduler": dict(scheduler=True, idm=False),
    "IDM": dict(scheduler=False, idm=True),
    "both": dict(scheduler=True, idm=True),
}

# Smallest value of numbers in Setting.
LEAST_VALUES = {
    "train_images": 1,
    "image_size": 1,
    "float_epochs": 0,
    "epochs": 0,
    "freeze_start": 0,
    "freeze_every": 1,
    "batch_size": 1,
    "lr": 0,
    "search_images": 1,
    "warmup_epochs": 0,
    "recalibration_images": 2,
}


@dataclass(frozen=True)
class Setting:
    """Settings that all arms of an ablation share, but for the seed.

    Raises ValueError for a value that is not allowed, and TypeError for an unknown setting or
    option of `greedy`.
    """

    model: str
    dataset: str
    train_images: int | None  # None: all
    search_share: float  # share of the training images held out for the search
    image_size: int  # side in pixels
    bits: list[int]
    levels: list[float]  # budgets, as in `bitops_at`
    float_epochs: int
    epochs: int
    freeze_start: int
    freeze_every: int
    batch_size: int
    lr: float  # peak learning rate
    search_images: int  # images that searches score on
    search: dict  # options of `greedy`
    warmup_epochs: float = 1
    recalibration_images: int = 2000  # training images for batch-norm statistics

    def __post_init__(self):
        for setting in fields(self):
            _check_setting(setting.name, getattr(self, setting.name), setting.type)
        check_options(**self.search)

    @property
    def about(self) -> dict:
        """Settings that the checkpoints of all arms share, beside their TrainConfig."""
        names = ("model", "dataset", "train_images", "image_size", "search_share", "bits")
        return {name: getattr(self, name) for name in names}

    @property
    def training(self) -> dict:
        """Options of TrainConfig that the float network and the supernet share."""
        return dict(batch_size=self.batch_size, lr=self.lr, warmup_epochs=self.warmup_epochs)


def _is_number(value: object, kind: type, least: float) -> bool:
    """Whether a value is a finite number of a kind (`int` or `float`), at least `least`."""
    right = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return right and least <= value < inf


def _check_setting(name: str, value: object, kind: type) -> None:
    """Raises ValueError if a setting has a value that is not allowed."""
    if name == "bits":
        check_bits(name, value)
        return
    if name in ("model", "dataset"):
        right, allowed = isinstance(value, str), "a name"
    elif name == "search":
        right, allowed = isinstance(value, Mapping), "options of greedy, such as {'rule': 'paper'}"
    elif name == "levels":
        right = isinstance(value, (list, tuple)) and all(_is_number(v, float, 1) for v in value)
        right, allowed = right and len(value) > 0, "one or more numbers, such as [2.5, 3]"
    elif name == "search_share":
        right = _is_number(value, float, 0) and 0 < value < 1
        allowed = "a number between 0 and 1"
    elif name == "train_images" and value is None:
        return
    else:
        kind = float if kind is float else int
        least = LEAST_VALUES[name]
        right = _is_number(value, kind, least)
        allowed = f"a {'whole ' if kind is int else ''}number, at least {least}"
    if not right:
        raise ValueError(f"{name}={value!r} is not allowed: {allowed}")


def load_into_memory(splits: Splits) -> Splits:
    """Returns `splits` with all images that are not augmented decoded once and kept in memory."""
    parts = ("calibration", "search", "test")
    return replace(splits, **{part: decoded(getattr(splits, part)) for part in parts})


def train_arm(
    setting: Setting, splits: Splits, arm: str, seed: int, folder: Path, device: torch.device
) -> Supernet:
    """Trains the supernet of one arm and seed, from the float network that all arms share.

    Resumes from the checkpoints in `folder`. Raises ValueError for an unknown arm.
    """
    if arm not in ARMS:
        raise ValueError(f"arm={arm!r} is not allowed: one of {list(ARMS)}")
    options = dict(device=device, about=setting.about)
    torch.manual_seed(seed)
    network = create(setting.model, len(splits.classes))
    config = TrainConfig(epochs=setting.float_epochs, seed=seed, **setting.training)
    files = dict(checkpoint=folder / f"float-{seed}.pt", label=f"float, seed {seed}")
    network, _ = train(network, splits.train, config, **options, **files)
    examples = splits.calibration[: setting.batch_size][0].to(device)
    freezing = dict(freeze_start=setting.freeze_start, freeze_every=setting.freeze_every)
    config = TrainConfig(
        epochs=setting.epochs, seed=seed, **setting.training, **freezing, **ARMS[arm]
    )
    files = dict(checkpoint=folder / f"{arm}-{seed}.pt", label=f"{arm}, seed {seed}")
    supernet = Supernet(network, examples, setting.bits)
    return train(supernet, splits.train, config, **options, **files)[0]


def measure_policies(
    setting: Setting, splits: Splits, supernet: Supernet, device: torch.device
) -> dict[str, Mapping[str, float]]:
    """Measures the policy searched at each level, and the uniform configurations, by name."""
    x, y = (t.to(device) for t in splits.search[: setting.search_images])
    error, configs = batch_error(supernet, x, y), {}
    for level in setting.levels:
        budget = bitops_at(supernet.table, level)
        configs[f"searched {level}"] = greedy(supernet, error, budget, **setting.search)[-1].config
    configs |= {f"uniform {b}": supernet.uniform(b) for b in setting.bits}
    how = dict(images=setting.recalibration_images, device=device)
    return {name: measure(supernet, config, splits, **how) for name, config in configs.items()}


def run_arm(
    setting: Setting, splits: Splits, arm: str, seed: int, folder: Path, device: torch.device
) -> list[dict]:
    """Trains one arm and seed and measures its policies; returns one row per configuration.

    `splits`: from `load_into_memory`. The checkpoint and the rows are kept in `folder`: a second
    call reads them.
    """

    def compute() -> list[dict]:
        supernet = train_arm(setting, splits, arm, seed, folder, device)
        found = measure_policies(setting, splits, supernet, device)
        return [{"arm": arm, "seed": seed, "configuration": n} | row for n, row in found.items()]

    return remembered(folder / f"{arm}-{seed}.json", asdict(setting), compute)
