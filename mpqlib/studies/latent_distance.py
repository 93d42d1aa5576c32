"""Latent weights against their grid points while a supernet trains (RFQuant, Fig. 2)."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..network.layers import QuantLinear
from ..network.quantizer import integer_range
from ..network.supernet import Supernet
from ..report.plots import COLOURS
from ..training.loop import Run


def pointwise(supernet: Supernet) -> list[str]:
    """Names of the point-wise convolutions (1x1, in one group) that choose their bits."""
    ops = {name: supernet.layers[name].op for name in supernet.searchable}
    convs = {name: op for name, op in ops.items() if isinstance(op, nn.Conv2d)}
    return [name for name, op in convs.items() if op.kernel_size == (1, 1) and op.groups == 1]


def grid_points(layer: QuantLinear, bits: int) -> Tensor:
    """The integers round(clip(w / s)) that a layer's latent weights have at `bits`, int8."""
    v = layer.op.weight.detach() / layer.weight_quantizer.step(bits).detach()
    return v.clamp_(*integer_range(bits, signed=True)).round_().to(torch.int8)


class LatentProbe:
    """Watches latent weights: `train(..., watch=probe)` adds a row per step, layer and bit-width.

    `names`: layers; `bits`: bit-widths, 8 at most. A row's `distance` is ||w - w_hat|| / ||w||, and
    its `flips` the share of weights whose integer is not what it was after the previous step.
    """

    def __init__(self, names: Iterable[str], bits: Iterable[int]):
        self.names, self.bits = list(names), list(bits)
        self.rows: list[dict] = []
        self._last: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def __call__(self, run: Run) -> None:
        layers, taken = run.model.layers, len(self.rows) // (len(self.names) * len(self.bits))
        for name in self.names:
            weight, norm = layers[name].op.weight, layers[name].op.weight.norm()
            for bits in self.bits:
                points = grid_points(layers[name], bits)
                step = layers[name].weight_quantizer.step(bits)
                row = {"step": taken, "layer": name, "bits": bits}
                row["distance"] = float((weight - points * step).norm() / norm)
                before = self._last.get((name, bits), points)
                row["flips"] = float((points != before).float().mean())
                self._last[name, bits] = points
                self.rows.append(row)


def roughness(values: Sequence[float]) -> float:
    """Standard deviation about the straight line through `values`: a drift is no oscillation."""
    x = np.arange(len(values))
    return float(np.std(values - np.polyval(np.polyfit(x, values, 1), x)))


def late_half(series: pd.DataFrame) -> pd.DataFrame:
    """Per layer and bit-width, over the last half of the steps of a LatentProbe's rows.

    `distance` and `flips` are means, `spread` is the roughness of the distance.
    """
    late = series[series["step"] > series["step"].max() / 2].sort_values("step")
    by = late.groupby(["layer", "bits"], sort=False)
    columns = dict(distance=("distance", "mean"), spread=("distance", roughness))
    return by.agg(**columns, flips=("flips", "mean")).reset_index()


def over_steps(series: pd.DataFrame, value: str, label: str) -> Figure:
    """Column `value` of a LatentProbe's rows over training, a panel per layer, arms by line."""
    style = dict(x="step", y=value, hue="bits", palette=COLOURS, style="arm", errorbar=("ci", 95))
    panels = dict(col="layer", kind="line", height=3.4, aspect=1.25)
    grid = sns.relplot(series, seed=0, **style, **panels)
    grid.set(xlabel="training step", ylabel=label, ylim=(0, None)).set_titles("{col_name}")
    return grid.figure
