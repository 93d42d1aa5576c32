"""BitOPs and model size: pure functions of a layer table and a bit configuration."""

from collections.abc import Mapping, Sequence

from .bits import Bits
from .supernet import LayerInfo

# Stored in every policy, because a policy's figures depend on the cost model.
COST_MODEL = "1: BitOPs = MACs x weight bits x activation bits; size = weights x weight bits"


def layer_bitops(info: LayerInfo, bits: Bits) -> int:
    """BitOPs of one layer per image: MACs x weight bits x activation bits (RFQuant)."""
    return info.macs * bits.weight * bits.act


def bitops(table: Sequence[LayerInfo], config: Mapping[str, Bits]) -> int:
    """BitOPs per image of a configuration; divide by 1e9 for the paper's G.

    Counts the layers of the table alone, not a supernet's `float_parts`.
    """
    return sum(layer_bitops(info, config[info.name]) for info in table)


def bitops_at(table: Sequence[LayerInfo], bits: float) -> float:
    """BitOPs per image if every searchable layer used `bits`, a real number.

    A budget can so lie between two uniform configurations: 2.5 costs 2.5 x 2.5 per MAC, between 4
    at 2 bits and 9 at 3 bits.
    """

    def level(choices: tuple[int, ...]) -> float:
        return bits if len(choices) > 1 else choices[0]

    return bitops(table, {i.name: Bits(*map(level, i.candidates)) for i in table})


def model_size(table: Sequence[LayerInfo], config: Mapping[str, Bits]) -> float:
    """Size in bytes of the weights of the table's layers.

    Layers that share their weights count once for each weight bit-width that they use. A supernet's
    `float_parts`, biases and batch norms are not counted.
    """
    stored = {(i.tied_to or i.name, config[i.name].weight): i.weights for i in table}
    return sum(weights * bits for (_, bits), weights in stored.items()) / 8


def check_budget(budget: float, lowest: float, highest: float) -> str | None:
    """Checks that a budget of BitOPs can be met; returns a remark if it limits nothing.

    `lowest`, `highest`: BitOPs of the smallest and of the largest configuration. Raises ValueError,
    with the allowed range, for a budget below `lowest`.
    """
    if not budget >= lowest:  # all digits, because a budget can miss by the last one
        raise ValueError(
            f"bitops={budget / 1e9:.12g} G cannot be met: allowed are {lowest / 1e9:.12g} G"
            f" (every layer at its smallest bits) to {highest / 1e9:.12g} G (largest bits)"
        )
    if budget >= highest:
        return (
            f"bitops={budget / 1e9:g} G limits nothing: the largest bits need {highest / 1e9:.3f} G"
        )
    return None
