"""RFQuant's training rules, read word by word: slow twins of the library's, in numpy.

Every function is written from the method's description alone and uses nothing of the library. The
recorded values in tests/data/release-oracle.npz, which the authors' own functions returned, check
the twins; the twins check the library.
"""

import math

import numpy as np


def half_cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(epoch: int, epochs: int = 150, peak: float = 0.04, warmup: int = 5) -> float:
    """Of weights and norms: a linear warm-up, then a cosine that the warm-up does not shift."""
    lowest = 1e-5
    if epoch < warmup:
        return lowest + (peak - lowest) * epoch / warmup
    return half_cosine(peak, lowest, epoch / epochs)


def step_learning_rate(epoch: int, epochs: int = 150, peak: float = 1e-5) -> float:
    """Of the quantizers' step sizes: the same cosine, without a warm-up, to zero."""
    return half_cosine(peak, 0, epoch / epochs)


def grid_term_weight(update: int, per_epoch: int, epochs: int = 150, start: int = 40) -> float:
    """Weight of the grid term: zero through epoch `start`, then a cosine from 0 to 0.1."""
    epoch = update // per_epoch
    if epoch <= start:
        return 0.0
    return half_cosine(0, 0.1, (update - start * per_epoch) / ((epochs - start) * per_epoch))


def decision_epochs(epochs: int = 150) -> list[int]:
    """Epochs, counted from 0, before which the scheduler decides what to freeze."""
    early = [e for e in range(7, epochs) if e % 2 == 1 and e < 0.72 * epochs]
    late = [e for e in range(8, epochs) if (e + 1) % 15 == 0 and e >= 0.72 * epochs]
    return early + late


def freeze_share(epoch: int, epochs: int = 150) -> float:
    """Share of the layers that lose their smallest bit-width at a decision before `epoch`."""
    decisions = (epoch - 5) // 2
    return half_cosine(0.5, 0.2, decisions / (epochs / 2))


def grid_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed grid."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def initial_step(weight: np.ndarray, bits: int) -> float:
    """A layer's initial weight step: its grid reaches the farther end of mean -+ 3 deviations."""
    mean, deviation = weight.mean(), weight.std(ddof=1)
    return max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 2 ** (bits - 1)


def turbulence(weight: np.ndarray, steps: dict[int, float], candidates: list[int]) -> float:
    """Share of weights next to a rounding bound, over bits, averaged over present candidates."""
    values = []
    for bits in candidates:
        low, high = grid_range(bits)
        near = 0
        for v in (weight / steps[bits]).ravel():
            if low < v < high:
                near += abs(v - round(v)) > 3 / 8
        values.append(near / weight.size / bits)
    return sum(values) / len(values)


def freeze(full: list[list[int]], values: list[float], share: float) -> list[list[int]]:
    """Candidates after a decision: the most turbulent layers lose their smallest bit-width."""
    most = sorted(range(len(full)), key=lambda i: -values[i])[: int(share * len(full))]
    return [bits[1:] if i in most else bits for i, bits in enumerate(full)]


def grid_term(
    weight: np.ndarray, step: float, bits: int, smallest: int
) -> tuple[float, np.ndarray]:
    """A layer's grid term and its gradient.

    A weight counts if the integer that it rounds to lies on the smallest candidate's grid as well,
    which in nested grids is every 2^(bits - smallest)-th one, and if it is not clipped.
    """
    low, high = grid_range(bits)
    squares, gradient = np.zeros_like(weight), np.zeros_like(weight)
    rest = weight[0].size
    for place in np.ndindex(*weight.shape):
        v = weight[place] / step
        if not low < v < high or round(v) % 2 ** (bits - smallest):
            continue
        distance = weight[place] - round(v) * step
        squares[place] = distance**2
        gradient[place] = 2 * distance / rest
    return float(squares.sum(axis=0).mean()), gradient


def decision_before(step: int, steps: int, parts: int = 150) -> int | None:
    """The last decision's part among those that begin at `step` of a shorter training, or None."""
    decisions = decision_epochs(parts)
    begin = [p for p in decisions if math.ceil(p * steps / parts) == step]
    return begin[-1] if begin else None


def decayed_gradient(
    gradient: np.ndarray, weight: np.ndarray, step: float | None, passes: int, decay: float
) -> np.ndarray:
    """Region decay: `step` is the layer's 2-bit step, `passes` its number of passes at 2 bits."""
    found = gradient.copy()
    for place in np.ndindex(*weight.shape):
        w = weight[place]
        inside = passes > 0 and -2 < w / step < 1
        found[place] += decay * w * (1 - passes) if inside else decay * w
    return found


class Momentum:
    """SGD with Nesterov momentum for one parameter."""

    def __init__(self, momentum: float = 0.9):
        self.momentum, self.buffer = momentum, 0.0

    def move(self, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
        self.buffer = self.momentum * self.buffer + gradient
        return value - rate * (gradient + self.momentum * self.buffer)


class Adam:
    """Adam for one parameter (arXiv 1412.6980, algorithm 1)."""

    def __init__(self):
        self.first, self.second, self.count = 0.0, 0.0, 0

    def move(self, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean = self.first / (1 - 0.9**self.count)
        square = self.second / (1 - 0.999**self.count)
        return value - rate * mean / (np.sqrt(square) + 1e-8)
