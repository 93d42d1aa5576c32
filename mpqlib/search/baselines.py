"""Baselines of greedy search: random and evolutionary search, and all configurations there are."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, prod
from numbers import Real

import numpy as np
import torch
from torch import Generator

from ..network.bits import BitConfig, Candidates, check_bits, sample
from ..network.cost import bitops
from ..network.supernet import LayerInfo, Supernet, tie, tied_inputs
from .error import Error, without_nan
from .limits import check_count, check_limits
from .moves import Move, Step, possible_moves

MOST = 100_000  # configurations that `evaluate_all` evaluates
TRIES = 20  # configurations drawn for each evaluation, because a small space may hold fewer


def shuffle(items: Sequence, generator: Generator) -> Iterator:
    """Yields `items` in random order."""
    return (items[i] for i in torch.randperm(len(items), generator=generator))


def fit_to_budget(
    supernet: Supernet, config: BitConfig, budget: float, generator: Generator
) -> BitConfig:
    """Returns `config` after random moves that use the budget up.

    Moves go down until the configuration needs at most `budget` BitOPs per image, then up as long
    as one fits. Raises ValueError if the smallest bits need more than `budget`.
    """
    check_limits(supernet, budget)
    table = supernet.table

    def moves(config: BitConfig) -> Iterator[Move]:
        return possible_moves(config, supernet.candidates, ties=tied_inputs(table))

    while bitops(table, config) > budget:
        down = [m for m in moves(config) if m.after < m.before]
        config = next(shuffle(down, generator)).apply(config)
    while True:
        up = [m for m in moves(config) if m.after > m.before]
        larger = (move.apply(config) for move in shuffle(up, generator))
        fits = next((c for c in larger if bitops(table, c) <= budget), None)
        if fits is None:
            return config
        config = fits


def best_step(supernet: Supernet, known: Mapping[BitConfig, float], budget: float) -> Step:
    """Returns the configuration with the lowest of the `known` errors within the budget.

    `budget`: BitOPs per image. NaN counts as infinite. Raises ValueError if no configuration is
    within the budget, or if none of them has a finite error.
    """
    fits = {c: e for c, e in known.items() if bitops(supernet.table, c) <= budget}
    if not fits:
        raise ValueError(f"budget={budget!s} ({budget / 1e9:.4g} G): no configuration is within")
    finite = without_nan(fits.__getitem__)
    best = min(fits, key=finite)
    if finite(best) == inf:
        raise ValueError(f"the errors of all {len(fits)} configurations are NaN or infinite")
    return Step(best, fits[best], bitops(supernet.table, best))


def random_search(
    supernet: Supernet, error: Error, budget: float, evaluations: int, generator: Generator
) -> Step:
    """Returns the best of random configurations, each fitted to the budget.

    `budget`: BitOPs per image. `evaluations`: number of different configurations, fewer if the
    space is small. Raises ValueError for a value that is not allowed, and if no error is finite.
    """
    check_count("evaluations", evaluations, 1)
    error, known = without_nan(error), {}
    for _ in range(TRIES * evaluations):
        drawn = tie(sample(supernet.candidates, generator), supernet.table)
        config = fit_to_budget(supernet, drawn, budget, generator)
        if config not in known:
            known[config] = error(config)
        if len(known) >= evaluations:
            break
    return best_step(supernet, known, budget)


def breed(
    parents: Sequence[BitConfig], fresh: BitConfig, mutation: float, generator: Generator
) -> BitConfig:
    """Returns a child of two random parents.

    Each layer has the bits of one parent or, with probability `mutation`, those of `fresh`.
    """
    father, mother = itertools.islice(shuffle(parents, generator), 2)
    mutated, maternal = torch.rand(2, len(fresh), generator=generator)
    child = {}
    for (name, new), m, f in zip(fresh.items(), mutated, maternal, strict=True):
        inherited = (mother if f < 0.5 else father)[name]
        child[name] = new if m < mutation else inherited
    return BitConfig.of(child)


def evolution(
    supernet: Supernet,
    error: Error,
    budget: float,
    evaluations: int,
    generator: Generator,
    population: int = 24,
    mutation: float = 0.1,
) -> Step:
    """Returns the best configuration that evolutionary search finds.

    Starts from `population` random configurations. Then each new one is a child of two of the best
    `population` / 2, mutated with probability `mutation` in each layer, as in single-path one-shot
    NAS (arXiv 1904.00420). All are fitted to the budget. `budget`: BitOPs per image. `evaluations`:
    number of different configurations, fewer if the space is small. Raises ValueError for a value
    that is not allowed, and if no error is finite.

    Written here because, at 120 evaluations of nine layers (mean of 20 to 40 seeds, errors about
    3.2), scipy's differential evolution ends 0.15 [0.11, 0.19] higher and nevergrad 0.13 higher;
    pymoo's genetic algorithm ends 0.03 [0.01, 0.05] lower, but needs nine more packages and an
    adapter longer than this function.
    """
    check_count("evaluations", evaluations, 1)
    check_count("population", population, 4)
    if not isinstance(mutation, Real) or isinstance(mutation, bool) or not 0 <= mutation <= 1:
        raise ValueError(f"mutation={mutation!r} is not allowed: a number from 0 to 1")
    error, known = without_nan(error), {}
    for _ in range(TRIES * evaluations):
        child = sample(supernet.candidates, generator)
        if len(known) >= population:
            parents = sorted(known, key=known.__getitem__)[: population // 2]
            child = breed(parents, child, mutation, generator)
        child = fit_to_budget(supernet, tie(child, supernet.table), budget, generator)
        if child not in known:
            known[child] = error(child)
        if len(known) >= evaluations:
            break
    return best_step(supernet, known, budget)


def evaluate_all(supernet: Supernet, error: Error) -> dict[BitConfig, float]:
    """Returns the error of every configuration; NaN becomes infinity.

    Raises ValueError if there are more than MOST of them.
    """
    choices = {name: list(itertools.product(*c)) for name, c in supernet.candidates.items()}
    if (count := prod(map(len, choices.values()))) > MOST:
        raise ValueError(f"{count:.3g} configurations are too many: at most {MOST}. Restrict them")
    error = without_nan(error)
    every = (dict(zip(choices, bits, strict=True)) for bits in itertools.product(*choices.values()))
    configs = dict.fromkeys(tie(BitConfig.of(bits), supernet.table) for bits in every)
    return {config: error(config) for config in configs}


def restrict(supernet: Supernet, layers: int, bits: Sequence[int], rest: int = 4) -> Supernet:
    """Returns a view of the network in which few layers can be searched.

    `layers`: how many searchable layers keep the candidates `bits`, evenly spaced. The other ones
    have `rest` bits alone. The view shares weights and batch norms. Raises ValueError for a value
    that is not allowed, and if a layer has no such bits.
    """
    bits, rest = check_bits("bits", bits), check_bits("rest", [rest])
    free = [info.name for info in supernet.table if len(info.candidates.weight) > 1]
    check_count("layers", layers, 0, len(free))
    chosen = [free[i] for i in np.linspace(0, len(free) - 1, layers).round().astype(int)]

    def restrict_candidates(info: LayerInfo) -> Candidates:
        if info.name not in free:
            return info.candidates
        wanted = bits if info.name in chosen else rest
        kept = Candidates(*(tuple(b for b in wanted if b in own) for own in info.candidates))
        if not all(kept):
            raise ValueError(
                f"layer {info.name!r} has none of the bits {wanted}: {info.candidates}"
            )
        return kept

    view = copy.copy(supernet)
    view.table = [replace(info, candidates=restrict_candidates(info)) for info in supernet.table]
    acts = {info.name: info.candidates.act for info in view.table}
    view.table = [
        # Layers with other candidates than their neighbour's can share no activation bits.
        info
        if acts.get(info.input_of, acts[info.name]) == acts[info.name]
        else replace(info, input_of=None)
        for info in view.table
    ]
    return view
