"""Greedy search, by inference alone, for the best bit-widths under a BitOPs or size limit."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from math import inf, sqrt

from tqdm.auto import tqdm

from ..network.bits import BitConfig, largest
from ..network.cost import bitops
from ..network.supernet import LayerInfo, Supernet, tied_inputs
from .error import Error, without_nan
from .limits import check_choices, check_limits, check_start, used_share
from .moves import BIT_WIDTHS, Errors, Move, Step, apply_moves, count_moves, possible_moves

ALPHA = 1.5  # weight of the error in the paper's score (RFQuant's release)
# The most steps up, and the most exchanges, for each move between the smallest and largest bits.
# A search whose errors are the same when asked again stays far below; others must end, too.
BOUND = 10


def normalise(values: Sequence[float]) -> list[float]:
    """Scales values to 0..1 over their range; returns zeros if they are equal."""
    # The range of halves cannot overflow.
    low, high = min(values) / 2, max(values) / 2
    return [(v / 2 - low) / (high - low) if high > low else 0.0 for v in values]


def weight_target(table: Sequence[LayerInfo], start: BitConfig, budget: float) -> float:
    """BitOPs per image at which the weights have gone down far enough.

    It is the geometric mean of `start` and `budget`, without layers that have a single candidate:
    half of the way, so that activations go as far. From 6/6 bits to 4/4 bits it is 4/6 bits.
    """
    free = [info for info in table if any(len(choices) > 1 for choices in info.candidates)]
    fixed = bitops(table, start) - bitops(free, start)
    return fixed + sqrt(max(budget - fixed, 0) * bitops(free, start))


def paper_scores(errors: Sequence[float], costs: Sequence[float], error: float, cost: float):
    """1.5 * (normalised error) + (normalised cost) after each move (RFQuant)."""
    terms = zip(normalise(errors), normalise(costs), strict=True)
    return [ALPHA * e + c for e, c in terms]


def ratio_scores(errors: Sequence[float], costs: Sequence[float], error: float, cost: float):
    """Error that each move down adds, divided by the cost that it saves."""
    return [(e - error) / (cost - c) for e, c in zip(errors, costs, strict=True)]


RULES = {"ratio": ratio_scores, "paper": paper_scores}


def check_options(
    *, rule: str = "ratio", up: bool = True, weights_first: bool = True, exact: bool = False
) -> None:
    """Raises ValueError if an option of `greedy` has a value that is not allowed."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not allowed: one of {list(RULES)}")
    check_choices(up=up, weights_first=weights_first, exact=exact)


def best_move(
    costs: Mapping[Move, float], errors: Errors, cost: float, scores: Callable, exact: bool
) -> Move | None:
    """Returns the move with the smallest score, or None if no move down has a finite error.

    `costs`: after each move; `cost`: now. `scores`: such as `paper_scores`. Measures moves without
    an estimate, then the best one until the best is measured. With `exact`, measures all moves.
    """
    errors.measure_unknown(costs, exact)
    while True:
        finite = [move for move in costs if errors[move] < inf]
        if not any(costs[move] < cost for move in finite):
            return None
        after = [errors[move] for move in finite], [costs[move] for move in finite]
        values = scores(*after, errors.now.error, cost)
        best = finite[values.index(min(values))]
        if best in errors.measured:
            return best
        errors.measure([best])


def lower_bits(
    errors: Errors, supernet: Supernet, phases: Mapping, size: float, scores, up: bool, exact: bool
) -> Iterator[Step]:
    """Yields steps until the limits hold. `phases`: bit-widths that may change -> BitOPs limit.

    A step up must lead to a configuration that no step of the path dominates (with at most its
    error at at most its cost). The number of steps up is bounded (BOUND), so that the search always
    ends. Raises ValueError if the limits do not hold and no move down has a finite error.
    """
    path, ups = [errors.now], BOUND * count_moves(supernet.candidates)
    for parts, target in phases.items():
        cost = partial(used_share, supernet.table, budget=target, size=size)
        while (now := cost(errors.now.config)) > 1:
            config = errors.now.config
            moves = possible_moves(
                config, supernet.candidates, parts, up and ups > 0, tied_inputs(supernet.table)
            )
            costs = {move: c for move in moves if (c := cost(move.apply(config))) != now}
            best = best_move(costs, errors, now, scores, exact)
            while (
                best
                and costs[best] > now
                and any(
                    step.error <= errors[best] and cost(step.config) <= costs[best] for step in path
                )
            ):
                del costs[best]
                best = best_move(costs, errors, now, scores, exact)
            if best is None:
                break
            if costs[best] > now:
                ups -= 1
            config = best.apply(config)
            path.append(Step(config, errors[best], bitops(supernet.table, config)))
            yield errors.advance(path[-1], best)
    if cost(errors.now.config) > 1:
        raise ValueError(
            f"the limits are not reached: after {len(path) - 1} steps, the error is NaN or infinite"
            " after every move down. Check weights, images and loss"
        )


def best_exchange(
    errors: Errors, supernet: Supernet, budget: float, size: float, exact: bool
) -> tuple[Move, ...]:
    """Returns the move up, alone or with one move down, that promises the lowest error.

    The promise of a pair is the sum of the changes of its moves, each measured before it is taken.
    Only pairs that keep the limits count. Returns () if none promises a lower error than now.
    """
    config, now = errors.now.config, errors.now.error
    moves = list(possible_moves(config, supernet.candidates, ties=tied_inputs(supernet.table)))
    errors.measure_unknown(moves, exact)
    ups = [move for move in moves if move.after > move.before]
    downs = [move for move in moves if move.after < move.before]
    singles = [(move,) for move in ups]
    pairs = [(u, d) for u in ups for d in downs if (u.layer, u.part) != (d.layer, d.part)]

    @cache
    def fits(pair: tuple[Move, ...]) -> bool:
        return used_share(supernet.table, apply_moves(config, pair), budget, size) <= 1

    while True:
        promised = {pair: sum(errors[move] - now for move in pair) for pair in singles + pairs}
        lower = sorted((p for p in promised if promised[p] < 0), key=promised.__getitem__)
        best = next(filter(fits, lower), ())
        estimated = [move for move in best if move not in errors.measured]
        if not estimated:
            return best
        errors.measure(estimated)


def exchange(
    errors: Errors, supernet: Supernet, budget: float, size: float, exact: bool
) -> Iterator[Step]:
    """Yields steps within the limits, each the `best_exchange`, while the error falls.

    Stops, with a warning, after BOUND times as many steps as there are moves between the
    smallest and the largest bits.
    """
    errors = Errors(errors.error, errors.now)  # changes measured on the way down are out of date
    most = BOUND * count_moves(supernet.candidates)
    for _ in range(most):
        moves = best_exchange(errors, supernet, budget, size, exact)
        config = apply_moves(errors.now.config, moves)
        step = Step(config, errors.error(config), bitops(supernet.table, config)) if moves else None
        if step is None or step.error >= errors.now.error:
            return
        yield errors.advance(step, *moves)
    if most:
        warnings.warn(
            f"greedy search stops after {most} exchanges although the error still falls: is the"
            " error function deterministic?",
            stacklevel=2,
        )


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
    """Bidirectional greedy search by inference alone (RFQuant, arXiv 2401.01543).

    Returns the path of the search; its last step is the result. `error`: of a configuration, such
    as `batch_error`; NaN counts as infinite, and no move to an infinite error is taken. `budget`:
    BitOPs per image. `size`: bytes of weights. The cost is the larger share of a limit.

    `rule`: "ratio" takes, at each step, the move down that adds the least error for the cost that
    it saves. Once the limits hold, it exchanges a move up for a move down while the error falls.
    "paper" is RFQuant's rule: at each step, moves up and down compete for the smallest weighted sum
    of error and cost. `up`: whether moves up are allowed. `weights_first`: change weights until
    `weight_target`, then activations, then both if the limits do not hold yet; else both from the
    start. `start`: where to go down from; None is the largest bits. `exact`: measure every move at
    every step, as the paper does, which needs many times as many evaluations.

    Raises ValueError for an option, a limit or a start that is not allowed, if the error of the
    start is not finite, and if only moves to infinite errors are left before the limits hold.
    """
    check_options(rule=rule, up=up, weights_first=weights_first, exact=exact)
    check_limits(supernet, budget, size)
    if start is not None:
        check_start(supernet, start, budget, size)
    table, config = supernet.table, start or largest(supernet.candidates)
    error = without_nan(error)
    path = [Step(config, error(config), bitops(table, config))]
    if path[0].error == inf:
        raise ValueError(
            "the error of the configuration to start from is NaN or infinite: check weights, images"
            " and loss"
        )
    errors = Errors(error, path[0])
    phases = {BIT_WIDTHS: budget}
    if weights_first:
        phases = {("weight",): weight_target(table, config, budget), ("act",): budget} | phases
    steps = lower_bits(errors, supernet, phases, size, RULES[rule], up and rule == "paper", exact)
    if up and rule == "ratio":
        steps = chain(steps, exchange(errors, supernet, budget, size, exact))
    for step in (bar := tqdm(steps, "search", unit=" steps", leave=False)):
        path.append(step)
        bar.set_postfix_str(f"{step.bitops / 1e9:.3f} G BitOPs", refresh=False)
    return path
