"""Fronts of accuracy over BitOPs: greedy search beside random, evolutionary and exhaustive ones."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy.stats import t
from torch import Generator

from .cost import bitops, bitops_at
from .data import Splits
from .layers import Candidates
from .moves import Error, Step, moves
from .plots import COLOURS
from .report import measure
from .search import greedy
from .supernet import BitConfig, LayerInfo, Supernet, sample


def drawn(items: Sequence, generator: Generator) -> Iterator:
    """`items` in random order."""
    return (items[i] for i in torch.randperm(len(items), generator=generator))


def fitted(supernet: Supernet, config: BitConfig, budget: float, generator: Generator) -> BitConfig:
    """`config` after random moves: down until `budget` BitOPs hold, then up while they do."""
    table, candidates = supernet.table, supernet.candidates
    while bitops(table, config) > budget:
        down = [m for m in moves(config, candidates) if m.after < m.before]
        config = next(drawn(down, generator)).of(config)
    while True:
        up = [m for m in moves(config, candidates) if m.after > m.before]
        after = (move.of(config) for move in drawn(up, generator))
        fits = next((c for c in after if bitops(table, c) <= budget), None)
        if fits is None:
            return config
        config = fits


def best_step(supernet: Supernet, known: Mapping[BitConfig, float], budget: float) -> Step:
    """The configuration of the least known error within `budget` BitOPs."""
    fits = [config for config in known if bitops(supernet.table, config) <= budget]
    best = min(fits, key=known.__getitem__)
    return Step(best, known[best], bitops(supernet.table, best))


def random_search(
    supernet: Supernet, error: Error, budget: float, evaluations: int, generator: Generator
) -> Step:
    """The best of `evaluations` random configurations that use the budget up."""
    known: dict[BitConfig, float] = {}
    for _ in range(20 * evaluations):  # a small space may hold fewer
        config = fitted(supernet, sample(supernet.candidates, generator), budget, generator)
        known[config] = known[config] if config in known else error(config)
        if len(known) >= evaluations:
            break
    return best_step(supernet, known, budget)


def evolution(
    supernet: Supernet,
    error: Error,
    budget: float,
    evaluations: int,
    generator: Generator,
    population: int = 24,
    mutation: float = 0.1,
) -> Step:
    """The best that evolution finds in `evaluations` configurations, each fitted to the budget.

    It starts from `population` random ones. A child takes each layer's bits from one of two of the
    best half, or with the share `mutation` at random (as single-path one-shot NAS does,
    arXiv 1904.00420).
    """
    known: dict[BitConfig, float] = {}
    for _ in range(20 * evaluations):
        child = sample(supernet.candidates, generator)
        if len(known) >= population:
            ranked = sorted(known, key=known.__getitem__)[: population // 2]
            father, mother = itertools.islice(drawn(ranked, generator), 2)
            mutated, maternal = torch.rand(2, len(child), generator=generator)
            for (name, new), m, f in zip(child.items(), mutated, maternal, strict=True):
                inherited = (mother if f < 0.5 else father)[name]
                child = child.replace(name, new if m < mutation else inherited)
        child = fitted(supernet, child, budget, generator)
        known[child] = known[child] if child in known else error(child)
        if len(known) >= evaluations:
            break
    return best_step(supernet, known, budget)


def exhaustive(supernet: Supernet, error: Error) -> dict[BitConfig, float]:
    """The error of every configuration there is: small choices only."""
    names = list(supernet.candidates)
    pairs = [itertools.product(*c) for c in supernet.candidates.values()]
    configs = (BitConfig.of(dict(zip(names, b, strict=True))) for b in itertools.product(*pairs))
    return {config: error(config) for config in configs}


def restricted(supernet: Supernet, layers: int, bits: Sequence[int], rest: int = 4) -> Supernet:
    """The same network with a choice of `bits` in only so many of its layers, evenly spread.

    The other layers with a choice have only `rest` bits. Weights and norms are shared.
    """
    free = [info.name for info in supernet.table if len(info.candidates.weight) > 1]
    chosen = [free[i] for i in np.linspace(0, len(free) - 1, layers).round().astype(int)]

    def kept(info: LayerInfo) -> Candidates:
        wanted = bits if info.name in chosen else (rest,)
        if info.name not in free:
            return info.candidates
        return Candidates(*(tuple(b for b in wanted if b in own) for own in info.candidates))

    view = copy.copy(supernet)
    view.table = [replace(info, candidates=kept(info)) for info in supernet.table]
    return view


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


def policies_plot(configs: Mapping[str, BitConfig], label: str) -> Figure:
    """Bits of every layer in one policy after another: weights left, activations right.

    `configs`: by the text that stands under each, such as its budget, which `label` describes.
    """
    names = list(next(iter(configs.values())))
    size = (max(7, 2.5 + 0.8 * len(configs)), 1.4 + 0.24 * len(names))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axis, part in zip(axes, ("weight", "act"), strict=True):
        bits = pd.DataFrame(
            {text: [getattr(config[n], part) for n in names] for text, config in configs.items()},
            index=names,
        )
        style = dict(cmap=list(COLOURS.values()), vmin=1.5, vmax=8.5, cbar=False, linewidths=0.5)
        sns.heatmap(bits, annot=True, annot_kws={"fontsize": 7}, ax=axis, **style)
        title = "weight bits" if part == "weight" else "activation bits"
        axis.set(title=title, xlabel=label, ylabel="layer" if part == "weight" else "")
        axis.tick_params(axis="both", labelsize=8)
    return figure
