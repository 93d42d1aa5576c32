"""A policy: the bits of every layer, and all that says what they refer to."""

from collections.abc import Mapping

from ..network.bits import BitConfig
from ..network.cost import COST_MODEL, bitops
from ..network.supernet import Supernet


def describe_policy(supernet: Supernet, config: BitConfig, sha256: str, about: Mapping) -> dict:
    """What policy.json holds: bits per layer, and all that says what they refer to."""
    return {
        **about,
        "cost_model": COST_MODEL,
        "first": {name: "float input, counted at its bits below" for name in supernet.first},
        "last": supernet.last,
        "checkpoint_sha256": sha256,
        "bitops_g": bitops(supernet.table, config) / 1e9,
        "layers": {name: list(bits) for name, bits in config.items()},
    }
