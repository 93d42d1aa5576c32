"""Inference-only bidirectional greedy search for the best bit-widths under a BitOPs budget."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .cost import bitops, layer_bitops
from .evaluation import batch_statistics
from .layers import Candidates
from .supernet import BitConfig, LayerInfo, Supernet, largest

Error = Callable[[BitConfig], float]


@dataclass(frozen=True)
class Step:
    """One accepted move: the configuration it led to, its error and its BitOPs."""

    config: BitConfig
    error: float
    bitops: int


def batch_error(supernet: Supernet, x: Tensor, y: Tensor) -> Error:
    """The error a search minimises: cross-entropy on one batch of the search split.

    x: images (N, C, H, W); y: labels (N). Batch norms use the batch's own statistics, which any
    configuration has at once, without recalibration (as RFQuant's release does).
    """

    @torch.inference_mode()
    def error(config: BitConfig) -> float:
        with batch_statistics(supernet):
            return float(F.cross_entropy(supernet(x, config), y))

    supernet.eval()
    return error


def moves(
    config: BitConfig, candidates: Mapping[str, Candidates], parts: Sequence[str]
) -> Iterator[BitConfig]:
    """Every configuration one candidate up or down from `config` in one layer.

    `parts`: which of a layer's bit-widths may move, "weight", "act" or both.
    """
    for name, bits in config.items():
        for part in parts:
            offered = getattr(candidates[name], part)
            at = offered.index(getattr(bits, part))
            for to in (at - 1, at + 1):
                if 0 <= to < len(offered):
                    yield config.replace(name, bits._replace(**{part: offered[to]}))


def normalised(values: Sequence[float]) -> list[float]:
    """Values scaled to 0..1 over their range; all 0 if they are equal."""
    low, span = min(values), max(values) - min(values)
    return [(v - low) / span if span else 0.0 for v in values]


def weight_target(table: Sequence[LayerInfo], start: BitConfig, budget: float) -> float:
    """BitOPs at which weights have done their half of the way from `start` to `budget`.

    The geometric mean of the two, fixed layers aside: from 6/6 bits to 4/4 it is 4/6 bits exactly.
    """
    fixed = sum(
        layer_bitops(info, start[info.name])
        for info in table
        if all(len(offered) == 1 for offered in info.candidates)
    )
    return fixed + sqrt(max(budget - fixed, 0) * (bitops(table, start) - fixed))


def greedy(
    supernet: Supernet,
    error: Error,
    budget: float,
    *,
    alpha: float = 1.5,
    start: BitConfig | None = None,
) -> list[Step]:
    """Bidirectional greedy search (RFQuant, arXiv 2401.01543): the path from `start` to the budget.

    Each step tries every layer one candidate up and one down and takes the move with the least
    alpha * (normalised error) + (normalised BitOPs), both scaled over the step's moves. A move up
    must lead to a configuration not visited before, so that the search ends. Weights move first,
    until `weight_target`; then activations; then both, should the budget not hold yet. `budget`:
    BitOPs per image. `start`: the largest bits if None. The last step is the result.
    Raises ValueError for a budget below the smallest bits.
    """
    table, candidates = supernet.table, supernet.candidates
    config = start or largest(candidates)
    path = [Step(config, error(config), bitops(table, config))]
    visited = {config}
    phases = [
        (("weight",), weight_target(table, config, budget)),
        (("act",), budget),
        (("weight", "act"), budget),
    ]
    with tqdm(desc="search", unit=" passes", leave=False) as bar:
        for parts, target in phases:
            while (now := path[-1].bitops) > target:
                nearby = [(c, bitops(table, c)) for c in moves(path[-1].config, candidates, parts)]
                if not any(cost < now for _, cost in nearby):
                    break
                options = [c for c, cost in nearby if cost < now or c not in visited]
                costs = [bitops(table, c) for c in options]
                errors = [error(c) for c in options]
                scores = zip(normalised(errors), normalised(costs), strict=True)
                best = min(enumerate(scores), key=lambda item: alpha * item[1][0] + item[1][1])[0]
                path.append(Step(options[best], errors[best], costs[best]))
                visited.add(options[best])
                bar.update(len(options))
                bar.set_postfix_str(f"{costs[best] / 1e9:.3f} of {budget / 1e9:.3f} G BitOPs")
    if path[-1].bitops > budget:
        raise ValueError(f"budget={budget / 1e9} G: no configuration needs so few BitOPs")
    return path
