"""Bit-widths by integer programming on a sensitivity table, under BitOPs and size limits."""

import ctypes
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import product
from math import gcd, inf, isfinite
from threading import Lock

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ..network.bits import BitConfig, Bits, check_config
from ..network.cost import bitops, layer_bitops
from ..network.supernet import Supernet
from .error import Error, without_nan
from .limits import check_choices, check_count, check_limits, describe_costs, used_share
from .moves import Step
from .sensitivity import Sensitivity, Ties, measure_sensitivity, quick_table

LARGEST_COST = 1e6  # that the solver sees: it ends within 1e-6 of the lowest sum
OUTPUT = Lock()  # two threads must not redirect the standard output at the same time


@contextmanager
def silent_c_code() -> Iterator[None]:
    """Drops what C code writes to the standard output.

    HiGHS prints a debugging line when it repairs a rounded solution, whatever `disp` says (HiGHS.jl
    issue 312). Does nothing on systems other than POSIX.
    """
    if os.name != "posix":
        yield
        return
    c = ctypes.CDLL(None)
    with OUTPUT, open(os.devnull, "wb") as nowhere:
        c.fflush(None)  # keeps what was written before
        kept = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            c.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


class Program:
    """A linear program in which some variables are 0 or 1; grows by variables and rows."""

    def __init__(self):
        self.costs: list[float] = []
        self.binary: list[bool] = []
        self.groups: list[list[int]] = []  # one variable of each group is 1
        self.rows: list[tuple[Mapping[int, float], float, float]] = []

    def add_variable(self, cost: float = 0.0, binary: bool = False) -> int:
        """Adds a variable from 0 to 1; returns its index."""
        self.costs.append(cost)
        self.binary.append(binary)
        return len(self.costs) - 1

    def add_row(self, terms: Mapping[int, float], low: float = -inf, high: float = inf) -> None:
        """Adds low <= sum of coefficient x variable <= high. `terms`: index -> coefficient."""
        # The solver's tolerances are absolute: the largest coefficient becomes 1.
        scale = max(map(abs, terms.values()))
        scaled = {index: value / scale for index, value in terms.items()}
        self.rows.append((scaled, low / scale, high / scale))

    def add_group(self, variables: Iterable[int]) -> None:
        """Demands that exactly one of `variables` is 1."""
        self.groups.append(list(variables))
        self.add_row(dict.fromkeys(self.groups[-1], 1.0), 1, 1)

    def minimise(self) -> np.ndarray | None:
        """Returns the variables with the smallest sum of cost x variable, or None if none fit.

        The solver's tolerances are absolute, so that huge costs would hide small ones. The lowest
        cost of each group is subtracted from all of it. Then the best solution holds no variable
        that alone costs more than some whole solution: these are left out, and the rest is solved
        again. All variables with a cost are in groups.
        """
        costs = np.zeros(len(self.costs))
        for group in self.groups:
            own = np.array([self.costs[i] for i in group])
            costs[group] = own - own.min()
        most = costs.max()
        while (found := self._minimise(costs, most)) is not None:
            total = costs @ found.round()
            remaining = costs[costs <= total].max()
            if most <= 1000 * remaining or most == 0:
                return found
            most = remaining
        return None

    def _minimise(self, costs: np.ndarray, most: float) -> np.ndarray | None:
        """Solves the program without the variables that cost more than `most`."""
        entries = [(i, j, v) for i, (row, _, _) in enumerate(self.rows) for j, v in row.items()]
        i, j, values = zip(*entries, strict=True)
        shape = len(self.rows), len(self.costs)
        low, high = zip(*((low, high) for _, low, high in self.rows), strict=True)
        limits = LinearConstraint(csr_array((values, (i, j)), shape), low, high)
        scaled = np.minimum(costs, most) * (LARGEST_COST / (most or 1))
        how = dict(integrality=self.binary, bounds=Bounds(0, costs <= most), constraints=limits)
        with silent_c_code():
            found = milp(scaled, **how, options={"mip_rel_gap": 0})
        if found.status not in (0, 2):  # 2: infeasible
            raise RuntimeError(f"the integer program was not solved: {found.message}")
        return found.x


def add_limit(program: Program, terms: Mapping[int, float], limit: float) -> None:
    """Adds sum of coefficient x variable <= limit, for variables that are all 0 or 1.

    The sum is a multiple of the coefficients' greatest common divisor. So a limit half of it above
    the last multiple allowed keeps the solver's tolerance away from what decides. Coefficients are
    whole numbers, or fifths where weights are ternary.
    """
    unit = gcd(*(round(5 * value) for value in terms.values())) / 5
    program.add_row(terms, high=((limit / unit * (1 + 1e-14) + 1e-9) // 1 + 0.5) * unit)


Choices = dict[str, dict[Bits, int]]  # layer -> bits -> variable: whether the layer has these bits


def _sum(*indices: int) -> dict[int, float]:
    return dict.fromkeys(indices, 1.0)


def _with(choices: Mapping[Bits, int], part: str, bits: int) -> list[int]:
    """Variables of one layer in which `part` has `bits`: one of them is 1, or none."""
    return [index for pair, index in choices.items() if getattr(pair, part) == bits]


def add_choices(program: Program, table: Sensitivity, equal_bits: bool) -> Choices:
    """Adds a variable for each layer and pair of bits; each layer takes one pair.

    Pairs whose error is infinite are left out, and with `equal_bits` those of unlike bits.
    """
    choices: Choices = {}
    for name, candidates in table.candidates.items():
        pairs = [Bits(*pair) for pair in product(*candidates)]
        if equal_bits:
            pairs = [pair for pair in pairs if pair.weight == pair.act]
        change = {p: table.predict(table.base.replace(name, p)) - table.error for p in pairs}
        choices[name] = {
            pair: program.add_variable(change[pair], binary=True)
            for pair in pairs
            if isfinite(change[pair])
        }
        if not choices[name]:
            demanded = "no bits that weights and activations share" if equal_bits else "no bits"
            raise ValueError(f"layer {name!r} has {demanded} with a finite error: {candidates}")
        program.add_group(choices[name].values())
    return choices


def add_ties(program: Program, choices: Choices, ties: Ties) -> None:
    """Demands that the layers of each group have the same activation bits."""
    for first, *others in ties:
        for other in others:
            for act in {pair.act for name in (first, other) for pair in choices[name]}:
                here, there = (_with(choices[name], "act", act) for name in (first, other))
                program.add_row(_sum(*here) | dict.fromkeys(there, -1.0), 0, 0)


def add_bitops(program: Program, supernet: Supernet, choices: Choices, budget: float) -> None:
    """Limits the BitOPs per image."""
    terms = {
        index: layer_bitops(info, bits)
        for info in supernet.table
        for bits, index in choices[info.name].items()
    }
    add_limit(program, terms, budget)


def add_size(program: Program, supernet: Supernet, choices: Choices, size: float) -> None:
    """Limits the bytes of the weights; shared weights count once for each width in use."""
    terms: dict[int, int] = {}
    users = defaultdict(list)
    for info in supernet.table:
        users[info.tied_to or info.name].append(info)
    for layers in users.values():
        for weight in sorted({bits.weight for info in layers for bits in choices[info.name]}):
            stored = program.add_variable()  # at least 1 if one of the layers has this width
            for info in layers:
                using = _with(choices[info.name], "weight", weight)
                program.add_row(_sum(*using) | {stored: -1.0}, high=0)
            terms[stored] = layers[0].weights * weight  # bits
    add_limit(program, terms, 8 * size)


def add_interactions(program: Program, table: Sensitivity, choices: Choices) -> None:
    """Adds what pairs of changes in two layers do together.

    The product of two choices becomes a variable. For each choice in one place, its products with
    all choices in the other place add up to the choice itself.
    """
    places = defaultdict(dict)
    for first, second in table.pairs:
        followers = [m for m in (first, second) if m.part == "act" and m.layer in table.input_of]
        if first.layer != second.layer and not followers:
            effect = table.interaction(first, second)
            places[first[:2], second[:2]][first.after, second.after] = effect
    for (one, other), effects in places.items():
        chosen = {
            place: {
                bits: _with(choices[place[0]], place[1], bits)
                for bits in getattr(table.candidates[place[0]], place[1])
            }
            for place in (one, other)
        }
        both = {
            pair: program.add_variable(effect)
            for pair in product(chosen[one], chosen[other])
            if isfinite(effect := effects.get(pair, 0.0))
        }
        program.add_group(both.values())
        for side, place in enumerate((one, other)):
            for bits, indices in chosen[place].items():
                products = [index for pair, index in both.items() if pair[side] == bits]
                if terms := _sum(*products) | dict.fromkeys(indices, -1.0):
                    program.add_row(terms, 0, 0)


def solve(
    supernet: Supernet,
    table: Sensitivity,
    budget: float = inf,
    *,
    size: float = inf,
    equal_bits: bool = False,
    near: BitConfig | None = None,
    radius: int | None = None,
) -> BitConfig:
    """Returns the configuration within the limits that has the lowest error by the table.

    The predicted error is `table.predict`. `budget`: BitOPs per image. `size`: bytes of weights.
    `equal_bits`: weights and activations of a layer have the same bits. `near`, `radius`: change at
    most `radius` layers of the configuration `near`. Layers that the table ties share their
    activation bits. Raises ValueError if the table is of another network or of other weights, for a
    value that is not allowed, and if no configuration is within the limits.
    """
    check_limits(supernet, budget, size)
    check_choices(equal_bits=equal_bits)
    table.check(supernet)
    program = Program()
    choices = add_choices(program, table, equal_bits)
    add_ties(program, choices, table.ties)
    add_interactions(program, table, choices)
    if budget < inf:
        add_bitops(program, supernet, choices, budget)
    if size < inf:
        add_size(program, supernet, choices, size)
    if near is not None:
        check_config("near", near, supernet.candidates)
        check_count("radius", radius, 0)
        kept = [choices[name][bits] for name, bits in near.items() if bits in choices[name]]
        program.add_row(_sum(*kept), low=len(near) - radius)
    while (values := program.minimise()) is not None:
        config = BitConfig.of({n: max(c, key=lambda b: values[c[b]]) for n, c in choices.items()})
        if used_share(supernet.table, config, budget, size) <= 1:
            return config
        # The solver's tolerance let it exceed a limit by a hair: exclude this configuration.
        program.add_row(_sum(*(choices[n][b] for n, b in config.items())), high=len(config) - 1)
    demands = " with equal_bits=True" if equal_bits else ""
    demands += f" and ties={table.ties}" if table.ties else ""
    raise ValueError(f"no configuration is within {describe_costs(budget, size)}{demands}")


def assignment(
    supernet: Supernet,
    error: Error,
    budget: float = inf,
    *,
    size: float = inf,
    base: BitConfig | None = None,
    pairs: str = "none",
    smooth: bool = True,
    rounds: int = 0,
    radius: int = 4,
    ties: Ties | None = None,
    equal_bits: bool = False,
) -> list[Step]:
    """Assigns bit-widths by an integer program on a sensitivity table.

    Returns the base, then the solution, then one step for each further round that lowers the error;
    the last step is the result. `error`: of a configuration, such as `batch_error`. `budget`:
    BitOPs per image. `size`: bytes of weights. `base`, `pairs`, `ties`: as in
    `measure_sensitivity`, but None is `quick_table`, from the largest bits, if the table is
    smoothed and has no pairs. `smooth`: solve the smoothed table, as `Sensitivity.smooth` says, or
    the changes as measured. `rounds`: how often, at most, to measure the table again around the
    solution and change at most `radius` layers. `equal_bits`: as in `solve`. Raises ValueError as
    these do, and if the error of the solution is not finite.
    """
    check_count("rounds", rounds, 0)
    check_limits(supernet, budget, size)
    check_choices(smooth=smooth, equal_bits=equal_bits)
    error = cache(without_nan(error))

    def measure(base: BitConfig | None) -> Sensitivity:
        if base is None and smooth and pairs == "none":
            return quick_table(supernet, error, ties)
        table = measure_sensitivity(supernet, error, base, pairs=pairs, ties=ties)
        return table.smooth() if smooth else table

    def step(table: Sensitivity, **near) -> Step:
        config = solve(supernet, table, budget, size=size, equal_bits=equal_bits, **near)
        return Step(config, error(config), bitops(supernet.table, config))

    table = measure(base)
    path = [Step(table.base, table.error, bitops(supernet.table, table.base)), step(table)]
    if path[-1].error == inf:
        raise ValueError("the error of the solution is NaN or infinite: start from another base")
    for _ in range(rounds):
        now = path[-1]
        found = step(measure(now.config), near=now.config, radius=radius)
        if not found.error < now.error:
            break
        path.append(found)
    return path


def check_budgets(budgets: Iterable[float]) -> list[float]:
    """Returns the budgets as a list. Raises ValueError if they are no numbers one after another."""
    try:
        listed = [] if isinstance(budgets, str) else list(budgets)
    except TypeError:  # a single number, of Python, numpy or torch
        listed = []
    if not listed:
        raise ValueError(f"budgets={budgets!r} is not allowed: one or more BitOPs, such as [3e9]")
    return listed


def check_table(table: Sensitivity, ties: Ties | None) -> None:
    """Raises ValueError if `table` is no table, or has other ties than `ties`, if given."""
    if not isinstance(table, Sensitivity):
        raise ValueError(f"table={table!r} is no Sensitivity: read a file by Sensitivity.load")
    if ties is not None and {frozenset(g) for g in table.ties} != {frozenset(g) for g in ties}:
        raise ValueError(f"ties={ties!r}, but the table was measured with ties={table.ties!r}")


def front(
    supernet: Supernet,
    error: Error,
    budgets: Iterable[float],
    table: Sensitivity | None = None,
    *,
    size: float = inf,
    smooth: bool = True,
    ties: Ties | None = None,
    equal_bits: bool = False,
) -> list[Step]:
    """Assigns bit-widths for each budget from one table; returns the solution for each.

    `budgets`: BitOPs per image. `table`: from `measure_sensitivity`, with the same `ties` if these
    are given; None is `quick_table`. A step holds the solution of the integer program with its
    error, which is measured once and chooses nothing. The other parameters are as in `assignment`.
    Raises ValueError as `solve` does.
    """
    budgets = check_budgets(budgets)
    for budget in budgets:
        check_limits(supernet, budget, size)
    check_choices(smooth=smooth)
    error = cache(without_nan(error))
    if table is None:
        table = quick_table(supernet, error, ties)
    check_table(table, ties)
    table = table.smooth() if smooth else table
    configs = [solve(supernet, table, b, size=size, equal_bits=equal_bits) for b in budgets]
    return [Step(c, error(c), bitops(supernet.table, c)) for c in configs]
