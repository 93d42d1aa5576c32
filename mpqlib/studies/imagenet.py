"""The ImageNet tables: published figures, exact costs, and accuracy after calibration alone."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from ..data import imagenet_val
from ..files import load_weights, remembered
from ..models import create, preprocessing
from ..network.bits import BitConfig, largest
from ..network.cost import bitops, bitops_at, model_size
from ..network.quantizer import GRANULARITIES
from ..network.supernet import Supernet
from ..report.intervals import top1_interval
from ..report.paper import Claim
from ..report.plots import ARM_COLOURS
from ..report.tables import markdown_table, show_markdown
from ..search.assignment import front, solve
from ..search.error import batch_error
from ..search.greedy import greedy
from ..search.proxies import hessian_table, lower_by_list, noise_error, orthogonality_table
from ..search.sensitivity import Sensitivity, measure_sensitivity
from ..training.calibration import fit_steps
from ..training.evaluation import copy_statistics, correct_means, decoded, evaluate, recalibrate
from .parameters import LEVELS, PLACE, Rule, check_parameters, items, one_of, optional, whole

if TYPE_CHECKING:
    from IPython.display import Markdown

CLASSES = 1000
FIRST_IMAGES = 16  # images that set the signs and first steps of a supernet
FITTED = 128  # images, at most, for step sizes and corrected means
NORMS = ("of the float network", "means corrected", "measured again")
WAYS = (
    "assignment",
    "greedy",
    "assignment, equal bits",
    "SQNR list",
    "assignment, noise",
    "Hessian trace",
    "orthogonality",
)


def _are_settings(value: object) -> bool:
    def is_setting(pair: object) -> bool:
        right = isinstance(pair, (list, tuple)) and len(pair) == 2
        return right and pair[0] in GRANULARITIES and pair[1] in NORMS

    right = isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_setting, value))
    return right and len(set(map(tuple, value))) == len(value)


SETTINGS_RULE = Rule(f"a list of different pairs, of {GRANULARITIES} and of {NORMS}", _are_settings)
IMAGENET_RULES = {
    "data_root": optional(PLACE),
    "checkpoint": optional(PLACE),
    "settings": SETTINGS_RULE,
    "primary": LEVELS,
    "arms": items(one_of(WAYS)),
    "granularity": one_of(GRANULARITIES),
    "probes": whole(1),
}


@dataclass(frozen=True)
class Published:
    """A row of a paper's ImageNet table: top-1 in %, and BitOPs in G where they are known."""

    model: str
    system: str
    bits: int  # of weights and activations; the mean level of mixed ones
    mixed: bool
    bitops_g: float | None
    top1: float
    retraining: str


# Taken from summaries of RFQuant (arXiv 2401.01543) by others, not yet checked against the paper.
PUBLISHED = (
    Published("resnet18", "RFQuant", 4, True, 31.6, 71.0, "none"),
    Published("resnet18", "RFQuant, distilled", 3, True, None, 70.9, "none"),
    Published("resnet18", "SEAM", 4, True, 33.7, 70.8, "90 epochs"),
    Published("mobilenet_v2", "RFQuant", 4, True, 5.5, 70.7, "none"),
    Published("mobilenet_v2", "GMPQ", 4, True, None, 70.4, "40 epochs"),
    Published("tf_efficientnet_lite0", "RFQuant", 4, True, 6.9, 73.2, "none"),
    Published("tf_efficientnet_lite0", "LSQ", 4, False, None, 72.3, "90 epochs"),
)


def measure_costs(model: str, bits: Sequence[int]) -> list[dict]:
    """BitOPs (G) and size (MB) of `model` with each of `bits` everywhere, one row each.

    Inputs have 224 x 224 pixels. The first and the last layer have 8 bits, as in RFQuant.
    """
    example = torch.randn(1, 3, 224, 224)
    supernet = Supernet(create(model, CLASSES), example, bits, depthwise_min=min(bits))
    configs = {b: supernet.uniform(b) for b in bits}
    return [
        {
            "model": model,
            "bits": b,
            "bitops_g": bitops(supernet.table, config) / 1e9,
            "size_mb": model_size(supernet.table, config) / 1e6,
        }
        for b, config in configs.items()
    ]


def level_of(budget: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """The bits, a real number, at which all searchable layers together cost `budget`.

    `low`, `high`: bits and cost of two uniform configurations, from which the fixed cost and that
    per squared bit follow.
    """
    (b0, cost0), (b1, cost1) = low, high
    free = (cost1 - cost0) / (b1**2 - b0**2)
    return sqrt((budget - cost0) / free + b0**2)


def published_table(costs: pd.DataFrame, published: Sequence[Published] = PUBLISHED) -> Markdown:
    """Published rows beside our count of BitOPs and size at the same uniform bits.

    `costs`: rows of `measure_costs`, with the bits of each published row, and 3 and 4. The column
    "as uniform bits" is `level_of` the published BitOPs.
    """
    by = costs.set_index(["model", "bits"])
    lines = []
    for row in published:
        own = by.loc[(row.model, row.bits)]
        points = [(b, by.loc[(row.model, b), "bitops_g"]) for b in (3, 4)]
        known = row.bitops_g is not None
        lines.append(
            [
                row.model,
                row.system,
                f"{row.bits} bits, mixed" if row.mixed else f"{row.bits} bits, uniform",
                f"{row.bitops_g:g}" if known else "not known",
                f"\u2248 {level_of(row.bitops_g, *points):.2f}" if known else "",
                f"{own['bitops_g']:.3f}",
                f"{own['size_mb']:.2f}",
                row.retraining,
                f"{row.top1:.1f}",
            ]
        )
    heads = ["network", "system", "bits", "BitOPs published (G)", "as uniform bits"]
    heads += ["BitOPs of uniform bits (G)", "size of uniform bits (MB)"]
    return show_markdown(markdown_table([*heads, "retraining", "top-1 published (%)"], lines))


@dataclass(frozen=True)
class Halves:
    """Images of ImageNet in memory: one half to calibrate and search on, the other to test on."""

    calibration: TensorDataset
    test: TensorDataset

    @cached_property
    def sha256(self) -> str:
        """Hash of all images and labels."""
        digest = hashlib.sha256()
        for tensor in (*self.calibration.tensors, *self.test.tensors):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


def draw_halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two random halves of the numbers 0 ... count - 1, int64: places of images."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.tensor_split(2)


def load_halves(model: str, data_root: str | Path, seed: int) -> Halves:
    """`draw_halves` of `data_root`/val/<wnid>/*, at the model's own preprocessing.

    Raises as `imagenet_val` does.
    """
    images = imagenet_val(data_root, **preprocessing(model))
    halves = draw_halves(len(images), seed)
    return Halves(*(decoded(Subset(images, half.tolist())) for half in halves))


def prepare(
    network: nn.Module,
    calibration: TensorDataset,
    bits: Sequence[int],
    granularity: str,
    checkpoint: str | Path | None = None,
) -> Supernet:
    """A supernet of a copy of the float `network`, ready for use without training.

    Its step sizes have the least rounding error on images of `calibration`. `bits`: candidates of
    all layers but the first and last ones. `granularity`: as in `Supernet`. `checkpoint`: a
    supernet.safetensors of `python -m mpqlib.training`. Its weights and steps are used instead, and
    the batch norms of float mode are measured again, which one-shot training leaves behind.
    """
    images = calibration.tensors[0][:FITTED]
    least = 3 if checkpoint else min(bits)  # of depth-wise convolutions; the command's is 3
    copied = copy.deepcopy(network)
    supernet = Supernet(
        copied, images[:FIRST_IMAGES], bits, depthwise_min=least, granularity=granularity
    )
    if checkpoint:
        load_weights(Path(checkpoint), supernet)
        recalibrate(supernet, calibration, None)
    else:
        fit_steps(supernet, images)
    return supernet.eval()


def check_checkpoint(
    checkpoint: str | Path | None, granularity: str, settings: Sequence[Sequence[str]]
) -> None:
    """Raises ValueError for a `checkpoint` with ranges per channel: it has one per tensor."""
    used = {granularity, *(pair[0] for pair in settings)}
    if checkpoint and used != {"tensor"}:
        raise ValueError(
            f"granularity={granularity!r} and settings={settings!r} are not allowed with a "
            "checkpoint: 'tensor' alone"
        )


def set_norms(
    supernet: Supernet, config: BitConfig | None, calibration: TensorDataset, how: str
) -> None:
    """Prepares the batch norms at `config` in one of the ways NORMS. `config`: None is float mode.

    Raises ValueError for another way, and for "means corrected" in float mode.
    """
    images = calibration.tensors[0][:FITTED].to(next(supernet.parameters()).device)
    if how == "measured again":
        recalibrate(supernet, calibration, config, device=images.device)
    elif how == "means corrected" and config is not None:
        correct_means(supernet, images, config)
    elif how == "of the float network":
        if config is not None:
            copy_statistics(supernet, config)
    else:
        raise ValueError(f"norms={how!r} is not allowed at config={config}: one of {NORMS}")


def measure_top1(
    supernet: Supernet,
    config: BitConfig | None,
    halves: Halves,
    norms: str,
    device: str | torch.device,
) -> dict:
    """Accuracy and cost of a configuration: entries of its row of the metrics.

    None: float mode. `norms`: one of NORMS. Entry `correct`: a digit per test image, 1 where it is
    classified correctly.
    """
    costs = {}
    set_norms(supernet, config, halves.calibration, norms)
    if config is not None:
        costs["bitops_g"] = bitops(supernet.table, config) / 1e9
        costs["size_mb"] = model_size(supernet.table, config) / 1e6
    found = evaluate(supernet, halves.test, config, device=device, batch_size=64)
    correct = "".join(str(int(right)) for right in found.correct)
    return {**top1_interval(found.correct), "loss": found.loss, **costs, "correct": correct}


def choose_bits(
    supernet: Supernet, x: Tensor, y: Tensor, budgets: Sequence[float], arm: str, probes: int = 32
) -> list[BitConfig]:
    """A configuration for each of `budgets` (BitOPs per image), by one of WAYS.

    `x`: images (N, C, H, W). `y`: labels (N). "assignment" and "greedy" score by the cross-entropy
    on them. "greedy" is one search down to the lowest budget, of whose path each budget takes the
    step with the lowest error within it. "SQNR list" lowers the bits that add the least noise to
    the outputs; "assignment, noise" takes this noise as its error. The others solve an integer
    program with weights and activations of equal bits; "assignment, equal bits" shows what this
    costs. `probes`: random vectors for the Hessian.
    """
    error = cache(batch_error(supernet, x, y))

    def solved(table: Sensitivity) -> list[BitConfig]:
        return [solve(supernet, table, budget, equal_bits=True) for budget in budgets]

    if arm == "greedy":
        path = greedy(supernet, error, min(budgets))
        within = ([step for step in path if step.bitops <= budget] for budget in budgets)
        return [min(steps, key=lambda step: step.error).config for steps in within]
    if arm == "assignment":
        return [step.config for step in front(supernet, error, budgets)]
    if arm == "assignment, equal bits":
        return [step.config for step in front(supernet, error, budgets, equal_bits=True)]
    if arm == "SQNR list":
        noise = noise_error(supernet, x)
        table = measure_sensitivity(supernet, noise, largest(supernet.candidates))
        return [lower_by_list(supernet, table, budget) for budget in budgets]
    if arm == "assignment, noise":
        return [step.config for step in front(supernet, noise_error(supernet, x), budgets)]
    if arm == "Hessian trace":
        return solved(hessian_table(supernet, x, y, probes))
    if arm == "orthogonality":
        return solved(orthogonality_table(supernet, x))
    raise ValueError(f"arm={arm!r} is not allowed: one of {WAYS}")


@dataclass(frozen=True)
class Calibrated:
    """A float network with its images, and where measured numbers are kept.

    `checkpoint`: as in `prepare`. `folder`: of the files. `about`: the settings that all numbers
    depend on. An interrupted study resumes from these files.
    """

    network: nn.Module
    halves: Halves
    bits: Sequence[int]
    device: str | torch.device
    checkpoint: str | Path | None
    folder: Path
    about: Mapping

    def prepare(self, granularity: str) -> Supernet:
        """The supernet, on the device: see the function `prepare`."""
        how = self.bits, granularity, self.checkpoint
        return prepare(self.network, self.halves.calibration, *how).to(self.device)

    @cached_property
    def depends_on(self) -> dict:
        """`about`, the images, and what the checkpoint holds."""
        weights = self.checkpoint and hashlib.sha256(Path(self.checkpoint).read_bytes()).hexdigest()
        return {**self.about, "images": self.halves.sha256, "weights": weights}

    def measure(self, supernet: Supernet, name: str, config: BitConfig | None, norms: str) -> dict:
        """`measure_top1`, kept in the file `name`.json."""
        told = self.depends_on | dict(norms=norms, config=config and config.to_json())
        compute = partial(measure_top1, supernet, config, self.halves, norms, self.device)
        return remembered(self.folder / f"{name}.json", told, compute)


def measure_settings(subject: Calibrated, settings: Sequence[Sequence[str]]) -> list[dict]:
    """Accuracy in float and with uniform bits: one row per setting and bits.

    `settings`: pairs of a granularity of weights and one of NORMS. Raises ValueError for others.
    """
    check_parameters({"settings": SETTINGS_RULE}, settings=settings)
    rows = []
    for granularity in dict.fromkeys(granularity for granularity, _ in settings):
        supernet = subject.prepare(granularity)
        if not rows:
            found = subject.measure(supernet, "float", None, "of the float network")
            rows.append({"study": "float", "arm": "float"} | found)
        own = [norms for each, norms in settings if each == granularity]
        # Norms after no layer have one set of statistics, and "measured again" replaces them.
        for norms in sorted(own, key=NORMS.index):
            for b in sorted(subject.bits):
                name = f"uniform-{granularity}-{NORMS.index(norms)}-{b}"
                found = subject.measure(supernet, name, supernet.uniform(b), norms)
                row = {"study": "uniform", "arm": "uniform", "level": b, "norms": norms}
                rows.append(row | {"granularity": granularity} | found)
    return rows


def measure_policies(
    subject: Calibrated,
    levels: Sequence[float],
    arms: Sequence[str],
    granularity: str,
    search_images: int,
    probes: int,
) -> list[dict]:
    """Accuracy of what each of `arms` chooses at the BitOPs of each of `levels`: one row each.

    `search_images`: the first ones of the calibration half, on which bits are chosen. `probes`: as
    in `choose_bits`. Batch norms are measured again for each configuration.
    """
    supernet = subject.prepare(granularity)
    x, y = (t[:search_images].to(subject.device) for t in subject.halves.calibration.tensors)
    budgets = [bitops_at(supernet.table, level) for level in levels]
    told = dict(levels=list(levels), search_images=search_images, probes=probes)
    told |= subject.depends_on | dict(granularity=granularity)

    def choose(arm: str) -> dict:
        started = time.perf_counter()
        configs = choose_bits(supernet, x, y, budgets, arm, probes)
        seconds = time.perf_counter() - started
        return {"configs": [config.to_json() for config in configs], "seconds": seconds}

    # All are chosen first: measuring overwrites the statistics of norms that follow no convolution.
    files = {arm: subject.folder / f"chosen-{arm}.json" for arm in arms}
    found = {arm: remembered(files[arm], told | {"arm": arm}, partial(choose, arm)) for arm in arms}
    rows = []
    for arm, chosen in found.items():
        for level, text in zip(levels, chosen["configs"], strict=True):
            config = BitConfig.from_json(text)
            measured = subject.measure(supernet, f"{arm}-{level:g}", config, "measured again")
            row = {"study": "policies", "arm": arm, "level": level, "norms": "measured again"}
            row["budget_g"] = bitops_at(supernet.table, level) / 1e9
            row |= {"granularity": granularity, "seconds": chosen["seconds"], "bits": text}
            rows.append(row | measured)
    return rows


def image_rows(rows: pd.DataFrame, study: str, arm: str) -> list[dict]:
    """In how many % of `rows` each test image is classified correctly: a row per arm and image.

    `rows`: with the column `correct` of `measure_top1`. `arm`: the column that tells arms apart.
    `study`: name of the comparison.
    """
    found = []
    for name, part in rows.groupby(arm, sort=False):
        correct = torch.tensor([[int(digit) for digit in text] for text in part["correct"]])
        shares = (100 * correct.double().mean(0)).tolist()
        found += [
            {"study": study, "arm": name, "image": i, "percent_correct": share}
            for i, share in enumerate(shares)
        ]
    return found


def image_comparisons(
    measured: pd.DataFrame, granularity: str, primary: Sequence[float]
) -> list[dict]:
    """`image_rows` of four comparisons, so that arms can be paired by test image.

    `measured`: rows of `measure_settings` and `measure_policies`. "policies": all ways to choose
    bits. "uniform": these and uniform bits, at those levels of `primary` that both have. "norms":
    treatments of the batch norms, and "granularity": of ranges of the weights, both at uniform
    bits.
    """
    policies, uniform = (measured[measured["study"] == name] for name in ("policies", "uniform"))
    again = uniform[uniform["norms"] == "measured again"]
    same = uniform[uniform["granularity"] == granularity]
    levels = set(primary) & set(same["level"]) & set(policies["level"])
    plain = pd.concat([same[same["norms"] == "measured again"], policies])
    both = plain[plain["level"].isin(levels)]
    return [
        *image_rows(policies, "policies", "arm"),
        *image_rows(both, "uniform", "arm"),
        *image_rows(same, "norms", "norms"),
        *image_rows(again, "granularity", "granularity"),
    ]


def comparisons(images: pd.DataFrame) -> list[Claim]:
    """What the rows of `image_comparisons` can tell, as claims of our own."""
    arms = {study: set(rows["arm"]) for study, rows in images.groupby("study")}
    texts = {("uniform", "assignment", "uniform"): "assignment beats uniform bits at equal BitOPs"}
    for way in WAYS[1:]:
        texts["policies", "assignment", way] = f"assignment beats '{way}'"
    for how in NORMS[:-1]:
        text = f"norms: statistics measured again beat those '{how}'"
        texts["norms", "measured again", how] = text
    text = "a range of the weights per channel beats one per tensor"
    texts["granularity", "channel", "tensor"] = text
    how = dict(value="percent_correct", sign=+1, unit="image", source="ours")
    return [
        Claim(text, arm=arm, base=base, where={"study": study}, **how)
        for (study, arm, base), text in texts.items()
        if {arm, base} <= arms.get(study, set())
    ]


def top1_plots(measured: pd.DataFrame, granularity: str) -> dict[str, Figure]:
    """`top1_plot` of policies beside uniform bits, and of the settings of uniform bits."""
    in_float = float(measured.loc[measured["study"] == "float", "top1"].iloc[0])
    policies, uniform = (measured[measured["study"] == name] for name in ("policies", "uniform"))
    settings = "per " + uniform["granularity"] + ", norms " + uniform["norms"]
    chosen = (uniform["granularity"] == granularity) & (uniform["norms"] == "measured again")
    return {
        "policies": top1_plot(pd.concat([policies, uniform[chosen]]), "arm", in_float),
        "uniform": top1_plot(uniform.assign(setting=settings), "setting", in_float),
    }


def top1_table(measured: pd.DataFrame, study: str, index: Sequence[str]) -> Markdown:
    """Top-1 (%) at each level in one study, one line for each entry of the columns `index`."""
    rows = measured[measured["study"] == study]
    wide = rows.pivot_table(index=list(index), columns="level", values="top1", sort=False)
    wide = wide[sorted(wide.columns)]
    heads = [*index, *(f"{level:g} bits" for level in wide.columns)]
    lines = [
        [*([entry] if isinstance(entry, str) else entry), *(f"\u2248 {v:.1f}" for v in values)]
        for entry, values in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return show_markdown(markdown_table(heads, lines))


def top1_plot(rows: pd.DataFrame, label: str, in_float: float) -> Figure:
    """Draws test top-1 over BitOPs, one line for each entry of the column `label`.

    `in_float`: top-1 (%) of the float network, a dashed line.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, (name, part) in enumerate(rows.groupby(label, sort=False)):
        style = dict(marker="osD^vPX*"[i % 8], color=ARM_COLOURS[i % len(ARM_COLOURS)], label=name)
        axis.plot(part["bitops_g"], part["top1"], linewidth=1, **style)
    axis.axhline(in_float, linestyle="--", color="0.7", linewidth=1, label="float")
    axis.set(xlabel="BitOPs per image (G, log scale)", ylabel="test top-1 (%)", xscale="log")
    levels = rows.groupby("level")["bitops_g"].max()
    axis.set_xticks(levels, [f"{cost:.1f}" for cost in levels], minor=False)
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    return figure
