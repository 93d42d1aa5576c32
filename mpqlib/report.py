"""What a run shows and stores: measurements with intervals, pictures, policy and provenance."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from IPython.display import Markdown
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import Tensor

from .checkpoint import save_atomically, save_json
from .cost import COST_MODEL, bitops, model_size
from .evaluation import evaluate, recalibrate
from .layers import Bits
from .supernet import BitConfig, LayerInfo, Supernet

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pandas", "safetensors", "mpqlib")


def top1_interval(correct: Tensor) -> dict[str, float]:
    """Top-1 in % of images classified correctly or not (N,), with its 95% binomial interval.

    Source: Wilson's score interval, scipy.
    """
    hits, n = int(correct.sum()), len(correct)
    low, high = binomtest(hits, n).proportion_ci(0.95, "wilson")
    percent = {"top1": hits / n, "top1_low": low, "top1_high": high}
    return {name: float(100 * share) for name, share in percent.items()}


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
    heads = "configuration", "BitOPs (G)", "size (MB)", "test top-1 (%)", "95%", "search top-1 (%)"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in metrics.to_dict("records"):
        about = "\u2248 " if row["configuration"] == "searched" else ""
        cells = [
            row["configuration"],
            f"{about}{row['bitops_g']:.3f}",
            f"{about}{row['size_mb']:.2f}",
            f"\u2248 {row['top1']:.1f}",
            f"\u2248 [{row['top1_low']:.1f}, {row['top1_high']:.1f}]",
            "" if np.isnan(row["search_top1"]) else f"\u2248 {row['search_top1']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return Markdown("\n".join(lines))


def best_within(metrics: pd.DataFrame, budget: float, kind: str = "") -> str | None:
    """The configuration at or under `budget` (G) that is best on the search split, or None.

    By top-1, then by loss. `kind`: only configurations whose name begins so, such as "uniform".
    """
    fits = metrics["configuration"].str.startswith(kind) & (metrics["bitops_g"] <= budget)
    ranked = metrics[fits].sort_values(["search_top1", "search_loss"], ascending=[False, True])
    return None if ranked.empty else ranked.iloc[0]["configuration"]


def verdict(metrics: pd.DataFrame, budget: float) -> str:
    """In words, how the searched policy compares with the best uniform one within the budget."""
    best = best_within(metrics, budget, "uniform")
    if best is None:
        return f"No uniform configuration costs {budget} G or less: there is none to compare with."
    rows = metrics.set_index("configuration")
    found, uniform = rows.loc["searched"], rows.loc[best]
    search, test = (found[key] - uniform[key] for key in ("search_top1", "top1"))
    apart = found["top1_low"] > uniform["top1_high"] or uniform["top1_low"] > found["top1_high"]
    return (
        f"Of the uniform configurations at or under {budget} G, {best} is best on the search split,"
        f" at {uniform['bitops_g']:.3f} G.\n"
        f"The searched one, at {found['bitops_g']:.3f} G, differs from it by {search:+.1f} points"
        f" of top-1 on the search split and by {test:+.1f} on the test split, where the intervals"
        f" {'do not overlap' if apart else 'overlap'}.\n"
        f"The policy is the better one on the search split: {best_within(metrics, budget)}."
    )


def result(metrics: pd.DataFrame, budget: float, seed: int, seconds: float) -> dict:
    """What result.json holds: the policy's figures, all configurations' beside it."""
    rows = {row["configuration"]: row for row in metrics.to_dict("records")}
    chosen = best_within(metrics, budget)
    return {
        "bitops_budget_g": budget,
        **rows[chosen],
        "top1_float": rows["float"]["top1"],
        "searched": rows["searched"],
        "uniform": [row for name, row in rows.items() if name.startswith("uniform")],
        "seed": seed,
        "seconds": round(seconds, 1),
    }


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
    **documents: object,
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
