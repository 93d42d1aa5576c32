"""Distance of latent weights to their grid points during training (RFQuant, Fig. 2)."""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..data import Splits, loader
from ..models import create
from ..network.layers import QuantLinear
from ..network.quantizer import integer_range
from ..network.supernet import Supernet
from ..report.intervals import t_bounds
from ..report.plots import COLOURS
from ..training.evaluation import evaluate
from ..training.loop import Run, TrainConfig, train
from .parameters import BITS, check_layers, check_subset, items, named, whole


def pointwise(supernet: Supernet) -> list[str]:
    """Names of the searchable point-wise convolutions: 1x1, with one group."""
    ops = {name: supernet.layers[name].op for name in supernet.searchable}
    convs = {name: op for name, op in ops.items() if isinstance(op, nn.Conv2d)}
    return [name for name, op in convs.items() if op.kernel_size == (1, 1) and op.groups == 1]


def grid_points(layer: QuantLinear, bits: int) -> Tensor:
    """Integers round(clip(w / s)) of a layer's latent weights w at `bits`: int8, in w's shape."""
    v = layer.op.weight.detach() / layer.weight_quantizer.step(bits).detach()
    return v.clamp_(*integer_range(bits, signed=True)).round_().to(torch.int8)


class LatentProbe:
    """Records latent weights: `train(..., watch=probe)` adds a row per step, layer and bit-width.

    `names`: layers. `bits`: bit-widths, 8 at most. In a row, `step` counts from 0, `distance` is
    ||w - w_hat|| / ||w|| with the quantized weights w_hat, and `flips` is the share of weights, 0
    to 1, whose integer changed since the previous step; NaN if that step was not seen. `file`: a
    csv file that gets the rows as well; training that resumes continues it.
    """

    def __init__(self, names: Iterable[str], bits: Iterable[int], file: str | Path | None = None):
        self.names, self.bits, self.file = list(names), list(bits), file and Path(file)
        self.rows: list[dict] = []
        self._last: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def __call__(self, run: Run) -> None:
        rows = [self._row(run, name, bits) for name in self.names for bits in self.bits]
        self.rows += rows
        if self.file:
            new = not self.file.exists()
            pd.DataFrame(rows).to_csv(self.file, mode="a", header=new, index=False)

    def _row(self, run: Run, name: str, bits: int) -> dict:
        layer, place = run.model.layers[name], (name, bits)
        points, step = grid_points(layer, bits), layer.weight_quantizer.step(bits)
        weight, before = layer.op.weight, self._last.get(place)
        self._last[place] = points
        return {
            "step": run.step - 1,
            "layer": name,
            "bits": bits,
            "distance": float((weight - points * step).norm() / weight.norm()),
            "flips": nan if before is None else float((points != before).float().mean()),
        }


def read_series(file: str | Path) -> pd.DataFrame:
    """Rows that a LatentProbe wrote to `file`: of steps that ran twice, those of the first time."""
    return pd.read_csv(file).drop_duplicates(["step", "layer", "bits"])


def roughness(values: Sequence[float]) -> float:
    """Standard deviation of `values` around their least-squares line.

    The line removes a steady drift, which is not an oscillation.
    """
    x = np.arange(len(values))
    return float(np.std(values - np.polyval(np.polyfit(x, values, 1), x)))


def late_half(series: pd.DataFrame) -> pd.DataFrame:
    """Summary of a LatentProbe's rows over the last half of the steps: a row per layer and bits.

    Columns: means of `distance` and `flips`, and `spread`, the `roughness` of the distance.
    """
    late = series[series["step"] > series["step"].max() / 2].sort_values("step")
    by = late.groupby(["layer", "bits"], sort=False)
    columns = dict(distance=("distance", "mean"), spread=("distance", roughness))
    return by.agg(**columns, flips=("flips", "mean")).reset_index()


LATENT_RULES = {
    "arms": named(BITS, 2, 2),
    "watched": items(whole(2, 8)),
    "epochs": whole(1),
}


def check_watched(
    model: str, layer: str, arms: Mapping[str, Sequence[int]], watched: Sequence[int]
) -> None:
    """Raises ValueError for parameters of the notebook that do not fit together.

    `layer` must be a point-wise convolution of `model`, and `watched` be candidates of all `arms`.
    """
    for bits in arms.values():
        check_subset("watched", watched, bits)
    check_layers("layer", [layer], model, kernel=1)


def watch_candidates(
    model: str,
    splits: Splits,
    arms: Mapping[str, Sequence[int]],
    watched: Sequence[int],
    seed: int,
    *,
    float_config: TrainConfig,
    config: TrainConfig,
    recalibration_images: int = 7000,
    device: str | torch.device = "cpu",
) -> dict:
    """Train one supernet per arm from the same float network, and watch its latent weights.

    `model`: name for `models.create`. `arms`: candidate bit-widths by name of the arm. `watched`:
    bit-widths to watch in the point-wise convolutions, candidates of every arm. `float_config`,
    `config`: training of the float network and of the supernets; `seed` takes the place of theirs.
    `recalibration_images`: training images for the batch-norm statistics before each evaluation.
    Returns `series` (rows of LatentProbe), `top1` (test top-1 in % with all layers at each of the
    watched bit-widths), both with the columns `arm` and `seed`, and the wall time `seconds`.
    """
    started, series, top1 = time.perf_counter(), [], []
    torch.manual_seed(seed)
    network = create(model, len(splits.classes))
    float_config = replace(float_config, seed=seed)
    network, _ = train(network, splits.train, float_config, device=device, label="float")
    examples = next(iter(loader(splits.calibration, 64)))[0].to(device)
    recalibration = dict(calibration=splits.train, images=recalibration_images)
    for arm, bits in arms.items():
        supernet = Supernet(copy.deepcopy(network), examples, bits)
        probe = LatentProbe(pointwise(supernet), watched)
        options = dict(device=device, label=arm, watch=probe)
        supernet, _ = train(supernet, splits.train, replace(config, seed=seed), **options)
        about = {"arm": arm, "seed": seed}
        series += [about | row for row in probe.rows]
        for b in watched:
            uniform = supernet.uniform(b)
            found = evaluate(supernet, splits.test, uniform, device=device, **recalibration)
            top1.append(about | {"bits": b, "top1": 100 * found.top1})
    return {"series": series, "top1": top1, "seconds": time.perf_counter() - started}


def over_steps(series: pd.DataFrame, value: str, label: str) -> Figure:
    """Column `value` of a LatentProbe's rows over the training steps: one panel per layer.

    Colours are bit-widths, line styles are arms; bands are 95% intervals over seeds. `series`: the
    rows with the columns `arm` and `seed`.
    """
    style = dict(x="step", y=value, hue="bits", palette=COLOURS, style="arm", errorbar=t_bounds)
    panels = dict(col="layer", kind="line", height=3.4, aspect=1.25)
    grid = sns.relplot(series, **style, **panels)
    grid.set(xlabel="training step", ylabel=label, ylim=(0, None)).set_titles("{col_name}")
    return grid.figure
