"""A network that is nothing but a layer table, and errors made up for it, to search quickly."""

import itertools
import random

from hypothesis import strategies as st

from mpqlib.network.bits import BitConfig, Candidates
from mpqlib.network.supernet import LayerInfo


class Stand:
    """What the search reads of a supernet: a layer table and the candidates."""

    def __init__(self, macs, offered):
        candidates = [Candidates(*offer) for offer in offered]
        rows = zip(macs, candidates, strict=True)
        self.table = [LayerInfo(f"l{i}", m, m, False, c) for i, (m, c) in enumerate(rows)]
        self.candidates = {info.name: info.candidates for info in self.table}

    def parameters(self):
        """It has no weights."""
        return ()

    modules = parameters

    def uniform(self, bits):
        """Every layer at `bits`, or at its nearest candidate."""
        return BitConfig.of(
            {
                name: [min(choices, key=lambda b: (abs(b - bits), b)) for choices in pair]
                for name, pair in self.candidates.items()
            }
        )

    def every(self):
        """All configurations."""
        choices = [itertools.product(*info.candidates) for info in self.table]
        names = [info.name for info in self.table]
        return [
            BitConfig.of(dict(zip(names, bits, strict=True)))
            for bits in itertools.product(*choices)
        ]

    def neighbours(self, config):
        """All configurations one candidate up or down from `config` in one place."""
        for other in self.every():
            apart = [(n, k) for n in config for k in (0, 1) if other[n][k] != config[n][k]]
            if len(apart) == 1:
                name, kind = apart[0]
                offered = self.candidates[name][kind]
                steps = offered.index(other[name][kind]) - offered.index(config[name][kind])
                if abs(steps) == 1:
                    yield other


def made_up_error(seed):
    """An error that falls with bits, layer by layer at random rates, with some interaction."""
    rng = random.Random(seed)
    rates = [(rng.uniform(0.1, 3), rng.uniform(0.1, 3)) for _ in range(9)]

    def error(config):
        layers = [
            a * 2.0**-w + b * 2.0**-v
            for (w, v), (a, b) in zip(config.values(), rates[: len(config)], strict=True)
        ]
        return sum(layers) + 0.3 * max(layers)

    return error


OFFERS = [((2, 3, 4, 5, 6),) * 2, ((3, 4, 5, 6),) * 2, ((2, 4), (3, 6)), ((8,), (8,))]
SMALL = st.tuples(st.integers(1, 50), st.sampled_from([((2, 3, 4),) * 2, ((2, 4), (3, 6))]))
SMALL_STANDS = st.lists(SMALL, min_size=1, max_size=2)
STANDS = st.lists(st.tuples(st.integers(1, 50), st.sampled_from(OFFERS)), min_size=2, max_size=5)
