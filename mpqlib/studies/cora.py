"""Compares CoRa's adapters: with and without, searched and uniform ranks, at equal size.

Source: CoRa (arXiv 2408.00923). Each row of the metrics is one call of `cora`.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from ..data import load
from ..models import create
from ..network.bits import Candidates, check_bits
from ..network.quantizer import GRANULARITIES
from ..network.supernet import Supernet
from ..report.intervals import correct_text, t_interval, top1_interval
from ..report.plots import ARM_COLOURS
from ..report.tables import markdown_table, show_markdown
from ..search.assignment import quick_table, solve
from ..search.error import batch_error, without_nan
from ..search.limits import check_count
from ..training.evaluation import decoded, evaluate
from ..training.loop import TrainConfig, train
from .adapters import FLOAT_BITS, convolutions
from .imagenet import CLASSES, draw_halves, load_halves
from .parameters import check_parameters, check_training
from .ranks import check_cora_options, cora

if TYPE_CHECKING:
    from IPython.display import Markdown

PRETRAINED = "imagenet-val"  # a data set: halves of ImageNet's validation images, no training
TABLE_COLUMNS = {  # columns that the table shows: column -> head
    "added_percent": "added weights (%)",
    "equivalent_bits": "equivalent bits",
    "size_mb": "size (MB)",
    "bitops_g": "BitOPs (G)",
    "seconds": "time (s)",
}


# Options of `cora` that the studies do not set themselves: of the weights, and of the search
WEIGHT_OPTIONS = ("granularity", "deviations", "recalibrate")
SEARCH_OPTIONS = ("iterations", "batch_size", "norms_per_batch", "lr", "clip", "gamma")
SEARCH_OPTIONS += ("order", "start")
SIZE_STUDIES = ("depth-wise", "mixed")
# Settings without a meaning for PRETRAINED
OF_TRAINING = ("image_size", "train_images", "calibration_images", "training")


@dataclass(frozen=True)
class AdapterSetting:
    """Settings of the study, checked before anything is trained.

    The notebook `10_cora` describes each. Raises ValueError for a value that is not allowed. Model,
    data set, and the size and number of training images are checked by `load_subject`.
    """

    model: str
    dataset: str
    image_size: int
    train_images: int | None
    calibration_images: int
    training: Mapping
    bits: list[int]
    budget: float
    recovery: Mapping
    options: Mapping
    search: Mapping | None
    equal_bits: Mapping
    candidates: list[int]
    policy_images: int
    seeds: list[int]

    def __post_init__(self):
        for name in ("calibration_images", "policy_images"):
            check_count(name, getattr(self, name), 1)
        check_training("training", self.training, own=("seed",))
        for name in ("bits", "candidates"):
            given = getattr(self, name)
            if len(check_bits(name, given)) < len(given) or not isinstance(given, list):
                raise ValueError(f"{name}={given!r} is not allowed: a list, none may stand twice")
        check_cora_options(budget=self.budget)
        _check_names("recovery", self.recovery, ("granularity", "recalibrate"))
        for name, values in self.recovery.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"recovery[{name!r}]={values!r} is not allowed: a list of values")
            for value in values:
                check_cora_options(**{name: value})
        _check_names("options", self.options, WEIGHT_OPTIONS)
        check_cora_options(**self.options)
        if self.search is not None:
            _check_names("search", self.search, SEARCH_OPTIONS)
            check_cora_options(**self.search)
            check_count("search['iterations']", self.search.get("iterations"), 1)
        _check_names("equal_bits", self.equal_bits, SIZE_STUDIES)
        for name, size in self.equal_bits.items():
            if not isinstance(size, Real) or isinstance(size, bool) or not 2 <= size <= 16:
                raise ValueError(f"equal_bits[{name!r}]={size!r} is not allowed: bits from 2 to 16")
        if "mixed" in self.equal_bits:
            self._check_mixed(self.equal_bits["mixed"])
        check_parameters(seeds=self.seeds)

    def _check_mixed(self, size: int) -> None:
        """Raises ValueError unless bits, equal or mixed, and adapters fit into `size`."""
        fewest = min(self.candidates) + 8 * self.budget
        if not isinstance(size, Integral) or not max(3, fewest) <= size <= 16:
            raise ValueError(
                f"equal_bits['mixed']={size!r} is not allowed: a whole number from 3 to 16, at "
                f"least {fewest:g}, which the fewest candidates need with adapters of 8 bits"
            )

    @property
    def applied(self) -> dict:
        """The settings by name; for PRETRAINED without those of training, which do not apply."""
        skipped = OF_TRAINING if self.dataset == PRETRAINED else ()
        return {name: value for name, value in asdict(self).items() if name not in skipped}


def _check_names(name: str, options: Mapping, known: Sequence[str]) -> None:
    """Raises ValueError unless `options`, the setting `name`, is a mapping of `known` names."""
    if not isinstance(options, Mapping) or any(key not in known for key in options):
        raise ValueError(f"{name}={options!r} is not allowed: a dict with keys of {list(known)}")


@dataclass(frozen=True)
class Subject:
    """A float network, images to calibrate on and images to test on, both in memory.

    `places`: of the test images among those of all seeds; None: all seeds have the same.
    """

    network: nn.Module
    calibration: TensorDataset
    test: TensorDataset
    places: Tensor | None = None


def load_subject(
    model: str,
    dataset: str,
    data_root: str | Path,
    seed: int,
    *,
    config: TrainConfig,
    image_size: int = 32,
    train_images: int | None = None,
    calibration_images: int = 1600,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
) -> Subject:
    """Loads a pretrained network, or trains one, and draws its calibration images.

    `model`: a name that `models.create` knows. `dataset`: PRETRAINED reads `data_root`/val/<wnid>/*
    at the model's own preprocessing; a random half calibrates, the other half tests, and the
    network has the weights of its library. Any other name is one of `data.load`: the network is
    trained as `config` says, calibrates on `calibration_images` of its training images and is
    tested on the test split. `seed`: of the halves, or of training and calibration images.
    `checkpoint`: of the training. Raises as `imagenet_val`, `load`, `create` and `train` do.
    """
    if dataset == PRETRAINED:
        halves = load_halves(model, data_root, seed)
        _, places = draw_halves(len(halves.calibration) + len(halves.test), seed)
        network = create(model, CLASSES, pretrained=True)
        return Subject(network, halves.calibration, halves.test, places)
    splits = load(dataset, data_root, image_size, train_images=train_images)
    torch.manual_seed(seed)
    network = create(model, len(splits.classes))
    config, about = replace(config, seed=seed), dict(model=model, dataset=dataset)
    how = dict(device=device, checkpoint=checkpoint, about=about, label="float")
    network, _ = train(network, splits.train, config, **how)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(splits.calibration), generator=generator)
    calibration = Subset(splits.calibration, order[:calibration_images].tolist())
    return Subject(network, decoded(calibration), decoded(splits.test))


@dataclass(frozen=True)
class Trial:
    """One network to measure: the study and the arm that it belongs to, and options of `cora`."""

    study: str
    arm: str
    options: Mapping


def trials_of_recovery(
    bits: Sequence[int],
    budget: float,
    options: Mapping,
    granularity: Sequence[str] = GRANULARITIES,
    recalibrate: Sequence[bool] = (False, True),
) -> list[Trial]:
    """The float network; then each bit-width and setting, without and with adapters.

    The adapters have uniform ranks, so that no search has a part in this. `budget`, and the entries
    of `granularity` and `recalibrate`: as in `cora`. `options`: others of `cora`, for all trials.
    """
    trials = [Trial("float", "float", dict(bits=FLOAT_BITS, budget=0))]
    for width, per, again in product(bits, granularity, recalibrate):
        own = dict(bits=width, granularity=per, recalibrate=again, iterations=0)
        how = dict(options) | own
        trials.append(Trial("recovery", "quantized", how | dict(budget=0)))
        trials.append(Trial("recovery", "adapters", how | dict(budget=budget)))
    return trials


def trials_of_ranks(bits: Sequence[int], budget: float, options: Mapping) -> list[Trial]:
    """Uniform ranks, ranks searched by labels, and by the float network as teacher, per bit-width.

    `options`: of `cora`, among them the iterations of the search.
    """
    arms = {"uniform": dict(iterations=0), "searched": {}, "searched, teacher": dict(teacher=True)}
    return [
        Trial("ranks", arm, dict(options) | dict(bits=width, budget=budget) | own)
        for width in bits
        for arm, own in arms.items()
    ]


def mean_bits(network: nn.Module, bits: Mapping[str, int]) -> float:
    """Mean bits of the weights of all convolutions, without adapters."""
    weights = {name: conv.weight.numel() for name, conv in convolutions(network).items()}
    return sum(bits[name] * count for name, count in weights.items()) / sum(weights.values())


def trials_at_size(
    network: nn.Module,
    study: str,
    equal_bits: float,
    arms: Mapping[str, Mapping],
    options: Mapping,
    adapter_bits: int = 8,
) -> list[Trial]:
    """Trials of equal total size: what an arm's weights leave of `equal_bits` goes to adapters.

    `equal_bits`: equivalent bits, so all bits per weight of the convolutions. `arms`: options of
    `cora` by arm, with a mapping `bits`; a given `budget` stays as it is. Raises ValueError if the
    weights of an arm alone are larger, or if adapters would hold more weights than convolutions.
    """
    trials = []
    for arm, own in arms.items():
        left = equal_bits - mean_bits(network, own["bits"])
        if left < -1e-9:
            raise ValueError(
                f"equal_bits={equal_bits} is not allowed: the weights of {arm!r} take "
                f"{equal_bits - left:.3f} bits"
            )
        budget = dict(budget=max(0.0, left) / adapter_bits) | own
        if budget["budget"] > 1:
            raise ValueError(
                f"equal_bits={equal_bits} is not allowed: it leaves {left:.3f} bits beside the "
                f"weights of {arm!r}, and adapters take {adapter_bits} at most"
            )
        trials.append(Trial(study, arm, dict(options) | budget))
    return trials


def depthwise_arms(network: nn.Module, bits: int, equal_bits: float) -> dict[str, dict]:
    """Ways to treat depth-wise convolutions, for `trials_at_size`; none if there are none.

    All other convolutions have `bits` and adapters. "shared filters": so have they. The last two
    treat all convolutions alike. "one bit more": with adapters. "bits alone": `equal_bits`, without
    adapters; of a number that is not whole, the next lower one.
    """
    convs = convolutions(network)
    names = [name for name, c in convs.items() if c.groups == c.in_channels > 1]

    def at(width: int) -> dict[str, int]:
        return dict.fromkeys(convs, bits) | dict.fromkeys(names, width)

    if not names:
        return {}
    return {
        "shared filters": dict(bits=at(bits)),
        "no adapters": dict(bits=at(bits), exempt=names),
        "8 bits": dict(bits=at(8), exempt=names),
        "float weights": dict(bits=at(FLOAT_BITS)),
        "one bit more": dict(bits=dict.fromkeys(convs, bits + 1)),
        "bits alone": dict(bits=dict.fromkeys(convs, int(equal_bits)), budget=0),
    }


def assign_bits(
    network: nn.Module, images: Tensor, labels: Tensor, means: Sequence[float], bits: Sequence[int]
) -> list[dict[str, int]]:
    """Weight bits of each convolution for each of `means`: their largest mean, by `solve`.

    An integer program on one table of sensitivities, measured on images (N, C, H, W) with labels
    (N) in an untrained supernet. `bits`: candidates. All else has 16 bits. `network` is not
    changed.
    """
    convs, wide = convolutions(network), Candidates((16,), (16,))
    linear = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    offered = dict.fromkeys(convs, Candidates(tuple(bits), (16,))) | dict.fromkeys(linear, wide)
    options = dict(edge_bits=None, overrides=offered)
    supernet = Supernet(copy.deepcopy(network), images[:32], bits, **options)
    weights = sum(conv.weight.numel() for conv in convs.values())
    fixed = sum(16 * info.weights for info in supernet.table if info.name in linear)
    table = quick_table(supernet, cache(without_nan(batch_error(supernet, images, labels))))
    sizes = [(mean * weights + fixed) / 8 for mean in means]  # bytes
    configs = [solve(supernet, table, size=size) for size in sizes]
    return [{name: config[name].weight for name in convs} for config in configs]


def mixed_arms(
    subject: Subject, equal_bits: int, budget: float, bits: Sequence[int], images: int
) -> dict[str, dict]:
    """Mixed or equal bit-widths, with or without adapters, for `trials_at_size`.

    Mixed ones are assigned on the first `images` of the calibration images, so that `budget` is
    left for adapters of 8 bits, or nothing. `bits`: candidates. Equal ones have `equal_bits`
    without adapters, or one bit less and all that it saves in adapters.
    """
    network = subject.network
    device = next(network.parameters()).device
    x, y = (tensor[:images].to(device) for tensor in subject.calibration.tensors)

    def equal(width: int) -> dict[str, int]:
        return dict.fromkeys(convolutions(network), width)

    alone, beside = assign_bits(network, x, y, [equal_bits, equal_bits - 8 * budget], bits)
    return {
        "equal bits": dict(bits=equal(equal_bits), budget=0),
        "equal bits, adapters": dict(bits=equal(equal_bits - 1)),
        "mixed bits": dict(bits=alone, budget=0),
        "mixed bits, adapters": dict(bits=beside),
    }


def measure_trial(subject: Subject, trial: Trial, seed: int, device: str | torch.device) -> dict:
    """Adapts the network as the trial says and tests it; returns its row of the metrics.

    `bits`: None if they are mixed. `seconds`: of the call of `cora`. `correct`: the answers to all
    test images, see `correct_text`; claims need it, because seeds share test images.
    """
    options = dict(granularity="channel", recalibrate=False, iterations=0) | trial.options
    started = time.perf_counter()
    adapted = cora(subject.network, subject.calibration, **options, seed=seed, device=device)
    seconds = time.perf_counter() - started
    found = evaluate(adapted, subject.test, device=device, batch_size=64)
    widths = {conv.bits for conv in adapted.convs.values()}
    return {
        "study": trial.study,
        "arm": trial.arm,
        "seed": seed,
        "bits": widths.pop() if len(widths) == 1 else None,
        "granularity": options["granularity"],
        "norms": "recalibrated" if options["recalibrate"] else "kept",
        **top1_interval(found.correct),
        "correct": correct_text(found.correct, subject.places),
        "loss": found.loss,
        **adapted.cost(),
        "iterations": options["iterations"] if options["budget"] else 0,
        "seconds": seconds,
        "ranks": json.dumps(adapted.ranks),
    }


def metrics_table(metrics: pd.DataFrame) -> Markdown:
    """One line for each arm, with means over seeds and the 95% t-interval of test top-1.

    `metrics`: rows of `measure_trial`. Measured numbers follow an \u2248 sign.
    """
    keys = ["study", "arm", "bits", "granularity", "norms"]
    lines = []
    for entries, part in metrics.groupby(keys, sort=False, dropna=False):
        study, arm, bits, granularity, norms = entries
        mean, low, high = t_interval(part["top1"])
        top1 = f"\u2248 {mean:.1f}" + (f" \u2248 [{low:.1f}, {high:.1f}]" if len(part) > 1 else "")
        width = "mixed" if pd.isna(bits) else f"{bits:.0f}"
        costs = [f"\u2248 {part[column].mean():.3g}" for column in TABLE_COLUMNS]
        iterations = str(part["iterations"].max())
        lines.append([study, arm, width, granularity, norms, *costs, iterations, top1])
    heads = ["study", "arm", "bits", "range per", "norms", *TABLE_COLUMNS.values()]
    return show_markdown(markdown_table([*heads, "iterations", "test top-1 (%)"], lines))


def equivalent_bits_plot(metrics: pd.DataFrame) -> Figure:
    """Test top-1 over equivalent bits, means over seeds with 95% t-intervals, a panel per study.

    `metrics`: of `measure_trial`. The dashed line is the float network. Arms are drawn a little
    beside each other.
    """
    in_float = metrics.loc[metrics["study"] == "float", "top1"].mean()
    rows = metrics[~metrics["study"].isin(["float", "recovery"])]
    several = rows.groupby("study")["bits"].transform("nunique") > 1
    points = [
        f"{arm}, {bits:.0f} bits" if many and pd.notna(bits) else arm
        for arm, bits, many in zip(rows["arm"], rows["bits"], several, strict=True)
    ]
    rows, names = rows.assign(point=points), list(rows["study"].unique())
    size = (4.5 * len(names), 3.6)
    figure, axes = plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    for axis, study in zip(axes[0], names, strict=True):
        groups = rows[rows["study"] == study].groupby("point", sort=False)
        for i, (label, part) in enumerate(groups):
            mean, low, high = t_interval(part["top1"])
            spread = [[mean - low], [high - mean]] if len(part) > 1 else None
            style = dict(fmt="osD^vPX*"[i % 8], capsize=3, color=ARM_COLOURS[i % len(ARM_COLOURS)])
            aside = 0.02 * (i - (len(groups) - 1) / 2)  # points of equal size stay apart
            axis.errorbar(
                part["equivalent_bits"].mean() + aside, mean, spread, label=label, **style
            )
        axis.axhline(in_float, linestyle="--", color="0.7", linewidth=1)
        axis.set(title=study, xlabel="equivalent bits per weight", ylabel="test top-1 (%)")
        left, right = axis.get_xlim()
        middle = (left + right) / 2
        axis.set_xlim(min(left, middle - 0.5), max(right, middle + 0.5))  # equal sizes look equal
        axis.legend(frameon=False, fontsize=8)
    return figure


def ranks_plot(metrics: pd.DataFrame, bits: int) -> Figure:
    """Rank of each adapter in each arm of the study "ranks" at `bits`, mean over seeds."""
    rows = metrics[(metrics["study"] == "ranks") & (metrics["bits"] == bits)]
    found = {
        arm: pd.DataFrame(list(part["ranks"].map(json.loads))).mean()
        for arm, part in rows.groupby("arm", sort=False)
    }
    names = list(next(iter(found.values())).index)
    size = (max(6, 1.5 + 0.25 * len(names)), 3.8)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    for i, (arm, means) in enumerate(found.items()):
        style = dict(marker="osD"[i], linestyle="none", color=ARM_COLOURS[i], label=arm)
        axis.plot(range(len(names)), means, **style)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set(xlabel="convolution, from input to output", ylabel="rank (log scale)", yscale="log")
    axis.legend(frameon=False)
    return figure
