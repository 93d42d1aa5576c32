"""Scheduler and IDM, each on or off: networks trained alike but for them, searched and measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..data import Splits
from ..files import remembered
from ..models import create
from ..network.cost import bitops_at
from ..network.supernet import Supernet
from ..report.runs import measure
from ..search.error import batch_error
from ..search.greedy import greedy
from ..training.evaluation import decoded
from ..training.loop import TrainConfig, train

ARMS = {
    "plain": dict(scheduler=False, idm=False),
    "scheduler": dict(scheduler=True, idm=False),
    "IDM": dict(scheduler=False, idm=True),
    "both": dict(scheduler=True, idm=True),
}


@dataclass(frozen=True)
class Setting:
    """All that the arms of an ablation share, but for the seed."""

    model: str
    dataset: str
    train_images: int | None
    search_share: float
    image_size: int
    bits: list[int]
    levels: list[float]  # budgets: the BitOPs of so many bits everywhere
    float_epochs: int
    epochs: int
    freeze_start: int
    freeze_every: int
    batch_size: int
    lr: float
    search_images: int
    search: dict  # options of `greedy`
    warmup_epochs: float = 1

    @property
    def about(self) -> dict:
        """What the checkpoints of all arms must agree on, beside their training configuration."""
        names = ("model", "dataset", "train_images", "image_size", "search_share", "bits")
        return {name: getattr(self, name) for name in names}

    @property
    def training(self) -> dict:
        """Options of TrainConfig that the float network and the supernet share."""
        return dict(batch_size=self.batch_size, lr=self.lr, warmup_epochs=self.warmup_epochs)


def in_memory(splits: Splits) -> Splits:
    """`splits` with the images that are not augmented decoded once and kept."""
    parts = ("calibration", "search", "test")
    return replace(splits, **{part: decoded(getattr(splits, part)) for part in parts})


def trained(
    setting: Setting, splits: Splits, arm: str, seed: int, folder: Path, device: torch.device
) -> Supernet:
    """The supernet of one arm and seed; the float network it starts from is all arms' own."""
    options = dict(device=device, about=setting.about)
    torch.manual_seed(seed)
    network = create(setting.model, len(splits.classes))
    config = TrainConfig(epochs=setting.float_epochs, seed=seed, **setting.training)
    files = dict(checkpoint=folder / f"float-{seed}.pt", label=f"float, seed {seed}")
    network, _ = train(network, splits.train, config, **options, **files)
    examples = splits.calibration[: setting.batch_size][0].to(device)
    rhythm = dict(freeze_start=setting.freeze_start, freeze_every=setting.freeze_every)
    config = TrainConfig(
        epochs=setting.epochs, seed=seed, **setting.training, **rhythm, **ARMS[arm]
    )
    files = dict(checkpoint=folder / f"{arm}-{seed}.pt", label=f"{arm}, seed {seed}")
    supernet = Supernet(network, examples, setting.bits)
    return train(supernet, splits.train, config, **options, **files)[0]


def measured(
    setting: Setting, splits: Splits, supernet: Supernet, device: torch.device
) -> dict[str, Mapping[str, float]]:
    """What the policies searched at every level and the uniform ones reach, by name."""
    batch = (t.to(device) for t in splits.search[: setting.search_images])
    error, configs = batch_error(supernet, *batch), {}
    for level in setting.levels:
        budget = bitops_at(supernet.table, level)
        configs[f"searched {level}"] = greedy(supernet, error, budget, **setting.search)[-1].config
    configs |= {f"uniform {b}": supernet.uniform(b) for b in setting.bits}
    return {n: measure(supernet, c, splits, images=2000, device=device) for n, c in configs.items()}


def study(
    setting: Setting, splits: Splits, arm: str, seed: int, folder: Path, device: torch.device
) -> list[dict]:
    """One row for every configuration of one arm and seed, remembered in `folder`.

    `splits`: `in_memory`. The network is trained once; its checkpoint and its rows are kept.
    """

    def compute() -> list[dict]:
        supernet = trained(setting, splits, arm, seed, folder, device)
        found = measured(setting, splits, supernet, device)
        return [{"arm": arm, "seed": seed, "configuration": n} | row for n, row in found.items()]

    return remembered(folder / f"{arm}-{seed}.json", asdict(setting), compute)
