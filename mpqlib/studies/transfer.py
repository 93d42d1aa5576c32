"""Fine-tunes a trained supernet on other classes, beside a float network and a new supernet.

Source: RFQuant (arXiv 2401.01543), transfer. On the target, all networks of a seed have the same
number of image passes: images that a forward and a backward pass run through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Subset

from ..data import DATASETS, Splits, load, select_classes
from ..files import remembered
from ..models import create
from ..network.bits import BitConfig
from ..network.classifier import copy_all_but_last
from ..network.cost import bitops_at
from ..network.supernet import Supernet
from ..report.claims import differences
from ..report.intervals import t_interval, top1_interval
from ..report.plots import differences_plot
from ..report.runs import measure
from ..report.tables import markdown_table, show_markdown
from ..search.assignment import front
from ..search.error import batch_error
from ..training.evaluation import decoded, evaluate
from ..training.loop import TrainConfig, train
from .parameters import (
    NAME,
    OPTIONS,
    WIDTH,
    Rule,
    check_parameters,
    check_training,
    items,
    one_of,
    optional,
    whole,
)

if TYPE_CHECKING:
    from IPython.display import Markdown

FINE_TUNED = ("float", "transferred", "new")  # that are fine-tuned on the target
COSTS = {"bitops_g": "BitOPs (G)", "size_mb": "size (MB)"}  # column of the metrics -> its head


# Options of `load_classes`, without root and image_size
DATA_OPTIONS = ("dataset", "classes", "train_images", "search_share", "download", "memory_gb")
DATA_OPTIONS += ("mean", "std", "interpolation", "crop_pct")


def _are_data(value: object) -> bool:
    """Whether these are options of `load_classes`, the data set among them."""
    right = isinstance(value, Mapping) and "dataset" in value and set(value) <= set(DATA_OPTIONS)
    classes = optional(items(NAME))
    return (
        right and one_of(DATASETS).holds(value["dataset"]) and classes.holds(value.get("classes"))
    )


DATA_RULE = Rule(f"a dict with 'dataset' and others of {list(DATA_OPTIONS)}", _are_data)
TRANSFER_RULES = {
    "source": DATA_RULE,
    "target": DATA_RULE,
    "level": WIDTH,
    "target_epochs": whole(2),
    "first_epochs": whole(1),
    "search_images": whole(2),
    "fine_tuning": OPTIONS,
}


def load_classes(
    dataset: str, classes: list[str] | None = None, root: str | Path = "data", **options
) -> Splits:
    """A data set, or some of its classes. `options`: of `data.load`. None: all classes."""
    splits = load(dataset, root, **options)
    return splits if classes is None else select_classes(splits, classes)


@dataclass(frozen=True)
class Recipe:
    """Settings that all networks of the study share.

    Raises ValueError for a value that is not allowed, and TypeError for an unknown option.
    """

    model: str
    source: dict  # options of `load_classes`, without root and image_size
    target: dict
    image_size: int  # side in pixels
    bits: list[int]  # candidates
    level: int  # the budget: BitOPs of this many bits in every searchable layer, one of `bits`
    float_epochs: int  # on the source
    epochs: int  # of the supernet on the source
    target_epochs: int  # of the transferred supernet
    first_epochs: int  # of these, the passes that go to the float network of the new supernet
    search_images: int  # images that searches score on
    pretrained: bool = False  # the float network starts from the weights of its library
    training: dict = field(default_factory=dict)  # options of TrainConfig
    fine_tuning: dict = field(default_factory=dict)  # other options on the target
    recalibration_images: int = 2000  # training images for batch-norm statistics

    def __post_init__(self):
        check_parameters(TRANSFER_RULES, **vars(self))
        check_training("fine_tuning", self.fine_tuning)
        if self.level not in self.bits:
            raise ValueError(f"level={self.level!r} is not allowed: one of bits={self.bits}")
        if not 0 < self.first_epochs < self.target_epochs:
            raise ValueError(
                f"first_epochs={self.first_epochs!r} is not allowed: from 1, and less than "
                f"target_epochs={self.target_epochs!r}"
            )
        self.target_config(self.target_epochs, seed=0)

    def source_config(self, epochs: int, seed: int) -> TrainConfig:
        """How networks are trained on the source."""
        return TrainConfig(epochs=epochs, seed=seed, **self.training)

    def target_config(self, epochs: int, seed: int) -> TrainConfig:
        """How networks are fine-tuned on the target."""
        return TrainConfig(epochs=epochs, seed=seed, **self.training | self.fine_tuning)

    @property
    def passes_per_step(self) -> int:
        """Passes that a supernet makes where a float network makes one, on the target."""
        return 1 + self.target_config(0, seed=0).random_paths


@dataclass(frozen=True)
class Transfer:
    """The networks of the study and what is measured of them; resumes from files in `folder`.

    `source`, `target`: from `load_classes`. `workers`: processes that load images.
    """

    recipe: Recipe
    source: Splits
    target: Splits
    folder: Path
    device: torch.device
    workers: int = 0

    def train(
        self, network: nn.Module, splits: Splits, config: TrainConfig, name: str
    ) -> tuple[nn.Module, int]:
        """Trains a network with the checkpoint `name`; returns it and its image passes."""
        name = f"{name}-{config.seed}"
        how = dict(device=self.device, workers=self.workers, label=name, about=asdict(self.recipe))
        how |= dict(checkpoint=self.folder / f"{name}.safetensors")
        steps = config.epochs * (len(splits.train) // config.batch_size)
        passes = 1 + config.random_paths if isinstance(network, Supernet) else 1
        network, _ = train(network, splits.train, config, **how)
        return network, steps * config.batch_size * passes

    def build_supernet(self, network: nn.Module, splits: Splits) -> Supernet:
        """Converts a float network; training images set the initial steps."""
        images = min(len(splits.calibration), self.recipe.source_config(0, 0).batch_size)
        examples = decoded(Subset(splits.calibration, range(images))).tensors[0]
        return Supernet(network.to(self.device), examples.to(self.device), self.recipe.bits)

    def train_float(self, seed: int) -> nn.Module:
        """The float network of the source."""
        recipe = self.recipe
        torch.manual_seed(seed)
        network = create(recipe.model, len(self.source.classes), recipe.pretrained)
        config = recipe.source_config(recipe.float_epochs, seed)
        return self.train(network, self.source, config, "source-float")[0]

    def train_supernet(self, seed: int) -> Supernet:
        """The supernet of the source."""
        supernet = self.build_supernet(self.train_float(seed), self.source)
        config = self.recipe.source_config(self.recipe.epochs, seed)
        return self.train(supernet, self.source, config, "source-supernet")[0]

    def start_float(self, seed: int) -> nn.Module:
        """The float network of the source with a new last layer for the target, the same for all.

        It is not fine-tuned yet.
        """
        torch.manual_seed(seed)
        network = create(self.recipe.model, len(self.target.classes))
        copy_all_but_last(self.train_float(seed), network)
        return network.eval()

    def fine_tune_float(self, seed: int) -> tuple[nn.Module, int]:
        """Fine-tunes the float network; returns it and its image passes on the target."""
        epochs = self.recipe.target_epochs * self.recipe.passes_per_step
        config = self.recipe.target_config(epochs, seed)
        return self.train(self.start_float(seed), self.target, config, "float")

    def fine_tune_supernet(self, seed: int) -> tuple[Supernet, int]:
        """Fine-tunes the supernet of the source; returns it and its image passes on the target."""
        supernet = self.build_supernet(self.start_float(seed), self.target)
        copy_all_but_last(self.train_supernet(seed), supernet)
        config = self.recipe.target_config(self.recipe.target_epochs, seed)
        return self.train(supernet, self.target, config, "transferred")

    def train_new_supernet(self, seed: int) -> tuple[Supernet, int]:
        """A supernet of the target alone; returns it and its image passes on the target.

        The float network of the source is fine-tuned for the passes of the first epochs. Then it
        becomes a supernet, which is trained for the other epochs.
        """
        recipe = self.recipe
        first = recipe.target_config(recipe.first_epochs * recipe.passes_per_step, seed)
        network, before = self.train(self.start_float(seed), self.target, first, "new-float")
        supernet = self.build_supernet(network, self.target)
        config = recipe.target_config(recipe.target_epochs - recipe.first_epochs, seed)
        supernet, passes = self.train(supernet, self.target, config, "new")
        return supernet, before + passes

    def search(self, supernet: Supernet, splits: Splits) -> BitConfig:
        """The policy that an integer program assigns at the budget, on images of `splits.search`.

        These images are neither trained on nor tested on.
        """
        images = min(len(splits.search), self.recipe.search_images)
        x, y = decoded(Subset(splits.search, range(images))).tensors
        error = batch_error(supernet, x.to(self.device), y.to(self.device))
        return front(supernet, error, [bitops_at(supernet.table, self.recipe.level)])[0].config

    def measure_float(self, seed: int) -> list[dict]:
        """The row of the float network."""
        network, passes = self.fine_tune_float(seed)
        searched = evaluate(network, self.target.search, device=self.device)
        tested = evaluate(network, self.target.test, device=self.device)
        found = {"search_top1": 100 * searched.top1, **top1_interval(tested.correct)}
        return [{"arm": "float", "passes": passes, **found}]

    def measure_transferred(self, seed: int) -> list[dict]:
        """Rows of the transferred supernet: searched on the target, uniform bits, source's policy.

        The policy of the source is the one that is searched there, in the supernet of the source.
        """
        supernet, passes = self.fine_tune_supernet(seed)
        policies = {
            "searched": self.search(supernet, self.target),
            "uniform": supernet.uniform(self.recipe.level),
            "source policy": self.search(self.train_supernet(seed), self.source),
        }
        return self.measure_policies(supernet, passes, policies)

    def measure_new(self, seed: int) -> list[dict]:
        """The row of the new supernet, searched on the target."""
        supernet, passes = self.train_new_supernet(seed)
        policies = {"new supernet": self.search(supernet, self.target)}
        return self.measure_policies(supernet, passes, policies)

    def measure_policies(
        self, supernet: Supernet, passes: int, policies: Mapping[str, BitConfig]
    ) -> list[dict]:
        """One row for each policy, by arm; column `bits` is the policy as JSON."""
        how = dict(images=self.recipe.recalibration_images, device=self.device)
        return [
            {"arm": arm, "passes": passes, "bits": config.to_json()}
            | measure(supernet, config, self.target, **how)
            for arm, config in policies.items()
        ]

    def run(self, network: str, seed: int) -> list[dict]:
        """Rows of one of FINE_TUNED and a seed; trains and measures it unless they are stored."""
        measured = {
            "float": self.measure_float,
            "transferred": self.measure_transferred,
            "new": self.measure_new,
        }[network]

        def compute() -> list[dict]:
            return [{"seed": seed, "level": self.recipe.level} | row for row in measured(seed)]

        return remembered(self.folder / f"{network}-{seed}.json", asdict(self.recipe), compute)


def transfer_table(metrics: pd.DataFrame) -> Markdown:
    """One line for each arm, with means over seeds and 95% t-intervals; see `Transfer.run`.

    Measured numbers follow an \u2248 sign.
    """
    in_float = metrics[metrics["arm"] == "float"].set_index("seed")["top1"]

    def interval(values: pd.Series, form: str) -> str:
        mean, low, high = t_interval(values)
        bounds = f" \u2248 [{low:{form}}, {high:{form}}]" if len(values) > 1 else ""
        return f"\u2248 {mean:{form}}{bounds}"

    lines = []
    for arm, rows in metrics.groupby("arm", sort=False):
        rows = rows.set_index("seed")
        quantized = rows["bitops_g"].notna().all()
        costs = [f"\u2248 {rows[c].mean():.3g}" if quantized else "" for c in COSTS]
        apart = "" if arm == "float" else interval(rows["top1"] - in_float, "+.1f")
        passes = f"{rows['passes'].iloc[0]:,}"
        lines.append([arm, passes, *costs, interval(rows["top1"], ".1f"), apart])
    heads = ["arm", "image passes", *COSTS.values(), "test top-1 (%)", "minus float (points)"]
    return show_markdown(markdown_table(heads, lines))


def below_float_plot(metrics: pd.DataFrame, margin: float = 1.0) -> Figure:
    """Test top-1 of each quantized arm minus that of the float network, paired by seed.

    `metrics`: rows of `Transfer.run`. The dashed line is `margin` points below float.
    """
    found = differences(metrics, "top1", "float", "level")
    label = "test top-1 minus that of the float network (points), 95% interval"
    figure = differences_plot(found, "compared", label)
    figure.axes[0].axvline(-margin, color="0.6", linestyle="--", linewidth=1)
    figure.axes[0].set(ylabel="")
    return figure
