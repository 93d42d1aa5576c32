"""What a run shows and stores: measurements with intervals, pictures, policy and provenance."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import yaml
from IPython.display import Markdown
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy.stats import binomtest
from torch import Tensor

from .checkpoint import save_atomically, save_json
from .cost import COST_MODEL, bitops, layer_bitops, model_size
from .evaluation import evaluate, recalibrate
from .layers import Bits
from .supernet import BitConfig, LayerInfo, Supernet

# One colour a bit-width, everywhere: viridis, ordered and safe for the colour-blind.
COLOURS = dict(zip(range(2, 9), sns.color_palette("viridis", 7), strict=True))
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pandas", "safetensors", "mpqlib")


def top1_interval(correct: Tensor) -> dict[str, float]:
    """Top-1 in % of images classified correctly or not (N,), with its 95% binomial interval.

    Source: Wilson's score interval, scipy.
    """
    hits, n = int(correct.sum()), len(correct)
    low, high = binomtest(hits, n).proportion_ci(0.95, "wilson")
    return {"top1": 100 * hits / n, "top1_low": 100 * low, "top1_high": 100 * high}


def measure(
    supernet: Supernet,
    config: BitConfig,
    splits,
    *,
    images: int = 7000,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """One configuration's cost and accuracy, norms recalibrated on `images` training images.

    BitOPs in G per image, size in MB; top-1 in % on the search split, and on the test split with
    its interval. `splits`: of `data.load`. `images`: 0 leaves the norms as they are.
    """
    if images:
        recalibrate(supernet, splits.calibration, config, images=images, device=device)
    searched = evaluate(supernet, splits.search, config, device=device)
    tested = evaluate(supernet, splits.test, config, device=device)
    return {
        "bitops_g": bitops(supernet.table, config) / 1e9,
        "size_mb": model_size(supernet.table, config),
        "search_top1": 100 * searched.top1,
        "search_loss": searched.loss,
        **top1_interval(tested.correct),
    }


def comparison(
    rows: Sequence[Mapping], float_top1: Mapping, table: Sequence[LayerInfo]
) -> pd.DataFrame:
    """Table of `measure`'s rows below the float network, which counts 32 bits everywhere."""
    in_float = {info.name: Bits(32, 32) for info in table}
    costs = {"bitops_g": bitops(table, in_float) / 1e9, "size_mb": model_size(table, in_float)}
    return pd.DataFrame([{"configuration": "float", **costs, **float_top1}, *rows])


def show(metrics: pd.DataFrame) -> Markdown:
    """The comparison as a table to read; what depends on the processor follows an \u2248 sign."""
    lines = [
        "| configuration | BitOPs (G) | size (MB) | test top-1 (%) | 95% interval | search top-1 (%) |",
        "|---|---|---|---|---|---|",
    ]
    for row in metrics.to_dict("records"):
        about = "\u2248 " if row["configuration"] == "searched" else ""
        searched = "" if np.isnan(row["search_top1"]) else f"\u2248 {row['search_top1']:.1f}"
        lines.append(
            f"| {row['configuration']} | {about}{row['bitops_g']:.3f} | {about}{row['size_mb']:.2f} "
            f"| \u2248 {row['top1']:.1f} | \u2248 [{row['top1_low']:.1f}, {row['top1_high']:.1f}] "
            f"| {searched} |"
        )
    return Markdown("\n".join(lines))


def best_uniform(metrics: pd.DataFrame, budget: float) -> pd.Series | None:
    """The uniform configuration at or under `budget` (G) that is best on the search split."""
    fits = metrics["configuration"].str.startswith("uniform") & (metrics["bitops_g"] <= budget)
    uniform = metrics[fits].sort_values(["search_top1", "search_loss"], ascending=[False, True])
    return None if uniform.empty else uniform.iloc[0]


def verdict(metrics: pd.DataFrame, budget: float) -> str:
    """In words, how the searched policy compares with the best uniform one within the budget."""
    found, uniform = (
        metrics.set_index("configuration").loc["searched"],
        best_uniform(metrics, budget),
    )
    if uniform is None:
        return f"No uniform configuration costs {budget} G or less: there is none to compare with."
    search, test = (found[key] - uniform[key] for key in ("search_top1", "top1"))
    apart = found["top1_low"] > uniform["top1_high"] or uniform["top1_low"] > found["top1_high"]
    return (
        f"Of the uniform configurations at or under {budget} G, {uniform['configuration']} is best"
        f" on the search split, at {uniform['bitops_g']:.3f} G.\n"
        f"The searched policy, at {found['bitops_g']:.3f} G, classifies {search:+.1f} percentage"
        f" points more images correctly on the search split and {test:+.1f} on the test split.\n"
        f"The two test intervals {'do not overlap' if apart else 'overlap'}; one seed is no"
        " evidence for either."
    )


def result(metrics: pd.DataFrame, budget: float, seed: int, seconds: float) -> dict:
    """What result.json holds: the searched policy's figures, float and uniform ones beside it."""
    rows = {row["configuration"]: row for row in metrics.to_dict("records")}
    keys = ("bitops_g", "size_mb", "top1", "top1_low", "top1_high", "search_top1", "search_loss")
    uniform = [row for name, row in rows.items() if name.startswith("uniform")]
    return {
        "bitops_budget_g": budget,
        **{key: rows["searched"][key] for key in keys},
        "top1_float": rows["float"]["top1"],
        "uniform": uniform,
        "seed": seed,
        "seconds": round(seconds, 1),
    }


def plot_training(histories: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Loss and training accuracy over epochs; `histories`: name of a phase -> rows of `train`."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for phase, history in histories.items():
        rows = pd.DataFrame(list(history))
        for suffix, line in (("", "-"), ("_random", "--")):
            if f"accuracy{suffix}" in rows:
                name = phase + (", random bits" if suffix else "")
                style = dict(linestyle=line, marker="o", label=name)
                axes[0].plot(rows["epoch"], rows[f"loss{suffix}"], **style)
                axes[1].plot(rows["epoch"], 100 * rows[f"accuracy{suffix}"], **style)
    axes[0].set(xlabel="epoch", ylabel="training loss (nats)", yscale="log")
    axes[1].set(xlabel="epoch", ylabel="training top-1 (%)")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(frameon=False)
    return figure


def plot_turbulence(history: Sequence[Mapping]) -> Figure:
    """Turbulence per layer and epoch; a cross where the smallest bit-width was frozen."""
    values = pd.DataFrame([row["turbulence"] for row in history]).T
    full = {name: len(bits) for name, bits in history[0]["candidates"].items()}
    for row in history:
        full = {name: max(full[name], len(bits)) for name, bits in row["candidates"].items()}
    ranked = [name for name in values.index if full[name] > 1]
    frozen = [["x" if len(r["candidates"][n]) < full[n] else "" for r in history] for n in ranked]
    size = (max(5, 2.5 + 0.45 * len(history)), 1 + 0.22 * len(ranked))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    bar = {"label": "turbulence (unstable share / bits)"}
    epochs = [row["epoch"] for row in history]
    sns.heatmap(
        values.loc[ranked], annot=np.array(frozen), fmt="", cmap="mako_r", cbar_kws=bar, ax=axis
    )
    axis.set(xlabel="epoch (x: smallest bit-width frozen)", ylabel="layer")
    axis.set_xticks(np.arange(len(epochs)) + 0.5, epochs, rotation=0)
    axis.set_yticks(np.arange(len(ranked)) + 0.5, ranked, rotation=0)
    return figure


def plot_policy(table: Sequence[LayerInfo], config: BitConfig) -> Figure:
    """Bits of every layer's weights and activations, and its share of all BitOPs."""
    names = [info.name for info in table]
    total = bitops(table, config)
    share = [100 * layer_bitops(info, config[info.name]) / total for info in table]
    rows = {
        "weight bits": [config[name].weight for name in names],
        "activation bits": [config[name].act for name in names],
    }
    size = (max(6, 1 + 0.33 * len(names)), 6)
    figure, axes = plt.subplots(3, 1, figsize=size, sharex=True, layout="constrained")
    for axis, (label, bits) in zip(axes, rows.items(), strict=False):
        axis.bar(names, bits, color=[COLOURS[b] for b in bits])
        axis.set(ylabel=label, ylim=(0, 8.9), yticks=range(0, 9, 2))
        axis.bar_label(axis.containers[0], fontsize=8)
    axes[2].bar(names, share, color="0.55")
    axes[2].set(ylabel="share of BitOPs (%)", xlabel="layer, from input to output")
    axes[2].tick_params(axis="x", rotation=90)
    used = sorted({b for bits in rows.values() for b in bits})
    handles = [Patch(color=COLOURS[b], label=f"{b} bits") for b in used]
    figure.legend(handles=handles, ncols=len(used), loc="outside upper center", frameon=False)
    return figure


def plot_comparison(rows: pd.DataFrame, budget: float) -> Figure:
    """Top-1 on the test split with its interval over BitOPs, for the rows of `measure`.

    `rows`: a column `configuration` beside; `budget` in G, drawn as a line.
    """
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    kinds = {"searched": ("searched", "D", "C3"), "uniform": ("uniform", "o", "0.4")}
    for kind, (label, marker, colour) in kinds.items():
        part = rows[rows["configuration"].str.startswith(kind)]
        spread = [part["top1"] - part["top1_low"], part["top1_high"] - part["top1"]]
        style = dict(fmt=marker, capsize=3, color=colour, label=label)
        axis.errorbar(part["bitops_g"], part["top1"], spread, **style)
    in_float = rows.loc[rows["configuration"] == "float", "top1"].item()
    axis.axhline(in_float, linestyle="--", color="0.7", label="float")
    axis.axvline(budget, linestyle=":", color="C3", label="budget")
    axis.set(xlabel="BitOPs (G per image)", ylabel="test top-1 (%), 95% interval")
    axis.legend(frameon=False, loc="lower right")
    return figure


def policy(supernet: Supernet, config: BitConfig, sha256: str, about: Mapping) -> dict:
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


def processor() -> str:
    """The name of the accelerator, or else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(named)} x {named[0]}" if named else platform.processor()


def provenance(seeds: Sequence[int], seconds: float) -> dict:
    """Where numbers come from: commit, package versions, processor, seeds, wall time in s."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or None,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "processor": processor(),
        "seeds": list(seeds),
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save_run(
    folder: Path,
    *,
    parameters: Mapping,
    metrics: pd.DataFrame,
    source: Mapping,
    figures: Mapping[str, Figure],
    **documents: Mapping,
) -> None:
    """Writes parameters.yaml, metrics.csv, provenance.json (`source`), figures as PNG and
    `documents` as JSON into `folder`, each atomically."""
    folder = Path(folder)
    text = yaml.safe_dump(dict(parameters), sort_keys=False)
    save_atomically(folder / "parameters.yaml", lambda part: part.write_text(text))
    save_atomically(folder / "metrics.csv", lambda part: metrics.to_csv(part, index=False))
    for name, document in {"provenance": source, **documents}.items():
        save_json(folder / f"{name}.json", document)
    for name, figure in figures.items():
        save_atomically(
            folder / f"{name}.png", lambda part, f=figure: f.savefig(part, format="png", dpi=150)
        )
