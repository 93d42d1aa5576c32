"""Moves of a search: one bit-width of one layer, one candidate down or up, and what each costs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

from ..network.bits import BitConfig, Candidates
from .error import Error

PARTS = ("weight", "act")  # a layer's two bit-widths


@dataclass(frozen=True)
class Step:
    """One configuration on a search's path, its error and its BitOPs."""

    config: BitConfig
    error: float
    bitops: int


class Move(NamedTuple):
    """A change of one of a layer's bit-widths, `part`: "weight" or "act"."""

    layer: str
    part: str
    before: int
    after: int

    def of(self, config: BitConfig) -> BitConfig:
        """The configuration that it leads to from `config`."""
        return config.replace(self.layer, config[self.layer]._replace(**{self.part: self.after}))

    @property
    def back(self) -> "Move":
        """The move that undoes it."""
        return self._replace(before=self.after, after=self.before)


def after(config: BitConfig, taken: Iterable[Move]) -> BitConfig:
    """The configuration that several moves lead to from `config`."""
    return reduce(lambda c, move: move.of(c), taken, config)


def moves(
    config: BitConfig,
    candidates: Mapping[str, Candidates],
    parts: Sequence[str] = PARTS,
    up: bool = True,
) -> Iterator[Move]:
    """Every move one candidate down or, with `up`, up from `config` in one bit-width of one layer.

    `parts`: which bit-widths may move.
    """
    for name, bits in config.items():
        for part in parts:
            offered, now = getattr(candidates[name], part), getattr(bits, part)
            at = offered.index(now)
            for to in (at - 1, at + 1)[: 1 + up]:
                if 0 <= to < len(offered):
                    yield Move(name, part, now, offered[to])


@dataclass
class Errors:
    """What is known of the errors after each move, much of it measured at earlier steps.

    A move is taken to change the error by as much as it did when it was last measured.
    """

    error: Error
    now: Step
    changes: dict[Move, float] = field(default_factory=dict)  # error after a move less before
    fresh: dict[Move, float] = field(default_factory=dict)  # errors measured at the present step

    def measure(self, moves: Iterable[Move]) -> None:
        """Measures the error after each move at the present step."""
        for move in moves:
            self.fresh[move] = self.error(move.of(self.now.config))
            self.changes[move] = self.fresh[move] - self.now.error

    def prepare(self, moves: Iterable[Move], exact: bool) -> None:
        """Measures the moves never seen or, with `exact`, all of them."""
        self.measure(m for m in moves if exact or m not in self.changes)

    def __getitem__(self, move: Move) -> float:
        return self.fresh.get(move, self.now.error + self.changes[move])

    def advance(self, step: Step, *taken: Move) -> Step:
        """Goes on from `step`, to which the moves `taken` led; a way back undoes its change."""
        self.changes |= {move.back: -self.changes[move] for move in taken}
        self.now, self.fresh = step, {}
        return step
