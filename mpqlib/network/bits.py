"""Bit-widths: of one layer, its candidates, and of a whole network."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class Bits(NamedTuple):
    """Bit-widths of one layer: of its weights and of the activations it reads."""

    weight: int
    act: int


class Candidates(NamedTuple):
    """Candidate bit-widths of one layer, ascending: for its weights and for its activations."""

    weight: tuple[int, ...]
    act: tuple[int, ...]


@dataclass(frozen=True)
class BitConfig(Mapping):
    """One bit-width per layer for weights and activations: immutable, hashable, a mapping.

    `layers`: pairs of layer name and Bits, in the network's order.
    """

    layers: tuple[tuple[str, Bits], ...]

    @classmethod
    def of(cls, bits: Mapping[str, tuple[int, int]]) -> "BitConfig":
        """From a mapping of layer name to (weight bits, activation bits)."""
        return cls(tuple((name, Bits(*pair)) for name, pair in bits.items()))

    @classmethod
    def from_json(cls, text: str) -> "BitConfig":
        """From what `to_json` wrote; raises ValueError where it is not name -> [int, int]."""
        if not isinstance(bits := json.loads(text), dict):
            raise ValueError(f"a configuration is name -> [int, int], not {bits!r}")
        for name, pair in bits.items():
            if not (isinstance(pair, list) and [type(b) for b in pair] == [int, int]):
                raise ValueError(f"bits of layer {name!r} are {pair!r}: two whole numbers expected")
        return cls.of(bits)

    def to_json(self) -> str:
        """As JSON: layer name -> [weight bits, activation bits]."""
        return json.dumps(dict(self.layers))

    def replace(self, layer: str, bits: Bits) -> "BitConfig":
        """A copy in which `layer`, one of this configuration's, has other bits."""
        if layer not in self:
            raise ValueError(f"layer={layer!r} is not in this configuration: one of {list(self)}")
        return BitConfig(tuple((n, bits if n == layer else b) for n, b in self.layers))

    def __getitem__(self, layer: str) -> Bits:
        return self._bits[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def _bits(self) -> dict[str, Bits]:
        return dict(self.layers)


def largest(candidates: Mapping[str, Candidates]) -> BitConfig:
    """Every layer at its largest candidate bits."""
    return BitConfig.of({name: (max(c.weight), max(c.act)) for name, c in candidates.items()})


def smallest(candidates: Mapping[str, Candidates]) -> BitConfig:
    """Every layer at its smallest candidate bits."""
    return BitConfig.of({name: (min(c.weight), min(c.act)) for name, c in candidates.items()})


def sample(candidates: Mapping[str, Candidates], generator: torch.Generator) -> BitConfig:
    """Bits drawn per layer uniformly from its candidates (RFQuant, one-shot training)."""

    def draw(offered: tuple[int, ...]) -> int:
        return offered[int(torch.randint(len(offered), (), generator=generator))]

    return BitConfig.of({name: (draw(c.weight), draw(c.act)) for name, c in candidates.items()})
