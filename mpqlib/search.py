"""Greedy search, by inference alone, for the best bit-widths under a BitOPs or size limit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .cost import bitops, layer_bitops, model_size
from .evaluation import batch_statistics, layer_norms, outside_norms
from .incremental import Incremental
from .layers import Candidates
from .supernet import BitConfig, LayerInfo, Supernet, largest

Error = Callable[[BitConfig], float]
ALPHA = 1.5  # weight of the error in the paper's score (RFQuant's release)


@dataclass(frozen=True)
class Step:
    """One accepted move: the configuration it led to, its error and its BitOPs."""

    config: BitConfig
    error: float
    bitops: int


def batch_error(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Error:
    """The error a search minimises: cross-entropy on one batch of the search split.

    x: images (N, C, H, W); y: labels (N); `loss`: of logits (N, classes) and labels. Batch norms
    use the batch's own statistics, which any configuration has at once, without recalibration (as
    RFQuant's release does). Activations are kept from call to call (`Incremental`): ask for it anew
    once the weights have changed.
    """
    logits, outside = Incremental(supernet.eval(), x), outside_norms(supernet)

    @torch.inference_mode()
    def error(config: BitConfig) -> float:
        with batch_statistics(layer_norms(supernet, config) + outside):
            return float(loss(logits(config), y))

    return error


class Move(NamedTuple):
    """A change of one of a layer's bit-widths, `part`: "weight" or "act"."""

    layer: str
    part: str
    before: int
    after: int

    def of(self, config: BitConfig) -> BitConfig:
        """The configuration that it leads to from `config`."""
        return config.replace(self.layer, config[self.layer]._replace(**{self.part: self.after}))


def moves(
    config: BitConfig, candidates: Mapping[str, Candidates], parts: Sequence[str], up: bool = True
) -> Iterator[Move]:
    """Every move one candidate down or, with `up`, up from `config` in one bit-width of one layer.

    `parts`: which of a layer's bit-widths may move, "weight", "act" or both.
    """
    for name, bits in config.items():
        for part in parts:
            offered, now = getattr(candidates[name], part), getattr(bits, part)
            at = offered.index(now)
            for to in (at - 1, at + 1)[: 1 + up]:
                if 0 <= to < len(offered):
                    yield Move(name, part, now, offered[to])


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


def share(table: Sequence[LayerInfo], config: BitConfig, budget: float, size: float) -> float:
    """The largest share of a limit that `config` takes: of `budget` BitOPs, or of `size` MB."""
    return max(bitops(table, config) / budget, model_size(table, config) / size)


@dataclass
class Errors:
    """What is known of the errors after each move, much of it measured at earlier steps.

    A move is taken to change the error by as much as it did when it was last measured.
    """

    error: Error
    now: Step
    changes: dict[Move, float] = field(default_factory=dict)  # error after a move less before
    fresh: dict[Move, float] = field(default_factory=dict)  # errors measured at the present step

    def measure(self, move: Move) -> None:
        """Measures the error after `move` at the present step."""
        self.fresh[move] = self.error(move.of(self.now.config))
        self.changes[move] = self.fresh[move] - self.now.error

    def __getitem__(self, move: Move) -> float:
        return self.fresh.get(move, self.now.error + self.changes[move])

    def advance(self, move: Move, step: Step) -> None:
        """Goes on from `step`, to which `move` led; the way back undoes its change."""
        back = move._replace(before=move.after, after=move.before)
        self.changes[back] = -self.changes[move]
        self.now, self.fresh = step, {}


def paper_scores(errors: Sequence[float], costs: Sequence[float], error: float, cost: float):
    """1.5 * (normalised error) + (normalised cost) after each move (RFQuant)."""
    terms = zip(normalised(errors), normalised(costs), strict=True)
    return [ALPHA * e + c for e, c in terms]


def ratio_scores(errors: Sequence[float], costs: Sequence[float], error: float, cost: float):
    """Error that each move adds per cost it saves; a move up: what it gains per cost it adds."""
    return [(e - error) / (cost - c) for e, c in zip(errors, costs, strict=True)]


class Rule(NamedTuple):
    """How a move is chosen: that of the least score, of moves down or, with `up`, up as well."""

    scores: Callable
    up: bool


RULES = {"ratio": Rule(ratio_scores, up=False), "paper": Rule(paper_scores, up=True)}


def best_move(
    costs: Mapping[Move, float], errors: Errors, cost: float, rule: Callable, exact: bool
) -> Move:
    """The move with the least score by `rule`, such as `paper_scores`.

    `costs`: after each move; `cost`: now. Measured are moves never seen, and then the best until it
    is a fresh one; with `exact`, all of them.
    """
    for move in costs:
        if move not in errors.fresh and (exact or move not in errors.changes):
            errors.measure(move)
    while True:
        after = [errors[move] for move in costs]
        scores = rule(after, list(costs.values()), errors.now.error, cost)
        best = list(costs)[scores.index(min(scores))]
        if best in errors.fresh:
            return best
        errors.measure(best)


def greedy(
    supernet: Supernet,
    error: Error,
    budget: float = inf,
    *,
    size: float = inf,
    rule: str = "ratio",
    up: bool | None = None,
    weights_first: bool = True,
    start: BitConfig | None = None,
    exact: bool = False,
) -> list[Step]:
    """Greedy search by inference alone (RFQuant, arXiv 2401.01543): the path from `start` down.

    Each step tries every layer one candidate down and takes the best move. By the rule "ratio" it
    is the one that adds the least error for what it saves; by "paper", RFQuant's, that of the least
    weighted sum of both, and moves up count as well. `up` says otherwise. A move up must lead to
    what nothing on the path dominates, with no more error at no more cost, so that the search ends.
    `weights_first`: weights move until `weight_target`, then activations, then both, should the
    limits not hold yet; else both from the start. `budget`: BitOPs per image; `size`: MB of
    weights; the cost is the largest share of a limit. `start`: the largest bits if None. `exact`:
    measure every move at every step, as the paper does, at many times the price. The last step is
    the result. Raises ValueError for an unknown rule, or limits below the smallest bits.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not allowed: one of {list(RULES)}")
    scores, up = RULES[rule].scores, RULES[rule].up if up is None else up
    table, candidates = supernet.table, supernet.candidates
    config = start or largest(candidates)
    path = [Step(config, error(config), bitops(table, config))]
    errors = Errors(error, path[0])
    phases = {("weight", "act"): budget}
    if weights_first:
        phases = {("weight",): weight_target(table, config, budget), ("act",): budget} | phases
    with tqdm(desc="search", unit=" steps", leave=False) as bar:
        for parts, target in phases.items():
            cost = partial(share, table, budget=target, size=size)
            while (now := cost(config)) > 1:
                costs = {
                    move: cost(move.of(config)) for move in moves(config, candidates, parts, up)
                }
                costs = {move: c for move, c in costs.items() if c != now}
                if not any(c < now for c in costs.values()):
                    break
                best = best_move(costs, errors, now, scores, exact)
                while costs[best] > now and any(
                    s.error <= errors[best] and cost(s.config) <= costs[best] for s in path
                ):
                    del costs[best]
                    best = best_move(costs, errors, now, scores, exact)
                config = best.of(config)
                path.append(Step(config, errors[best], bitops(table, config)))
                errors.advance(best, path[-1])
                bar.update()
                bar.set_postfix_str(f"{path[-1].bitops / 1e9:.3f} of {budget / 1e9:.3f} G BitOPs")
    if share(table, config, budget, size) > 1:
        raise ValueError(f"budget={budget / 1e9} G, size={size} MB: no configuration is so small")
    return path
