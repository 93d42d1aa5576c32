"""Greedy search beside random and evolutionary search, and which of its rules is best."""

import itertools
import time
from collections.abc import Mapping, Sequence
from functools import cache

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy.stats import t
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data import Splits
from ..network.bits import BitConfig
from ..network.cost import bitops_at
from ..network.supernet import Supernet
from ..report.runs import measure
from ..search.baselines import best_step, evolution, exhaustive, random_search
from ..search.error import Error, batch_error
from ..search.greedy import greedy
from ..search.moves import Step
from ..training.evaluation import batch_statistics, norms_at, outside_norms


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Share of images that are classified wrongly: a score in the place of cross-entropy."""
    return (logits.argmax(1) != y).float().mean()


# Options of `greedy`; `score`: "top-1" in the place of the loss; `images`: share of those at hand.
VARIANTS: dict[str, dict] = {
    "paper": dict(rule="paper"),
    "paper, no moves up": dict(rule="paper", up=False),
    "paper, jointly": dict(rule="paper", weights_first=False),
    "paper, jointly, no moves up": dict(rule="paper", up=False, weights_first=False),
    "ratio": dict(),
    "ratio, no moves up": dict(up=False),
    "ratio, jointly": dict(weights_first=False),
    "ratio, jointly, no moves up": dict(up=False, weights_first=False),
    "paper, by top-1": dict(rule="paper", score="top-1"),
    "paper, half of the images": dict(rule="paper", images=0.5),
    "ratio, half of the images": dict(images=0.5),
}


def tried(
    supernet: Supernet, x: Tensor, y: Tensor, levels: Sequence[float], variant: Mapping
) -> list[tuple[float, BitConfig, int]]:
    """What one variant finds on x (N, C, H, W), y (N): level, configuration, evaluations."""
    options, found = dict(variant), []
    loss = {"loss": cross_entropy, "top-1": wrong}[options.pop("score", "loss")]
    n = round(len(y) * options.pop("images", 1))
    error = cache(batch_error(supernet, x[:n], y[:n], loss))
    for level in levels:
        asked = cache(error)  # the levels share what they ask, and are counted one by one
        step = greedy(supernet, asked, bitops_at(supernet.table, level), **options)[-1]
        found.append((level, step.config, asked.cache_info().currsize))
    return found


def judged(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    images: int,
    batches: int,
    levels: Sequence[float],
    variants: Mapping[str, Mapping],
) -> list[dict]:
    """What each variant finds on each of the first `batches` of so many `images`: rows.

    x: images (N, C, H, W), y: labels (N). `judged`: the cross-entropy on all other images, which
    that search has not seen; `evaluations`: how many configurations it took. Levels as in
    `bitops_at`; `variants`: some of VARIANTS. Raises ValueError where no image is left to judge on.
    """
    if batches * images > len(y) or images == len(y):
        raise ValueError(f"images={images}, batches={batches}: there are only {len(y)} images")
    rows = []
    for batch in range(batches):
        seen = (torch.arange(len(y), device=y.device) // images) == batch
        judge = batch_error(supernet, x[~seen], y[~seen])
        for name, variant in variants.items():
            for level, config, count in tried(supernet, x[seen], y[seen], levels, variant):
                found = {"judged": judge(config), "evaluations": count}
                rows.append({"arm": name, "level": level, "batch": batch, **found})
    return rows


def literal_error(supernet: Supernet, x: Tensor, y: Tensor):
    """`batch_error` by a whole pass for every configuration."""
    outside = outside_norms(supernet.eval())

    @torch.inference_mode()
    def error(config: BitConfig) -> float:
        with batch_statistics(norms_at(supernet, config) + outside):
            return float(cross_entropy(supernet(x, config), y))

    return error


def timed(
    supernet: Supernet, x: Tensor, y: Tensor, level: float, arm: str
) -> tuple[BitConfig, dict[str, float]]:
    """What one search to `level` (as in `bitops_at`) finds: error, time (s), passes and steps.

    `arm`: "fast", the default of `greedy`; "literal", RFQuant's rule as it is stated, with a whole
    pass for every move at every step.
    """
    options = dict(rule="paper", exact=True) if arm == "literal" else {}
    error = (literal_error if arm == "literal" else batch_error)(supernet, x, y)
    asked, budget, start = [], bitops_at(supernet.table, level), time.perf_counter()
    path = greedy(supernet, lambda config: asked.append(config) or error(config), budget, **options)
    spent, end = time.perf_counter() - start, path[-1]
    costs = dict(seconds=spent, passes=len(asked), steps=len(path) - 1)
    return end.config, {"error": end.error} | costs


def side_by_side(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    images: int,
    levels: Sequence[float],
    arms: Sequence[str] = ("fast", "literal"),
) -> list[dict]:
    """`timed` on the first `images` of x, y for each level and arm: rows.

    `judged`: the cross-entropy on all other images, if there are any.
    """
    seen, rows = slice(images), []
    judge = batch_error(supernet, x[images:], y[images:]) if images < len(y) else None
    for level, arm in itertools.product(levels, arms):
        config, found = timed(supernet, x[seen], y[seen], level, arm)
        judged = {"judged": judge(config)} if judge else {}
        rows.append({"arm": arm, "level": level, **found, **judged})
    return rows


def differences_plot(differences: pd.DataFrame, base: str, label: str) -> Figure:
    """Paired differences of all variants from `base` with their 95% intervals, best on top.

    `differences`: rows of `claims.differences`; `label`: of what is compared, less is better.
    """
    rows = differences.sort_values("difference", ascending=False)
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.36 * len(rows)), layout="constrained")
    spread = [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
    axis.errorbar(rows["difference"], rows["compared"], xerr=spread, fmt="o", capsize=3, color="C0")
    axis.axvline(0, color="0.6", linewidth=1)
    axis.set(xlabel=f"{label}, less that of the rule {base!r}", ylabel="rule")
    axis.locator_params(axis="x", nbins=6)
    return figure


def searches(
    supernet: Supernet, error: Error, budget: float, options: Mapping, seed: int
) -> dict[str, tuple[Step, int]]:
    """Greedy search, then the two others with as many evaluations: result and evaluations."""
    known = cache(error)
    found = {"greedy": greedy(supernet, known, budget, **options)[-1]}
    count = known.cache_info().currsize
    for name, search in {"random": random_search, "evolution": evolution}.items():
        generator = torch.Generator().manual_seed(seed)
        found[name] = search(supernet, error, budget, count, generator)
    return {name: (step, count) for name, step in found.items()}


def front(
    supernet: Supernet,
    error: Error,
    levels: Sequence[float],
    splits: Splits,
    options: Mapping,
    seed: int,
    device: torch.device,
) -> list[dict]:
    """What each search finds at each level, and the uniform configurations, measured: rows."""

    def row(arm: str, level: float, config: BitConfig, evaluations: int) -> dict:
        costs = measure(supernet, config, splits, images=2000, device=device)
        bits = {"bits": config.to_json(), "error": error(config), "evaluations": evaluations}
        budget = bitops_at(supernet.table, level) / 1e9
        return {"arm": arm, "level": level, "budget_g": budget, **costs, **bits}

    uniform = sorted(
        {b for c in supernet.candidates.values() for b in c.weight if len(c.weight) > 1}
    )
    error = cache(error)  # paths to different budgets begin alike
    rows = [row("uniform", b, supernet.uniform(b), 0) for b in uniform]
    for level in levels:
        found = searches(supernet, error, bitops_at(supernet.table, level), options, seed)
        rows += [row(arm, level, step.config, count) for arm, (step, count) in found.items()]
    return rows


def regrets(
    supernet: Supernet, error: Error, levels: Sequence[float], options: Mapping, seed: int
) -> list[dict]:
    """How far each search stays behind the optimum, on a supernet with few choices: rows."""
    everything, rows = exhaustive(supernet, error), []
    for level in levels:
        budget = bitops_at(supernet.table, level)
        optimum = best_step(supernet, everything, budget)
        for arm, (step, count) in searches(supernet, error, budget, options, seed).items():
            regret = {"regret": step.error - optimum.error, "evaluations": count}
            rows.append({"arm": arm, "level": level, **regret, "of": len(everything)})
    return rows


def front_plot(rows: pd.DataFrame, value: str, label: str) -> Figure:
    """A value over BitOPs, one line a search: means over seeds with their 95% t-intervals.

    `rows`: columns `arm`, `seed`, `budget_g` (G) and `value`, which `label` describes.
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    arms = list(rows["arm"].unique())
    for i, (arm, colour) in enumerate(
        zip(arms, sns.color_palette("colorblind", len(arms)), strict=True)
    ):
        groups = rows[rows["arm"] == arm].groupby("budget_g")[value]
        mean, n = groups.mean(), groups.count()
        spread = t.ppf(0.975, (n - 1).clip(lower=1)) * groups.sem().fillna(0)
        places = mean.index * (1 + 0.004 * (i - len(arms) / 2))  # side by side, to be told apart
        style = dict(color=colour, marker="osD^v"[i % 5], capsize=2, label=arm)
        axis.errorbar(places, mean, spread, linestyle="" if arm == "uniform" else "-", **style)
    axis.set(xlabel="budget (G BitOPs per image, log scale)", ylabel=label, xscale="log")
    ticks = sorted(rows.loc[rows["arm"] == arms[0], "budget_g"].unique())
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.legend(frameon=False)
    return figure
