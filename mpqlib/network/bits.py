"""Bit-widths of one layer, its candidates, and the bit-widths of a whole network."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import NamedTuple

import torch

from .quantizer import BINARY, FEW_VALUES, TERNARY

SMALLEST, LARGEST = 2, 16  # bit-widths of integers that a quantizer supports


class Bits(NamedTuple):
    """Bit-widths of one layer: of its weights and of the activations it reads."""

    weight: float  # whole, or TERNARY
    act: int


class Candidates(NamedTuple):
    """Candidate bit-widths of one layer, ascending: for its weights and for its activations."""

    weight: tuple[float, ...]
    act: tuple[int, ...]


def check_bits(name: str, bits: Iterable[int]) -> tuple[int, ...]:
    """Checks candidate bit-widths; returns them ascending and without repeats.

    `name`: the parameter that error messages name. Raises ValueError unless `bits` holds one or
    more whole numbers from 2 to 16.
    """
    if isinstance(bits, str):
        raise ValueError(
            f"{name}={bits!r} is a string: pass whole numbers, such as {name}=(2, 4). With "
            f'papermill use `-y "{name}: [2, 4]"` or a YAML file (`-f`): `-p` passes strings'
        )

    def is_width(b: object) -> bool:
        whole = isinstance(b, Integral) and not isinstance(b, bool)
        return whole and SMALLEST <= b <= LARGEST

    widths = list(bits) if isinstance(bits, Iterable) else []
    if not widths or not all(map(is_width, widths)):
        raise ValueError(
            f"{name}={bits!r} is not allowed: one or more whole numbers from {SMALLEST} to "
            f"{LARGEST}, such as (2, 4)"
        )
    return tuple(sorted({int(b) for b in widths}))


def check_weight_bits(name: str, bits: Iterable[float]) -> tuple[float, ...]:
    """Checks candidate bit-widths of weights, as `check_bits` does.

    Weights can have two values, BINARY, or three, TERNARY, too. They share no grid with others, so
    these must be the only candidate.
    """
    alone = list(bits) if isinstance(bits, Iterable) and not isinstance(bits, str) else []
    one = alone[0] if len(alone) == 1 else None
    if one == TERNARY:
        return (TERNARY,)
    if one == BINARY and isinstance(one, Integral) and not isinstance(one, bool):
        return (BINARY,)
    try:
        return check_bits(name, bits)
    except ValueError as error:
        raise ValueError(f"{error}; or one of {list(FEW_VALUES)} alone") from None


def check_overrides(overrides: Mapping[str, Candidates]) -> dict[str, Candidates]:
    """Checks candidates of layers by name; returns them with ascending bits.

    Raises ValueError unless each layer has two groups of bits, of weights and of activations.
    """
    if not isinstance(overrides, Mapping):
        raise ValueError(f"overrides={overrides!r} is not allowed: a dict of layer -> Candidates")
    checked = {}
    for name, pair in overrides.items():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(
                f"overrides[{name!r}]={pair!r} is not allowed: bits of weights and bits of "
                "activations, such as ((2, 4), (2, 4))"
            )
        weight, act = pair
        where = f"overrides[{name!r}]"
        checked[name] = Candidates(check_weight_bits(where, weight), check_bits(where, act))
    return checked


def _refuse_repeats(names: list[str]) -> None:
    if repeated := [name for name in set(names) if names.count(name) > 1]:
        raise ValueError(f"{sorted(repeated)} stand there more than once")


@dataclass(frozen=True)
class BitConfig(Mapping):
    """The bit-widths of every layer: an immutable, hashable mapping of layer name to Bits.

    `layers`: pairs of layer name and Bits, in the network's order. Raises ValueError if a name
    stands there twice.
    """

    layers: tuple[tuple[str, Bits], ...]

    def __post_init__(self):
        if len(self._bits) != len(self.layers):
            _refuse_repeats([name for name, _ in self.layers])

    @classmethod
    def of(cls, bits: Mapping[str, tuple[int, int]]) -> "BitConfig":
        """Builds it from a mapping of layer name to (weight bits, activation bits)."""
        return cls(tuple((name, Bits(*pair)) for name, pair in bits.items()))

    @classmethod
    def from_json(cls, text: str) -> "BitConfig":
        """Reads the text that `to_json` returns, or the text of a policy.json.

        In a policy.json the bits stand under "layers". Raises ValueError unless every layer has
        two whole numbers or ternary weights, and if a key stands there twice.
        """

        def unique(pairs: list[tuple[str, object]]) -> dict:
            _refuse_repeats([key for key, _ in pairs])
            return dict(pairs)

        bits = json.loads(text, object_pairs_hook=unique)
        if isinstance(bits, dict) and isinstance(bits.get("layers"), dict):
            bits = bits["layers"]
        if not isinstance(bits, dict):
            raise ValueError(f"a configuration is name -> [int, int], not {bits!r}")
        for name, pair in bits.items():
            whole = isinstance(pair, list) and [type(b) for b in pair] == [int, int]
            ternary = isinstance(pair, list) and len(pair) == 2 and pair[0] == TERNARY
            if not (whole or (ternary and type(pair[1]) is int)):
                raise ValueError(f"bits of layer {name!r} are {pair!r}: two whole numbers expected")
        return cls.of(bits)

    def to_json(self) -> str:
        """Returns it as JSON: layer name -> [weight bits, activation bits]."""
        return json.dumps(dict(self.layers))

    def replace(self, layer: str, bits: tuple[int, int]) -> "BitConfig":
        """Returns a copy in which `layer` has other (weight bits, activation bits).

        Raises ValueError if this configuration has no such layer.
        """
        if layer not in self:
            raise ValueError(f"layer={layer!r} is not in this configuration: one of {list(self)}")
        bits = Bits(*bits)
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


def check_config(name: str, config: BitConfig, candidates: Mapping[str, Candidates]) -> None:
    """Checks that `config` has exactly the layers of `candidates`, each at candidate bits.

    `name`: the parameter that error messages name. Raises ValueError otherwise.
    """
    if not isinstance(config, BitConfig):
        raise ValueError(f"{name}={config!r} is not a BitConfig: build one with BitConfig.of")
    if wrong := config.keys() ^ candidates.keys():
        raise ValueError(f"{name}: layers unknown to this supernet, or missing: {sorted(wrong)}")
    for layer, bits in config.layers:
        allowed = candidates[layer]
        # 4.0 is equal to 4, but it names no batch norm.
        fits = isinstance(bits, Bits) and bits.weight in allowed.weight and bits.act in allowed.act
        fits = fits and (isinstance(bits.weight, Integral) or bits.weight == TERNARY)
        fits = fits and not isinstance(bits.weight, bool)
        if not fits or not isinstance(bits.act, Integral):
            raise ValueError(
                f"{name}[{layer!r}]={bits!r} is not allowed: Bits(weight, act) with weight in "
                f"{allowed.weight} and act in {allowed.act}"
            )


def largest(candidates: Mapping[str, Candidates]) -> BitConfig:
    """Every layer at its largest candidate bits."""
    return BitConfig.of({name: (max(c.weight), max(c.act)) for name, c in candidates.items()})


def smallest(candidates: Mapping[str, Candidates]) -> BitConfig:
    """Every layer at its smallest candidate bits."""
    return BitConfig.of({name: (min(c.weight), min(c.act)) for name, c in candidates.items()})


def sample(candidates: Mapping[str, Candidates], generator: torch.Generator) -> BitConfig:
    """Draws the bits of every layer uniformly from its candidates (RFQuant, arXiv 2401.01543)."""

    def draw(choices: tuple[int, ...]) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    return BitConfig.of({name: (draw(c.weight), draw(c.act)) for name, c in candidates.items()})
