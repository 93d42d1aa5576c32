"""Fronts of accuracy over BitOPs: greedy search beside random, evolutionary and exhaustive ones."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Generator

from ..network.bits import BitConfig, Candidates, sample
from ..network.cost import bitops
from ..network.supernet import LayerInfo, Supernet
from .error import Error
from .moves import Step, moves


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
