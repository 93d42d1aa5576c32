"""Limits that a searched configuration must keep: BitOPs per image and bytes of weights."""

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real

from ..network.bits import BitConfig, check_config, smallest
from ..network.cost import bitops, model_size
from ..network.supernet import LayerInfo, Supernet


def used_share(
    table: Sequence[LayerInfo], config: BitConfig, budget: float = inf, size: float = inf
) -> float:
    """Returns the larger of two shares: of `budget` BitOPs and of `size` bytes that `config` uses.

    The configuration keeps both limits if the share is at most 1.
    """
    return max(bitops(table, config) / budget, model_size(table, config) / size)


def check_count(name: str, value: int, least: int, most: float = inf) -> None:
    """Raises ValueError unless `value`, the parameter `name`, is a whole number in these limits."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value <= most:
        allowed = f", at least {least}" if most == inf else f" from {least} to {most}"
        raise ValueError(f"{name}={value!r} is not allowed: a whole number{allowed}")


def check_choices(**options: bool) -> None:
    """Raises ValueError for an option that is neither True nor False."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not allowed: True or False")


def describe_costs(budget: float, size: float) -> str:
    """Writes BitOPs and bytes as a reader expects them, such as "3 G BitOPs, 1.5 MB"."""
    return f"{budget / 1e9:.4g} G BitOPs, {size / 1e6:.4g} MB"


def check_limits(supernet: Supernet, budget: float = inf, size: float = inf) -> None:
    """Checks that the smallest configuration keeps both limits.

    `budget`: BitOPs per image. `size`: bytes. Raises ValueError if a limit is not a number or lies
    below the smallest configuration.
    """
    config = smallest(supernet.candidates)
    lowest = {
        "budget": (budget, bitops(supernet.table, config), 1e9, "G BitOPs per image"),
        "size": (size, model_size(supernet.table, config), 1e6, "MB"),
    }
    for name, (value, least, scale, unit) in lowest.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not allowed: a number, at least {least!r}")
        if not value >= least:  # NaN is not
            # All digits: a limit can lie below by less than a rounded number shows.
            raise ValueError(
                f"{name}={value!s} ({value / scale:.4g} {unit}) is not allowed: at least {least!s}"
                f" ({least / scale:.4g} {unit}), which the smallest bits need"
            )


def check_start(supernet: Supernet, start: BitConfig, budget: float, size: float) -> None:
    """Checks the configuration from which a search goes down.

    Raises ValueError if `start` does not fit the supernet's candidates, or if it keeps both limits
    already.
    """
    check_config("start", start, supernet.candidates)
    if used_share(supernet.table, start, budget, size) <= 1:
        costs = bitops(supernet.table, start), model_size(supernet.table, start)
        raise ValueError(
            f"start needs {describe_costs(*costs)}, which is within the limits"
            f" ({describe_costs(budget, size)}) already: start from larger bits"
        )
