"""Inference-only bidirectional greedy search for the best bit-widths under a BitOPs budget."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .cost import bitops, layer_bitops
from .evaluation import batch_statistics
from .layers import Bits, Candidates
from .supernet import BitConfig, LayerInfo, Supernet, largest

Error = Callable[[BitConfig], float]
ALPHA = 1.5  # weight of the error in the paper's score (RFQuant's release)


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


class Move(NamedTuple):
    """A change of one layer's bits."""

    layer: str
    before: Bits
    after: Bits


def moves(
    config: BitConfig, candidates: Mapping[str, Candidates], parts: Sequence[str], up: bool = True
) -> Iterator[Move]:
    """Every move one candidate down or, with `up`, up from `config` in one bit-width of one layer.

    `parts`: which of a layer's bit-widths may move, "weight", "act" or both.
    """
    for name, bits in config.items():
        for part in parts:
            offered = getattr(candidates[name], part)
            at = offered.index(getattr(bits, part))
            for to in (at - 1, at + 1)[: 1 + up]:
                if 0 <= to < len(offered):
                    yield Move(name, bits, bits._replace(**{part: offered[to]}))


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


@dataclass
class Errors:
    """What is known of the errors after each move, some of it measured at earlier steps.

    A move changes the error by about as much as it did when it was last measured.
    """

    error: Error
    now: Step
    known: dict[Move, tuple[float, float]] = field(default_factory=dict)  # error after and before
    fresh: set[Move] = field(default_factory=set)  # measured at the present step

    def measure(self, move: Move) -> None:
        """Measures the error after `move` at the present step."""
        after = self.error(self.now.config.replace(move.layer, move.after))
        self.known[move] = after, self.now.error
        self.fresh.add(move)

    def __getitem__(self, move: Move) -> float:
        after, before = self.known[move]
        return after if move in self.fresh else self.now.error + after - before


def paper_scores(errors: Sequence[float], costs: Sequence[int], now: Step) -> list[float]:
    """1.5 * (normalised error) + (normalised BitOPs) after each move (RFQuant)."""
    terms = zip(normalised(errors), normalised(costs), strict=True)
    return [ALPHA * error + cost for error, cost in terms]


def ratio_scores(errors: Sequence[float], costs: Sequence[int], now: Step) -> list[float]:
    """Error that each move adds per BitOPs it saves; a move up gains that much per BitOPs spent."""
    return [
        (error - now.error) / (now.bitops - cost) for error, cost in zip(errors, costs, strict=True)
    ]


RULES = {"paper": paper_scores, "ratio": ratio_scores}


def best_move(costs: Mapping[Move, int], errors: Errors, rule: str, exact: bool) -> Move:
    """The move with the least score by `rule`, one of RULES.

    `costs`: BitOPs after each move. Measured are moves never seen, and then the best until it is a
    fresh one; with `exact`, all of them.
    """
    for move in costs:
        if move not in errors.fresh and (exact or move not in errors.known):
            errors.measure(move)
    while True:
        after = [errors[move] for move in costs]
        scores = RULES[rule](after, list(costs.values()), errors.now)
        best = list(costs)[scores.index(min(scores))]
        if best in errors.fresh:
            return best
        errors.measure(best)


def dominated(path: Sequence[Step], error: float, cost: int) -> bool:
    """Whether a step has at most this error at no more than this cost in BitOPs."""
    return any(step.error <= error and step.bitops <= cost for step in path)


def greedy(
    supernet: Supernet,
    error: Error,
    budget: float,
    *,
    rule: str = "paper",
    up: bool = True,
    weights_first: bool = True,
    start: BitConfig | None = None,
    exact: bool = False,
) -> list[Step]:
    """Bidirectional greedy search (RFQuant, arXiv 2401.01543): the path from `start` to the budget.

    Each step tries every layer one candidate down and, with `up`, one up, and takes the best move
    by `rule`, one of RULES. A move up must lead to a configuration that none on the path dominates,
    with no more error at no more BitOPs: so the search does not wander, and it ends.
    `weights_first`: weights move until `weight_target`, then activations, then both, should the
    budget not hold yet; else both from the start. `budget`: BitOPs per image. `start`: the largest
    bits if None. `exact`: measure every move at every step, as the paper does, at many times the
    cost. The last step is the result. Raises ValueError for an unknown rule, or a budget below the
    smallest bits.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not allowed: one of {list(RULES)}")
    table, candidates = supernet.table, supernet.candidates
    config = start or largest(candidates)
    path = [Step(config, error(config), bitops(table, config))]
    errors = Errors(error, path[0])
    phases = {("weight", "act"): budget}
    if weights_first:
        phases = {("weight",): weight_target(table, config, budget), ("act",): budget} | phases
    with tqdm(desc="search", unit=" steps", leave=False) as bar:
        for parts, target in phases.items():
            while (now := path[-1]).bitops > target:
                errors.now, errors.fresh = now, set()
                costs = {
                    move: bitops(table, now.config.replace(move.layer, move.after))
                    for move in moves(now.config, candidates, parts, up)
                }
                if all(cost >= now.bitops for cost in costs.values()):
                    break
                best = best_move(costs, errors, rule, exact)
                while costs[best] > now.bitops and dominated(path, errors[best], costs[best]):
                    del costs[best]
                    best = best_move(costs, errors, rule, exact)
                config = now.config.replace(best.layer, best.after)
                path.append(Step(config, errors[best], costs[best]))
                bar.update()
                bar.set_postfix_str(f"{costs[best] / 1e9:.3f} of {budget / 1e9:.3f} G BitOPs")
    if path[-1].bitops > budget:
        raise ValueError(f"budget={budget / 1e9} G: no configuration needs so few BitOPs")
    return path
