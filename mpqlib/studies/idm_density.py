"""Differences between a layer's outputs at few bits and at many bits (RFQuant, Fig. 3 and 4)."""

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy.spatial.distance import jensenshannon
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import Dataset

from ..data import Splits, loader
from ..models import create
from ..network.bits import sample
from ..network.layers import QuantLinear
from ..network.supernet import Supernet
from ..report.intervals import t_bounds
from ..report.plots import ARM_COLOURS, COLOURS
from ..training.distortion import reading
from ..training.evaluation import batch_norms, batch_statistics, evaluate, recalibrate
from ..training.loop import TrainConfig, train
from ..training.step import idm_gradient_share
from .parameters import MODEL, NAME, Rule, check_layers, check_subset, items, named, number, whole


def jensen_shannon(a: Tensor, b: Tensor, bins: int = 200) -> float:
    """Jensen-Shannon distance between two samples, 0 to 1: the root of the divergence in bits.

    Compares histograms of `bins` bins. They span the central 99.8% of both samples together; values
    outside are counted in the first or last bin.
    """
    a, b = a.double().flatten().numpy(), b.double().flatten().numpy()
    low, high = np.quantile(np.concatenate([a, b]), [0.001, 0.999])
    edges = np.linspace(low, high, bins + 1)
    counts = [np.histogram(values.clip(low, high), edges)[0] for values in (a, b)]
    return float(jensenshannon(*counts, base=2))


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 distance between two samples of equal size: mean distance at equal ranks."""
    a, b = (values.double().flatten().sort().values for values in (a, b))
    return float((a - b).abs().mean())


def output_distances(low: Mapping[str, Tensor], high: Mapping[str, Tensor]) -> list[dict]:
    """Distances between the outputs `low` and `high` of the same images: one row per layer.

    Columns: `js` is the Jensen-Shannon distance, `wasserstein` the Wasserstein-1 distance and `rms`
    the root mean square of the difference value by value. The last two are in standard deviations
    of `high`, so that layers can be compared.
    """
    rows = []
    for name, b in high.items():
        a, std = low[name], float(b.std())
        row = {"layer": name, "js": jensen_shannon(a, b), "wasserstein": wasserstein(a, b) / std}
        rows.append(row | {"rms": float((a - b).square().mean().sqrt()) / std})
    return rows


def sampled(values: Tensor, size: int = 200_000) -> Tensor:
    """A copy of at most `size` of the values, as a vector on the CPU.

    Tensors of one shape are read at the same positions.
    """
    flat = values.flatten()
    if flat.numel() <= size:
        return flat.clone().cpu()  # later in-place operations would change a view
    positions = torch.randint(flat.numel(), (size,), generator=torch.Generator().manual_seed(0))
    return flat.cpu()[positions]


def outputs_at(supernet: Supernet, x: Tensor, bits: int) -> dict[str, Tensor]:
    """Sampled outputs (after the batch norm) of the searchable layers at uniform `bits`, by name.

    x: images (N, C, H, W). Batch norms use their running statistics.
    """
    read = reading(supernet.layers, supernet.searchable, lambda name, call, y: sampled(y.detach()))
    with torch.no_grad(), read as outputs:
        supernet.eval()(x, supernet.uniform(bits))
    return {name: torch.cat(calls) for name, calls in outputs.items()}


def compare_outputs(
    supernet: Supernet,
    x: Tensor,
    calibration: Dataset,
    low: int = 2,
    high: int = 6,
    device: str | torch.device = "cpu",
    *,
    images: int = 7000,
) -> tuple[list[dict], dict[int, dict[str, Tensor]]]:
    """`output_distances` between uniform `low` and `high` bits, and the outputs by bit-width.

    x: images (N, C, H, W). Each of the two is recalibrated first, on `images` of `calibration`. The
    supernet then holds the statistics of `high`.
    """
    outputs = {}
    for bits in (low, high):
        recalibrate(supernet, calibration, supernet.uniform(bits), images=images, device=device)
        outputs[bits] = outputs_at(supernet, x.to(device), bits)
    return output_distances(outputs[low], outputs[high]), outputs


def idm_share(
    supernet: Supernet,
    splits: Splits,
    weight: float,
    batch_size: int,
    seed: int,
    device: str | torch.device,
) -> float:
    """`idm_gradient_share` in one step of training, with three random configurations."""
    x, y = next(iter(loader(splits.calibration, batch_size)))
    generator = torch.Generator().manual_seed(seed)
    configs = [sample(supernet.candidates, generator) for _ in range(3)]
    step = (supernet, x.to(device), y.to(device), supernet.candidates, configs)
    return idm_gradient_share(*step, weight)


PAIR = Rule(
    "two whole numbers from 1",
    lambda value: (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(map(whole(1, 100).holds, value))
    ),
)
IDM_RULES = {
    "arms": named(number(0)),
    "bits": items(whole(2, 8), least=2),
    "imagenet_model": MODEL,
    "imagenet_layers": items(NAME),
    "crops": PAIR,
}


def check_compared(
    model: str,
    layer: str,
    arms: Mapping[str, float],
    imagenet_model: str,
    imagenet_layers: Sequence,
) -> None:
    """Raises ValueError for parameters of the notebook that do not fit together.

    `layer` and `imagenet_layers` must be convolutions of their models, and `arms` have "no IDM" and
    "IDM", which the paper compares.
    """
    check_subset("arms", ["no IDM", "IDM"], arms)
    check_layers("layer", [layer], model)
    check_layers("imagenet_layers", imagenet_layers, imagenet_model)


def compare_weights(
    model: str,
    splits: Splits,
    arms: Mapping[str, float],
    bits: Sequence[int],
    layer: str,
    seed: int,
    *,
    float_config: TrainConfig,
    config: TrainConfig,
    probe_images: int = 256,
    recalibration_images: int = 7000,
    device: str | torch.device = "cpu",
) -> dict:
    """Train one supernet per weight of the IDM loss, and compare its smallest and largest bits.

    `model`: name for `models.create`. `arms`: weight of the IDM loss by name of the arm. `bits`:
    candidate bit-widths. `float_config`, `config`: training of the float network, which all arms
    start from, and of the supernets; `seed` and `arms` take the place of their entries.
    `probe_images`: images of the search split whose outputs are compared. `recalibration_images`:
    training images for the batch-norm statistics. Returns `rows` (`output_distances`, beside
    `top1`, the test top-1 in % with all layers at the smallest bits, and `idm_share`), each with
    the columns `arm` and `seed`; `drawn`, some outputs of `layer` by arm and bit-width; and the
    wall time `seconds`.
    """
    started, rows, drawn = time.perf_counter(), [], {}
    low, high = min(bits), max(bits)
    torch.manual_seed(seed)
    network = create(model, len(splits.classes))
    float_config = replace(float_config, seed=seed)
    network, _ = train(network, splits.train, float_config, device=device, label="float")
    examples = next(iter(loader(splits.calibration, 64)))[0].to(device)
    x = next(iter(loader(splits.search, probe_images)))[0]
    options = dict(images=recalibration_images, device=device)
    for arm, weight in arms.items():
        supernet = Supernet(copy.deepcopy(network), examples, bits)
        of_arm = replace(config, seed=seed, idm_weight=weight)
        supernet, _ = train(supernet, splits.train, of_arm, device=device, label=arm)
        distances, outputs = compare_outputs(supernet, x, splits.train, low, high, **options)
        recalibration = dict(calibration=splits.train, **options)
        found = evaluate(supernet, splits.test, supernet.uniform(low), **recalibration)
        share = idm_share(supernet, splits, weight, config.batch_size, seed, device)
        about = {"arm": arm, "seed": seed, "top1": 100 * found.top1, "idm_share": share}
        rows += [about | row for row in distances]
        drawn[arm] = {b: sampled(outputs[b][layer], 4000).tolist() for b in (low, high)}
    return {"rows": rows, "drawn": drawn, "seconds": time.perf_counter() - started}


def outputs_alone(supernet: Supernet, x: Tensor, bits: int) -> dict[str, Tensor]:
    """Like `outputs_at`, but only one layer at a time is quantized; all others stay in float.

    Each layer reads its input in the float network. Its batch norm uses the statistics of this
    batch and keeps its own.
    """
    found: dict[str, Tensor] = {}
    config, layers, norms = supernet.uniform(bits), supernet.layers, batch_norms(supernet)

    def quantize(name: str, layer: QuantLinear, args: tuple, output: Tensor) -> None:
        layer.set_bits(config[name])
        with batch_statistics([m for m in layer.modules() if m in norms]):
            found[name] = sampled(layer.forward(*args))  # layer(...) would call this hook again
        layer.set_bits(None)

    with ExitStack() as hooks, torch.no_grad():
        for name in supernet.searchable:
            handle = layers[name].register_forward_hook(partial(quantize, name))
            hooks.callback(handle.remove)
        supernet.eval()
        supernet(x)
    return found


def photographs(
    image_size: int, mean: Sequence[float], std: Sequence[float], across: int = 8, down: int = 4
) -> Tensor:
    """Overlapping crops of scikit-learn's two photographs, normalised: (N, 3, size, size).

    `across`, `down`: number of crops of each photograph in a row and in a column, so that
    N = 2 * across * down. `mean`, `std`: per channel, for pixels from 0 to 1. Raises ValueError for
    an `image_size` that is larger than the photographs.
    """
    crops = []
    for photograph in load_sample_images().images:  # (427, 640, 3) each, 0 to 255
        pixels = torch.tensor(photograph).permute(2, 0, 1) / 255  # HWC -> CHW
        if not 1 <= image_size <= min(pixels.shape[1:]):
            largest = min(pixels.shape[1:])
            raise ValueError(f"image_size={image_size!r} is not allowed: from 1 to {largest}")
        rows, columns = (n - image_size for n in pixels.shape[1:])
        for top in np.linspace(0, rows, down, dtype=int):
            for left in np.linspace(0, columns, across, dtype=int):
                crops.append(pixels[:, top : top + image_size, left : left + image_size])
    shape = (3, 1, 1)  # per channel
    return (torch.stack(crops) - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def densities(panels: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """Densities of a layer's outputs by bit-width: one panel for each key of `panels`."""
    size = (3.4 * len(panels), 3.2)
    style = dict(sharex=True, sharey=True, layout="constrained", squeeze=False)
    figure, axes = plt.subplots(1, len(panels), figsize=size, **style)
    every = np.concatenate([v for by_bits in panels.values() for v in by_bits.values()])
    low, high = np.percentile(every, [0.2, 99.8])
    for axis, (title, by_bits) in zip(axes[0], panels.items(), strict=True):
        for bits, values in by_bits.items():
            style = dict(color=COLOURS[bits], fill=True, alpha=0.35, label=f"{bits} bits")
            sns.kdeplot(np.asarray(values), bw_adjust=0.6, **style, ax=axis)
        axis.set(title=title, xlabel="output after the norm", ylabel="density", xlim=(low, high))
    axes[0, 0].legend(frameon=False)
    return figure


def distances_by_layer(metrics: pd.DataFrame) -> Figure:
    """Jensen-Shannon and Wasserstein distance of each layer and arm, with 95% intervals over seeds.

    `metrics`: rows of `output_distances` with the columns `arm` and `seed`.
    """
    size = (8, 1.5 + 0.2 * metrics["layer"].nunique())
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    labels = {"js": "Jensen-Shannon distance (0 to 1)", "wasserstein": "Wasserstein distance (std)"}
    arms = metrics["arm"].nunique()
    style = dict(hue="arm", palette=ARM_COLOURS[:arms], errorbar=t_bounds, linestyle="none")
    style |= dict(dodge=0.5 * (arms > 1), markersize=4, linewidth=1.5)
    for axis, (value, label) in zip(axes, labels.items(), strict=True):
        sns.pointplot(metrics, x=value, y="layer", **style, ax=axis, legend=axis is axes[0])
        axis.set(xlabel=label, ylabel="layer, from input to output", xlim=(0, None))
        axis.grid(axis="y", linewidth=0.3)
    axes[0].get_legend().remove()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=arms, loc="outside upper center", frameon=False)
    return figure
