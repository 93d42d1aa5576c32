"""What a run shows and stores: measurements with intervals, pictures, policy and provenance."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure

from ..files import save_atomically, save_json
from ..network.bits import BitConfig
from ..network.cost import bitops, model_size
from ..network.supernet import Supernet
from ..training.evaluation import evaluate, recalibrate
from .intervals import top1_interval

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pandas", "safetensors", "mpqlib")


def measure(
    supernet: Supernet,
    config: BitConfig,
    splits,
    *,
    images: int | None = 7000,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Cost and accuracy of one configuration, recalibrated on `images` training images.

    `splits`: from `data.load`. `images`: see `recalibrate`; None uses the present statistics. Cost:
    BitOPs in G per image and size in MB. Accuracy: top-1 in % on the search split, and on the test
    split with its 95% interval. Raises ValueError as `recalibrate` and `evaluate` do.
    """
    if images is not None:
        recalibrate(supernet, splits.calibration, config, images=images, device=device)
    searched = evaluate(supernet, splits.search, config, device=device)
    tested = evaluate(supernet, splits.test, config, device=device)
    return {
        "bitops_g": bitops(supernet.table, config) / 1e9,
        "size_mb": model_size(supernet.table, config) / 1e6,
        "search_top1": 100 * searched.top1,
        "search_loss": searched.loss,
        **top1_interval(tested.correct),
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
        save_atomically(folder / f"{name}.png", partial(figure.savefig, format="png", dpi=150))
