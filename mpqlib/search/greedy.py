"""Greedy search, by inference alone, for the best bit-widths under a BitOPs or size limit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from math import inf, sqrt

from tqdm.auto import tqdm

from ..network.bits import BitConfig, largest, smallest
from ..network.cost import bitops, model_size
from ..network.supernet import LayerInfo, Supernet
from .error import Error
from .moves import PARTS, Errors, Move, Step, after, moves

ALPHA = 1.5  # weight of the error in the paper's score (RFQuant's release)


def normalised(values: Sequence[float]) -> list[float]:
    """Values scaled to 0..1 over their range; all 0 if they are equal."""
    low, span = min(values), max(values) - min(values)
    return [(v - low) / span if span else 0.0 for v in values]


def weight_target(table: Sequence[LayerInfo], start: BitConfig, budget: float) -> float:
    """BitOPs at which weights have done their half of the way from `start` to `budget`.

    The geometric mean of the two, fixed layers aside: from 6/6 bits to 4/4 it is 4/6 bits exactly.
    """
    free = [info for info in table if any(len(offered) > 1 for offered in info.candidates)]
    fixed = bitops(table, start) - bitops(free, start)
    return fixed + sqrt(max(budget - fixed, 0) * bitops(free, start))


def share(table: Sequence[LayerInfo], config: BitConfig, budget: float, size: float) -> float:
    """The largest share of a limit that `config` takes: of `budget` BitOPs, or of `size` bytes."""
    return max(bitops(table, config) / budget, model_size(table, config) / size)


def paper_scores(errors: Sequence[float], costs: Sequence[float], error: float, cost: float):
    """1.5 * (normalised error) + (normalised cost) after each move (RFQuant)."""
    terms = zip(normalised(errors), normalised(costs), strict=True)
    return [ALPHA * e + c for e, c in terms]


def ratio_scores(errors: Sequence[float], costs: Sequence[float], error: float, cost: float):
    """Error that each move down adds per cost that it saves."""
    return [(e - error) / (cost - c) for e, c in zip(errors, costs, strict=True)]


RULES = {"ratio": ratio_scores, "paper": paper_scores}


def best_move(
    costs: Mapping[Move, float], errors: Errors, cost: float, scores: Callable, exact: bool
) -> Move:
    """The move with the least of `scores`, such as `paper_scores`.

    `costs`: after each move; `cost`: now. Measured are moves never seen, and then the best until it
    is a fresh one; with `exact`, all of them.
    """
    errors.prepare((m for m in costs if m not in errors.fresh), exact)
    while True:
        known = [errors[move] for move in costs]
        found = scores(known, list(costs.values()), errors.now.error, cost)
        best = list(costs)[found.index(min(found))]
        if best in errors.fresh:
            return best
        errors.measure([best])


def descent(
    errors: Errors, supernet: Supernet, phases: Mapping, size: float, scores, up: bool, exact: bool
) -> Iterator[Step]:
    """Steps down until the limits of all `phases`, parts that may move -> BitOPs, and `size` hold.

    A step up must lead to what nothing on the path dominates, with no more error at no more cost,
    so that the search ends.
    """
    path = [errors.now]
    for parts, target in phases.items():
        cost = partial(share, supernet.table, budget=target, size=size)
        while (now := cost(config := errors.now.config)) > 1:
            offered = moves(config, supernet.candidates, parts, up)
            costs = {move: c for move in offered if (c := cost(move.of(config))) != now}
            if not any(c < now for c in costs.values()):
                break
            best = best_move(costs, errors, now, scores, exact)
            while costs[best] > now and any(
                s.error <= errors[best] and cost(s.config) <= costs[best] for s in path
            ):
                del costs[best]
                best = best_move(costs, errors, now, scores, exact)
            config = best.of(config)
            path.append(Step(config, errors[best], bitops(supernet.table, config)))
            yield errors.advance(path[-1], best)


def promising(
    errors: Errors, supernet: Supernet, budget: float, size: float, exact: bool
) -> tuple[Move, ...]:
    """The move up, alone or with one down, that promises the least error within the limits.

    What a pair promises is the sum of what its moves change one by one, measured when it is about
    to be taken. Empty where nothing promises less error than there is now.
    """
    config, now = errors.now.config, errors.now.error
    every = list(moves(config, supernet.candidates))
    errors.prepare(every, exact)
    ups, downs = ([m for m in every if (m.after > m.before) == up] for up in (True, False))
    pairs = [(up,) for up in ups] + [(u, d) for u in ups for d in downs if d[:2] != u[:2]]

    @cache
    def fits(pair: tuple[Move, ...]) -> bool:
        return share(supernet.table, after(config, pair), budget, size) <= 1

    while True:
        promised = {pair: sum(errors[move] - now for move in pair) for pair in pairs}
        less = sorted((p for p in pairs if promised[p] < 0), key=promised.__getitem__)
        best = next(filter(fits, less), ())
        stale = [move for move in best if move not in errors.fresh]
        if not stale:
            return best
        errors.measure(stale)


def exchanges(
    errors: Errors, supernet: Supernet, budget: float, size: float, exact: bool
) -> Iterator[Step]:
    """Steps on within the limits, by moves that are `promising`, as long as the error gets less."""
    errors = Errors(errors.error, errors.now)  # what was measured on the way down is out of date
    while taken := promising(errors, supernet, budget, size, exact):
        config = after(errors.now.config, taken)
        step = Step(config, errors.error(config), bitops(supernet.table, config))
        if step.error >= errors.now.error:
            break
        yield errors.advance(step, *taken)


def greedy(
    supernet: Supernet,
    error: Error,
    budget: float = inf,
    *,
    size: float = inf,
    rule: str = "ratio",
    up: bool = True,
    weights_first: bool = True,
    start: BitConfig | None = None,
    exact: bool = False,
) -> list[Step]:
    """Bidirectional greedy search by inference alone (RFQuant, arXiv 2401.01543): its path.

    By the rule "ratio" each step moves the layer down by one candidate that adds the least error
    for what it saves; once the limits hold, a move up is exchanged for one down as long as the
    error gets less. By "paper", RFQuant's, moves up and down compete at every step for the least
    weighted sum of error and cost. `up`: False leaves moves up out. `weights_first`: weights move
    until `weight_target`, then activations, then both, should the limits not hold yet; else both
    from the start. `budget`: BitOPs per image; `size`: bytes of weights; the cost is the larger
    share of a limit. `start`: the largest bits if None. `exact`: measure every move at every step,
    as the paper does, at many times the price. The last step is the result. Raises ValueError for
    an unknown rule, or limits below the smallest bits.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not allowed: one of {list(RULES)}")
    table, config = supernet.table, start or largest(supernet.candidates)
    if share(table, smallest(supernet.candidates), budget, size) > 1:
        raise ValueError(
            f"budget={budget / 1e9} G, size={size / 1e6} MB: no configuration is so small"
        )
    path = [Step(config, error(config), bitops(table, config))]
    errors = Errors(error, path[0])
    phases = {PARTS: budget}
    if weights_first:
        phases = {("weight",): weight_target(table, config, budget), ("act",): budget} | phases
    steps = descent(errors, supernet, phases, size, RULES[rule], up and rule == "paper", exact)
    if up and rule == "ratio":
        steps = chain(steps, exchanges(errors, supernet, budget, size, exact))
    for step in (bar := tqdm(steps, "search", unit=" steps", leave=False)):
        path.append(step)
        bar.set_postfix_str(f"{step.bitops / 1e9:.3f} G BitOPs", refresh=False)
    return path
