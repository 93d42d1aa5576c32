"""How the error changes when one bit-width of one layer changes: a table that is a file."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise, product
from math import inf, isfinite, isnan, nan
from pathlib import Path
from statistics import median

import pandas as pd
from pandas.errors import EmptyDataError, ParserError

from ..files import save_atomically
from ..network.bits import BitConfig, Candidates, check_config, largest
from ..network.quantizer import TERNARY
from ..network.supernet import Supernet, tied_inputs
from .error import Error, hash_tensors, network_tensors, without_nan
from .moves import BIT_WIDTHS, Move, apply_moves

PAIRS = ("none", "layers", "neighbours")
_COLUMNS = ["layer", "part", "base_bits", "bits", "error", "change", "base_error", "input_of"]
_ABOUT = ["smoothed", "network", "images"]  # of the whole table; files of earlier versions lack it
_OTHER = ["other_layer", "other_part", "other_base_bits", "other_bits"]  # of a pair of changes

# The least slope of a smoothed table, as a share of the median slope: more bits never harm.
LEAST_SLOPE = 0.1

# Of `quick_table`: the least change of an error, and what a bit more can divide a change by. The
# power of rounding noise falls by four.
LEAST_CHANGE = 1e-9
LEAST_RATIO, LARGEST_RATIO = 2.0, 8.0

Ties = Sequence[Sequence[str]]  # groups of layers that share their activation bits


def moves_between(before: BitConfig, after: BitConfig) -> Iterator[Move]:
    """Yields a move for each bit-width that differs between two configurations."""
    for name in before:
        for part, old, new in zip(BIT_WIDTHS, before[name], after[name], strict=True):
            if old != new:
                yield Move(name, part, old, new)


@dataclass(frozen=True)
class Sensitivity:
    """Errors after single changes of a base configuration.

    `base`: the configuration. `error`: its error. `errors`: after each change of one bit-width, and
    after those changes of two that were measured, in the network's order; infinite where the error
    is not a finite number. `ties`: groups of layers that share their activation bits. A change of
    one such layer changes all of its group. `smoothed`: a curve gives the changes, by `smooth` or
    `quick_table`. `network`: hash of the weights and step sizes that it was measured with.
    `images`: hash of the images, if the error names them. A hash is "" if it is unknown, as in a
    table made by hand.
    """

    base: BitConfig
    error: float
    errors: Mapping[tuple[Move, ...], float]
    ties: tuple[tuple[str, ...], ...] = ()
    smoothed: bool = False
    network: str = ""
    images: str = ""

    def change(self, *moves: Move) -> float:
        """Error after the moves, minus the error of the base."""
        return self.errors[moves] - self.error

    def interaction(self, first: Move, second: Move) -> float:
        """What two changes do together beyond the sum of what they do alone (CLADO)."""
        alone = self.change(first) + self.change(second)
        return self.change(first, second) - alone if isfinite(alone) else 0.0

    @cached_property
    def pairs(self) -> list[tuple[Move, Move]]:
        """The measured changes of two bit-widths."""
        return [moves for moves in self.errors if len(moves) == 2]

    @cached_property
    def input_of(self) -> dict[str, str]:
        """Layer -> the first layer of its group, for layers that follow another in a group."""
        return {name: group[0] for group in self.ties for name in group[1:]}

    def predict(self, config: BitConfig) -> float:
        """Predicts an error: that of the base, plus each change, plus the known interactions."""
        made = {
            move
            for move in moves_between(self.base, config)
            if move.part == "weight" or move.layer not in self.input_of
        }
        together = [pair for pair in self.pairs if made.issuperset(pair)]
        changes = [self.change(move) for move in sorted(made)]
        return self.error + sum(changes) + sum(self.interaction(*pair) for pair in together)

    def smooth(self) -> "Sensitivity":
        """Returns a table in which the error falls with the rounding noise of each bit-width.

        A table that is smoothed already is returned as it is. Changes are slope x (4^-bits -
        4^-base bits): the power of rounding noise falls by four for each bit, and a small noise
        adds to the loss in proportion. The slope of each layer's weights and activations is fitted
        by least squares to their finite changes, and is at least LEAST_SLOPE of the median size of
        all slopes. On a small batch most changes are smaller than their noise; a solver would pick
        the luckiest ones. Interactions stay as measured.
        """
        if self.smoothed:
            return self
        fitted = {place: self._fit_slope(*place) for place, _ in _places(self.base)}
        slopes = {place: slope for place, slope in fitted.items() if slope is not None}
        # A single huge slope, of a layer that fails, would lift a mean above all others.
        least = LEAST_SLOPE * median(map(abs, slopes.values())) if slopes else 0.0

        def smooth_change(move: Move) -> float:
            slope = max(slopes.get((move.layer, move.part), 0.0), least)
            change = self.change(move)
            return slope * _added_noise(move) if isfinite(change) else change

        errors = {
            moves: self.error
            + sum(map(smooth_change, moves))
            + (self.interaction(*moves) if len(moves) == 2 else 0)
            for moves in self.errors
        }
        return replace(self, errors=errors, smoothed=True)

    def _fit_slope(self, layer: str, part: str) -> float | None:
        """Change of the error for each unit of rounding noise, by least squares, if known."""
        moves = [ms[0] for ms in self.errors if len(ms) == 1 and ms[0][:2] == (layer, part)]
        points = [(_added_noise(m), self.change(m)) for m in moves if isfinite(self.change(m))]
        power = sum(noise**2 for noise, _ in points)
        return sum(noise * change for noise, change in points) / power if points else None

    @cached_property
    def candidates(self) -> dict[str, Candidates]:
        """Layer name -> candidates that the table covers."""
        offered = {place: [bits] for place, bits in _places(self.base)}
        for moves in self.errors:
            if len(moves) == 1:
                offered[moves[0][:2]].append(moves[0].after)
        return {
            name: Candidates(*(tuple(sorted(offered[name, part])) for part in BIT_WIDTHS))
            for name in self.base
        }

    def check(self, supernet: Supernet) -> None:
        """Raises ValueError unless the table is complete, and of the network `supernet`.

        It must have the layers and candidates of the supernet, and tie all layers that it ties.
        Weights and step sizes must be those that it was measured with, if it knows them. Statistics
        of batch norms may differ.
        """
        check_config("base", self.base, supernet.candidates)
        for name, own in self.candidates.items():
            if own != supernet.candidates[name]:
                raise ValueError(
                    f"the sensitivity table has {own} of layer {name!r}, the supernet has "
                    f"{supernet.candidates[name]}: measure the table again"
                )
        for group in tied_inputs(supernet.table):
            if not any(set(group) <= set(own) for own in self.ties):
                raise ValueError(
                    f"the sensitivity table does not tie {list(group)}, the supernet does: measure "
                    "the table again"
                )
        if any(map(isnan, self.errors.values())):
            raise ValueError("the sensitivity table holds NaN: measure it again")
        if self.network and self.network != hash_tensors(network_tensors(supernet)):
            raise ValueError(
                "the sensitivity table was measured with other weights or step sizes than the "
                "supernet has: measure it again"
            )

    def to_frame(self) -> pd.DataFrame:
        """One row for each candidate of each bit-width, the base's included, then the pairs."""
        changed = {moves: error for moves, error in self.errors.items() if len(moves) == 1}
        rows = []
        for (name, part), now in _places(self.base):
            for bits in getattr(self.candidates[name], part):
                error = changed.get((Move(name, part, now, bits),), self.error)
                rows.append((name, part, now, bits, error))
        table = pd.DataFrame(rows, columns=_COLUMNS[:5])
        if self.pairs:
            pairs = [(*a[:4], *b[:4], self.errors[a, b]) for a, b in self.pairs]
            pairs = pd.DataFrame(pairs, columns=_COLUMNS[:4] + _OTHER + ["error"])
            table = pd.concat([table, pairs], ignore_index=True).astype(
                dict.fromkeys(_OTHER[2:], "Int64")
            )
        table["change"] = table["error"] - self.error
        table["base_error"] = self.error
        for name in _ABOUT:
            table[name] = getattr(self, name)
        follows = [self.input_of.get(n) for n in table["layer"]]
        is_act = table["part"] == "act"
        table["input_of"] = pd.Series(follows, index=table.index, dtype=object).where(is_act, None)
        return table[_COLUMNS + _ABOUT + (_OTHER if self.pairs else [])]

    @classmethod
    def from_frame(cls, table: pd.DataFrame) -> "Sensitivity":
        """Reads a table of `to_frame`. Raises ValueError if it is not one."""
        if missing := [name for name in _COLUMNS if name not in table]:
            raise ValueError(f"columns are missing: {missing}")
        if table.empty:
            raise ValueError("there is no row")
        _check_columns(table)
        _check_about(table)
        error = float(table["base_error"].iloc[0])
        paired = table["other_layer"].notna() if "other_layer" in table else table["layer"].isna()
        errors, base = {}, {}
        for row in table[~paired].itertuples(index=False):
            move = _read_move(row.layer, row.part, row.base_bits, row.bits)
            if base.setdefault(move[:2], move.before) != move.before or (move,) in errors:
                raise ValueError(f"rows of layer {move.layer!r}, {move.part}, contradict another")
            errors[(move,)] = row.error
        _check_pairs(table[paired])
        for row in table[paired].itertuples(index=False):
            first = _read_move(row.layer, row.part, row.base_bits, row.bits)
            numbers = row.other_base_bits, row.other_bits
            second = _read_move(row.other_layer, row.other_part, *numbers)
            if not {(first,), (second,)} <= errors.keys():
                raise ValueError(f"a pair has a change without a row of its own: {first}, {second}")
            if (first, second) in errors:
                raise ValueError(f"two rows have the pair {first}, {second}")
            errors[first, second] = row.error
        names = list(dict.fromkeys(table["layer"]))
        for place in product(names, BIT_WIDTHS):
            if errors.pop((Move(*place, base.get(place), base.get(place)),), None) is None:
                raise ValueError(f"a row is missing: {place} at the bits of the base")
        _check_all_pairs(errors)
        base = BitConfig.of({n: (base[n, "weight"], base[n, "act"]) for n in names})
        follows = table.loc[table["input_of"].notna(), ["layer", "input_of"]].drop_duplicates()
        groups: dict[str, list[str]] = {}
        for name, first in follows.itertuples(index=False):
            groups.setdefault(first, [first]).append(name)
        ties = check_ties([groups[first] for first in groups], base)
        first = table.iloc[0]
        about = {name: first[name] for name in _ABOUT if name in table and pd.notna(first[name])}
        return cls(base, error, errors, ties, **about)

    def save(self, path: str | Path) -> None:
        """Writes the table as a csv file, atomically."""
        table = self.to_frame()
        save_atomically(Path(path), lambda part: table.to_csv(part, index=False))

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Reads a file of `save`. Raises ValueError if it is damaged, or no such file."""
        try:
            # Python reads numbers exactly; pandas 2 is off by the last digit by default.
            exactly = dict.fromkeys(
                ("base_bits", "bits", "error", "change", "base_error"),
                lambda text: float(text or nan),
            )
            names = ("layer", "part", "input_of", "other_layer", "other_part", "network", "images")
            return cls.from_frame(
                pd.read_csv(path, converters=exactly, dtype=dict.fromkeys(names, str))
            )
        except (ValueError, EmptyDataError, ParserError) as error:
            raise ValueError(
                f"{path} is no sensitivity table ({error}): measure it again"
            ) from None


def _added_noise(move: Move) -> float:
    """Power of the rounding noise that a move adds, in squared units of the largest value."""
    return 4.0**-move.after - 4.0**-move.before


def _places(config: BitConfig) -> Iterator[tuple[tuple[str, str], int]]:
    """Yields layer and part, with the bits that they have in `config`."""
    for name, bits in config.items():
        for part, width in zip(BIT_WIDTHS, bits, strict=True):
            yield (name, part), width


def _read_move(layer: str, part: str, before: float, after: float) -> Move:
    """A move with whole numbers of bits, except of ternary weights."""
    before, after = (bits if bits == TERNARY else int(bits) for bits in (before, after))
    return Move(layer, part, before, after)


def _check_columns(table: pd.DataFrame) -> None:
    """Raises ValueError for an entry that no sensitivity table has."""
    for name in ("layer", "part"):
        if table[name].isna().any():
            raise ValueError(f"column {name!r} has empty entries")
    if wrong := set(table["part"]) - set(BIT_WIDTHS):
        raise ValueError(f"part is one of {BIT_WIDTHS}, not {sorted(map(str, wrong))[0]!r}")
    for name in ("base_bits", "bits"):
        bits = pd.to_numeric(table[name])
        if not ((bits % 1 == 0) | (bits == TERNARY)).all():
            raise ValueError(f"column {name!r} holds something else than whole numbers")
    for name in ("error", "change", "base_error"):
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise ValueError(f"column {name!r} holds something else than numbers")
    base = table["base_error"]
    if base.nunique() != 1 or not isfinite(base.iloc[0]):
        raise ValueError("column 'base_error' holds more than one value, or none that is finite")
    if not table["change"].equals(table["error"] - base):
        raise ValueError("column 'change' is not 'error' minus 'base_error'")
    at_base = table["bits"] == table["base_bits"]
    if not (table.loc[at_base, "error"] == base.iloc[0]).all():
        raise ValueError("the error of a row without a change is not 'base_error'")


def _check_about(table: pd.DataFrame) -> None:
    """Raises ValueError if a column about the whole table holds several values or wrong ones."""
    for name in _ABOUT:
        if name in table and table[name].nunique(dropna=False) != 1:
            raise ValueError(f"column {name!r} holds more than one value")
    if "smoothed" in table and table["smoothed"].dtype != bool:
        raise ValueError("column 'smoothed' holds something else than True or False")


def _check_pairs(table: pd.DataFrame) -> None:
    """Raises ValueError for an entry that no row of a pair has."""
    if missing := [name for name in _OTHER if len(table) and name not in table]:
        raise ValueError(f"columns are missing: {missing}")
    for name in _OTHER[2:] if len(table) else ():
        bits = pd.to_numeric(table[name])
        if not (bits % 1 == 0).all():
            raise ValueError(f"column {name!r} holds something else than whole numbers")


def _check_all_pairs(errors: Mapping[tuple[Move, ...], float]) -> None:
    """Raises ValueError if two places have some pairs of changes, but not all of them."""
    singles = Counter(moves[0][:2] for moves in errors if len(moves) == 1)
    pairs = Counter(tuple(m[:2] for m in moves) for moves in errors if len(moves) == 2)
    for (one, other), count in pairs.items():
        if count != singles[one] * singles[other]:
            raise ValueError(f"rows of pairs are missing: {one} and {other}")


def check_ties(ties: Ties, base: BitConfig) -> tuple[tuple[str, ...], ...]:
    """Checks groups of layers that share their activation bits; returns them as tuples.

    Raises ValueError for an unknown layer, a layer in two groups, and a `base` in which a group has
    different bits.
    """
    groups = tuple(tuple(group) for group in ties)
    names = [name for group in groups for name in group]
    if unknown := [name for name in names if name not in base]:
        raise ValueError(f"ties={ties!r} name no layer of this network: {unknown}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"ties={ties!r} are not allowed: {repeated} stand there more than once")
    for group in groups:
        if len({base[name].act for name in group}) > 1:
            bits = {name: base[name].act for name in group}
            raise ValueError(f"base is not allowed: tied layers have different bits: {bits}")
    return groups


def _moves_of(
    name: str, part: str, base: BitConfig, candidates: Mapping[str, Candidates]
) -> list[Move]:
    """All changes of one bit-width of one layer."""
    now, choices = getattr(base[name], part), getattr(candidates[name], part)
    return [Move(name, part, now, bits) for bits in choices if bits != now]


def _changes(
    base: BitConfig, candidates: Mapping[str, Candidates], pairs: str
) -> list[tuple[Move, ...]]:
    """The changes that `measure_sensitivity` measures: single moves first, then pairs."""
    moves = {
        (name, part): _moves_of(name, part, base, candidates)
        for name in base
        for part in BIT_WIDTHS
    }
    changes = [(move,) for own in moves.values() for move in own]
    if pairs != "none":
        changes += [p for name in base for p in product(*(moves[name, w] for w in BIT_WIDTHS))]
    if pairs == "neighbours":
        changes += [
            pair
            for first, second in pairwise(base)
            for part in BIT_WIDTHS
            for pair in product(moves[first, part], moves[second, part])
        ]
    return changes


class _Measurement:
    """Errors of a network after changes of a base: what measuring a table needs.

    `about`: what the table stores of the network and the images. Raises ValueError for ties that
    are not allowed, and if the error of the base is not finite.
    """

    def __init__(self, supernet: Supernet, error: Error, base: BitConfig, ties: Ties | None):
        self.base, self.candidates = base, supernet.candidates
        self.ties = check_ties(tied_inputs(supernet.table) if ties is None else ties, base)
        self.group_of = {name: group for group in self.ties for name in group}
        images = getattr(error, "images", None)  # an error of one's own need not name them
        self.about = {
            "network": hash_tensors(network_tensors(supernet)),
            "images": "" if images is None else hash_tensors([images]),
        }
        self.error = cache(without_nan(error))
        self.at_base = self.error(base)
        if self.at_base == inf:
            raise ValueError("the error of the base is NaN or infinite: check weights and images")

    def after(self, *moves: Move) -> float:
        """The error after the moves; a move of tied activations changes all of its group."""
        return self.error(apply_moves(self.base, [m for move in moves for m in self._expand(move)]))

    def _expand(self, move: Move) -> list[Move]:
        group = self.group_of.get(move.layer, [move.layer])
        return [move._replace(layer=n) for n in (group if move.part == "act" else [move.layer])]


def measure_sensitivity(
    supernet: Supernet,
    error: Error,
    base: BitConfig | None = None,
    *,
    pairs: str = "none",
    ties: Ties | None = None,
) -> Sensitivity:
    """Measures the error after every change of one bit-width of one layer.

    `error`: of a configuration, such as `batch_error`. `base`: the configuration to change; None is
    3 bits in every layer. `pairs`: changes of two bit-widths that are measured as well: "none",
    "layers" (weights and activations of one layer), or "neighbours" (also the weights, and the
    activations, of two layers that follow each other, as in CLADO, arXiv 2307.05657). `ties`:
    groups of layers that share their activation bits; None is those that the supernet ties.

    Starts at the last layer, so that few outputs change from one configuration to the next. Raises
    ValueError for a value that is not allowed, and if the error of the base is not finite.
    """
    if pairs not in PAIRS:
        raise ValueError(f"pairs={pairs!r} is not allowed: one of {PAIRS}")
    base = supernet.uniform(3) if base is None else base
    check_config("base", base, supernet.candidates)
    measurement = _Measurement(supernet, error, base, ties)
    changes, names = _changes(base, supernet.candidates, pairs), list(base)
    backwards = sorted(changes, key=lambda moves: -names.index(moves[0].layer))
    measured = {moves: measurement.after(*moves) for moves in backwards}
    errors = {moves: measured[moves] for moves in changes}
    return Sensitivity(base, measurement.at_base, errors, measurement.ties, **measurement.about)


def quick_table(supernet: Supernet, error: Error, ties: Ties | None = None) -> Sensitivity:
    """Measures the table that `front` uses: two changes of each bit-width from the largest bits.

    `error`, `ties`: as in `measure_sensitivity`. `fit_changes` says which changes are measured, and
    what the others are. This takes at most two passes for each layer's weights and activations,
    unless an error is infinite. Starts at the last layer. Raises ValueError if the error of the
    largest bits is not finite.
    """
    base = largest(supernet.candidates)
    measurement, measured = _Measurement(supernet, error, base, ties), {}
    for (name, part), _ in reversed(list(_places(base))):
        moves = {m.after: m for m in _moves_of(name, part, base, supernet.candidates)}

        def change(bits: int, moves: Mapping[int, Move] = moves) -> float:
            return measurement.after(moves[bits]) - measurement.at_base

        for bits, added in fit_changes(change, list(moves)).items():
            measured[(moves[bits],)] = measurement.at_base + added
    errors = {moves: measured[moves] for moves in _changes(base, supernet.candidates, "none")}
    return Sensitivity(
        base, measurement.at_base, errors, measurement.ties, True, **measurement.about
    )


def fit_changes(measure: Callable[[int], float], choices: Sequence[int]) -> dict[int, float]:
    """Changes of the error from the most bits to each of `choices`, all but two of them by a curve.

    `measure`: the change to some bits, measured. `choices`: fewer bits, ascending. It is measured
    at the fewest bits and at two bits more (or the nearest to that, of two the larger). Bits whose
    change is infinite are left out: theirs stays infinite, and the next ones are measured. Each bit
    divides the change by the same ratio r:

        change(b) = d r^(fewest - b)

    d is the change at the fewest bits, and r follows from both changes, within LEAST_RATIO and
    LARGEST_RATIO. Changes below LEAST_CHANGE count as that. If only one change is finite, it is
    returned as measured.
    """
    measured = {}

    def first_finite(order: Sequence[int]) -> int | None:
        for bits in order:
            measured[bits] = max(measure(bits), LEAST_CHANGE)
            if isfinite(measured[bits]):
                return bits
        return None

    few = first_finite(choices)
    rest = [bits for bits in choices if bits not in measured]
    more = first_finite(sorted(rest, key=lambda bits: (abs(bits - few - 2), -bits)))
    if more is None:
        return measured
    ratio = (measured[few] / measured[more]) ** (1 / (more - few))
    ratio = min(max(ratio, LEAST_RATIO), LARGEST_RATIO)
    return {
        bits: inf if measured.get(bits) == inf else measured[few] * ratio ** (few - bits)
        for bits in choices
    }
