"""Moves of a search: one bit-width of one layer goes to the next candidate below or above."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import isfinite
from typing import NamedTuple

from ..network.bits import BitConfig, Candidates
from .error import Error

BIT_WIDTHS = Candidates._fields  # the two bit-widths of a layer: "weight" and "act"


@dataclass(frozen=True)
class Step:
    """One configuration on the path of a search, with its error and its BitOPs per image."""

    config: BitConfig
    error: float
    bitops: int


class Move(NamedTuple):
    """Changes one bit-width of one layer. `part`: "weight" or "act".

    `tied`: other layers that share this bit-width, so that it changes there, too.
    """

    layer: str
    part: str
    before: int
    after: int
    tied: tuple[str, ...] = ()

    def apply(self, config: BitConfig) -> BitConfig:
        """Returns `config` with this bit-width changed."""
        for name in (self.layer, *self.tied):
            config = config.replace(name, config[name]._replace(**{self.part: self.after}))
        return config

    @property
    def reverse(self) -> "Move":
        """The move that undoes this one."""
        return self._replace(before=self.after, after=self.before)


def apply_moves(config: BitConfig, moves: Iterable[Move]) -> BitConfig:
    """Returns `config` with several bit-widths changed."""
    return reduce(lambda changed, move: move.apply(changed), moves, config)


def possible_moves(
    config: BitConfig,
    candidates: Mapping[str, Candidates],
    parts: Sequence[str] = BIT_WIDTHS,
    up: bool = True,
    ties: Iterable[Sequence[str]] = (),
) -> Iterator[Move]:
    """Yields every move from `config` to the next candidate below and, with `up`, above.

    `parts`: the bit-widths that may change. `ties`: groups of layers that share their activation
    bits; the first one's moves change all of them.
    """
    tied = {first: tuple(others) for first, *others in ties}
    following = {name for others in tied.values() for name in others}
    for name, bits in config.items():
        for part in parts:
            if part == "act" and name in following:
                continue
            others = tied.get(name, ()) if part == "act" else ()
            choices, now = getattr(candidates[name], part), getattr(bits, part)
            at = choices.index(now)
            if at > 0:
                yield Move(name, part, now, choices[at - 1], others)
            if up and at + 1 < len(choices):
                yield Move(name, part, now, choices[at + 1], others)


def count_moves(candidates: Mapping[str, Candidates]) -> int:
    """Returns how many moves lead from the smallest bits to the largest."""
    return sum(len(choices) - 1 for pair in candidates.values() for choices in pair)


@dataclass
class Errors:
    """Errors after each move from the present step: measured, or estimated from earlier steps.

    An estimate assumes that a move changes the error as it did when it was last measured. An
    infinite error gives no estimate, so its move is measured again at each step.
    """

    error: Error
    now: Step
    changes: dict[Move, float] = field(default_factory=dict)  # error after a move minus before
    measured: dict[Move, float] = field(default_factory=dict)  # errors at the present step

    def measure(self, moves: Iterable[Move]) -> None:
        """Measures the error after each of `moves`."""
        for move in moves:
            self.measured[move] = self.error(move.apply(self.now.config))
            self.changes[move] = self.measured[move] - self.now.error

    def measure_unknown(self, moves: Iterable[Move], exact: bool) -> None:
        """Measures those of `moves` that have no estimate or, with `exact`, no measured error."""

        def is_known(move: Move) -> bool:
            estimated = not exact and isfinite(self.changes.get(move, float("inf")))
            return move in self.measured or estimated

        self.measure(move for move in moves if not is_known(move))

    def __getitem__(self, move: Move) -> float:
        return self.measured.get(move, self.now.error + self.changes[move])

    def advance(self, step: Step, *moves: Move) -> Step:
        """Makes `step`, reached by `moves`, the present step; returns it.

        The reverse of each move is assumed to undo its change.
        """
        self.changes |= {move.reverse: -self.changes[move] for move in moves}
        self.now, self.measured = step, {}
        return step
