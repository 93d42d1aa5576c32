"""Fronts of accuracy over BitOPs: greedy search beside random, evolutionary and exhaustive ones."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Generator, Tensor

from .cost import bitops, bitops_at
from .data import Splits
from .layers import Candidates
from .report import measure
from .search import Error, Step, batch_error, greedy, moves
from .supernet import BitConfig, LayerInfo, Supernet, sample

PARTS = ("weight", "act")


@dataclass
class Counted:
    """An error that counts how many different configurations it was asked for, and keeps theirs."""

    error: Error
    known: dict[BitConfig, float]

    def __call__(self, config: BitConfig) -> float:
        if config not in self.known:
            self.known[config] = self.error(config)
        return self.known[config]


def drawn(items: Sequence, generator: Generator) -> Iterator:
    """`items` in random order."""
    return (items[i] for i in torch.randperm(len(items), generator=generator))


def fitted(supernet: Supernet, config: BitConfig, budget: float, generator: Generator) -> BitConfig:
    """`config` after random moves: down until `budget` BitOPs hold, then up while they do."""
    table, candidates = supernet.table, supernet.candidates
    while bitops(table, config) > budget:
        down = [m for m in moves(config, candidates, PARTS) if m.after < m.before]
        config = next(drawn(down, generator)).of(config)
    while True:
        up = [m for m in moves(config, candidates, PARTS) if m.after > m.before]
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
    known = Counted(error, {})
    for _ in range(20 * evaluations):  # a small space may hold fewer
        known(fitted(supernet, sample(supernet.candidates, generator), budget, generator))
        if len(known.known) >= evaluations:
            break
    return best_step(supernet, known.known, budget)


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
    known = Counted(error, {})
    for _ in range(20 * evaluations):
        child = sample(supernet.candidates, generator)
        if len(known.known) >= population:
            ranked = sorted(known.known, key=known.known.__getitem__)[: population // 2]
            father, mother = itertools.islice(drawn(ranked, generator), 2)
            mutated, maternal = torch.rand(2, len(child), generator=generator)
            for (name, new), m, f in zip(child.items(), mutated, maternal, strict=True):
                inherited = (mother if f < 0.5 else father)[name]
                child = child.replace(name, new if m < mutation else inherited)
        known(fitted(supernet, child, budget, generator))
        if len(known.known) >= evaluations:
            break
    return best_step(supernet, known.known, budget)


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
    known = Counted(error, {})
    found = {"greedy": greedy(supernet, known, budget, **options)[-1]}
    count = len(known.known)
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


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Share of images that are classified wrongly: a score in the place of cross-entropy."""
    return (logits.argmax(1) != y).float().mean()


# What the rule of the search is made of, one thing at a time and together.
RULES = {
    "paper": {},
    "paper, no moves up": dict(up=False),
    "paper, jointly": dict(weights_first=False),
    "paper, jointly, no moves up": dict(up=False, weights_first=False),
    "ratio": dict(rule="ratio"),
    "ratio, no moves up": dict(rule="ratio", up=False),
    "ratio, jointly, no moves up": dict(rule="ratio", up=False, weights_first=False),
}


def rules(
    supernet: Supernet, x: Tensor, y: Tensor, images: int, levels: Sequence[float]
) -> list[dict]:
    """Each variant of the search on the first `images` of x (N, C, H, W) and y (N): rows.

    One per variant and level: cross-entropy on the other images, which no search has seen.
    """
    judge = batch_error(supernet, x[images:], y[images:])
    half = images // 2
    scores = {
        "loss": batch_error(supernet, x[:images], y[:images]),
        "errors": batch_error(supernet, x[:images], y[:images], wrong),
        "half": batch_error(supernet, x[:half], y[:half]),
    }
    variants = {name: (options, "loss") for name, options in RULES.items()}
    variants |= {
        "paper, top-1 error": ({}, "errors"),
        f"paper, {half} images": ({}, "half"),
    }
    rows = []
    for level, (name, (options, score)) in itertools.product(levels, variants.items()):
        known = Counted(scores[score], {})
        step = greedy(supernet, known, bitops_at(supernet.table, level), **options)[-1]
        found = {"judged": judge(step.config), "evaluations": len(known.known)}
        rows.append({"arm": name, "level": level, **found})
    return rows
