"""BitOPs and model size: pure functions of a layer table and a bit configuration."""

from collections.abc import Mapping, Sequence

from .bits import Bits
from .supernet import LayerInfo

# Written into every policy: a policy's figures hold only under the cost model that gave them.
COST_MODEL = "1: BitOPs = MACs x weight bits x activation bits; size = weights x weight bits"


def layer_bitops(info: LayerInfo, bits: Bits) -> int:
    """BitOPs of one layer per image: MACs x weight bits x activation bits (RFQuant)."""
    return info.macs * bits.weight * bits.act


def bitops(table: Sequence[LayerInfo], config: Mapping[str, Bits]) -> int:
    """BitOPs per image of a whole configuration; divide by 1e9 for the paper's G."""
    return sum(layer_bitops(info, config[info.name]) for info in table)


def bitops_at(table: Sequence[LayerInfo], bits: float) -> float:
    """BitOPs per image were every layer with a choice at `bits`, a real number: a budget's level.

    2.5 lies between the uniform 2-bit and 3-bit configurations as 2.5 x 2.5 does between 4 and 9.
    """

    def level(offered: tuple[int, ...]) -> float:
        return bits if len(offered) > 1 else offered[0]

    return bitops(table, {i.name: Bits(*map(level, i.candidates)) for i in table})


def model_size(table: Sequence[LayerInfo], config: Mapping[str, Bits]) -> float:
    """Size in bytes of the weights of convolutions and linear layers."""
    return sum(info.weights * config[info.name].weight for info in table) / 8


def check_budget(budget: float, lowest: float, highest: float) -> str | None:
    """Checks that a budget of BitOPs can be met; returns a remark if it limits nothing.

    `lowest`, `highest`: BitOPs of the smallest and of the largest configuration. Raises ValueError,
    with the allowed range, for a budget below `lowest`.
    """
    if not budget >= lowest:
        raise ValueError(
            f"bitops={budget / 1e9:g} G cannot be met: allowed are {lowest / 1e9:.3f} G"
            f" (every layer at its smallest bits) to {highest / 1e9:.3f} G (largest bits)"
        )
    if budget >= highest:
        return (
            f"bitops={budget / 1e9:g} G limits nothing: the largest bits need {highest / 1e9:.3f} G"
        )
    return None
