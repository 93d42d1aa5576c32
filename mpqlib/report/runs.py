"""Measures configurations and stores a run with its provenance."""

import json
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure

from ..files import check_writable, save_json, save_together, write_json
from ..network.bits import BitConfig
from ..network.cost import bitops, model_size
from ..network.supernet import Supernet
from ..training.evaluation import evaluate, recalibrate
from ..training.loop import TRAINING_RULES
from .intervals import correct_text, top1_interval

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pandas", "safetensors", "mpqlib")


def measure(
    supernet: Supernet,
    config: BitConfig,
    splits,
    *,
    images: int | None = 7000,
    device: str | torch.device = "cpu",
    per_image: bool = False,
) -> dict[str, object]:
    """Cost and accuracy of one configuration, recalibrated on `images` training images.

    `splits`: from `data.load`. `images`: see `recalibrate`; None uses the present statistics. Cost:
    BitOPs in G per image and size in MB. Accuracy: top-1 in % on the search split, and on the test
    split with its 95% interval. `per_image`: also, as `correct`, which test images are classified
    correctly (`correct_text`). Raises ValueError as `recalibrate` and `evaluate` do.
    """
    if images is not None:
        recalibrate(supernet, splits.train, config, images=images, device=device)
    searched = evaluate(supernet, splits.search, config, device=device)
    tested = evaluate(supernet, splits.test, config, device=device)
    return {
        "bitops_g": bitops(supernet.table, config) / 1e9,
        "size_mb": model_size(supernet.table, config) / 1e6,
        "search_top1": 100 * searched.top1,
        "search_loss": searched.loss,
        **top1_interval(tested.correct),
        **({"correct": correct_text(tested.correct)} if per_image else {}),
    }


def processor() -> str:
    """Name of the GPU, or of the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(named)} x {named[0]}" if named else platform.processor()


def _text(file: Path) -> str:
    return file.read_text("utf-8", errors="replace")  # another project's file may hold anything


def checkout(path: Path) -> Path | None:
    """The checkout of mpqlib's repository that `path` lies in, or None."""
    path = Path(path).resolve()
    for folder in (path, *path.parents):
        file = folder / "pyproject.toml"
        if file.is_file() and re.search(r'^name = "mpqlib"$', _text(file), re.M):
            return folder
    return None


def own_commit() -> str | None:
    """The commit of the checkout that this package runs from; None if it is not in one.

    A repository of another project around the package, such as one that holds a virtual
    environment, does not count, nor does a file that is not tracked.
    """
    file = Path(__file__).resolve()
    root = checkout(file)
    if root is None or not (root / ".git").exists():
        return None
    for question in (["ls-files", "--error-unmatch", str(file)], ["rev-parse", "HEAD"]):
        try:
            answer = subprocess.run(["git", "-C", root, *question], capture_output=True, text=True)
        except FileNotFoundError:  # no git
            return None
        if answer.returncode != 0:
            return None
    return answer.stdout.strip()


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Stopwatch:
    """Wall time of a study that may be interrupted and resumed, kept in `file`.

    Call `seconds` after each stage. If a process is killed, only its time since the last call is
    lost. Raises ValueError if `file` is damaged or cannot be written.
    """

    def __init__(self, file: str | Path):
        self.file, self.start = Path(file), time.perf_counter()
        check_writable(self.file)  # before any work
        self.earlier = 0.0
        if self.file.exists():
            try:
                self.earlier = float(json.loads(self.file.read_text("utf-8"))["seconds"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.file} is damaged: remove it, and only the time so far is lost"
                ) from None

    def seconds(self) -> float:
        """Seconds so far, in this process and in all earlier ones; writes them into the file."""
        total = self.earlier + time.perf_counter() - self.start
        save_json(self.file, {"seconds": total})
        return total


def provenance(
    seeds: Sequence[int], seconds: float, training_rules: int | None = TRAINING_RULES
) -> dict:
    """Commit of mpqlib (None outside its repository), training rules, versions, seeds and the like.

    `seconds`: wall time of the whole study, such as from Stopwatch. `training_rules`: None for a
    study that does not train by `mpqlib.train`.
    """
    versions = {package: installed_version(package) for package in PACKAGES}
    return {
        "commit": own_commit(),
        "training_rules": training_rules,
        "versions": {"python": platform.python_version()} | versions,
        "processor": processor(),
        "seeds": list(seeds),
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def has_earlier_rules(folder: Path) -> bool:
    """Whether the run stored in `folder` was made with earlier training rules than the present.

    Never, if it names None: then it does not train by these rules.
    """
    source = json.loads((Path(folder) / "provenance.json").read_text())
    rules = source.get("training_rules", 1)
    return rules is not None and rules < TRAINING_RULES


def save_run(
    folder: Path,
    *,
    parameters: Mapping,
    metrics: pd.DataFrame,
    source: Mapping,
    figures: Mapping[str, Figure],
    **documents: object,
) -> None:
    """Writes parameters.yaml, metrics.csv, provenance.json, figures and documents into `folder`.

    `source`: from `provenance`. `figures` become PNG files, `documents` JSON files. Figures of an
    earlier run in this folder that this run does not draw are removed; provenance.json lists the
    figures of a run. Raises ValueError if a file cannot be written, or if `folder` is
    results/<notebook>/<run> and holds a run; an earlier run is then whole.
    """
    folder = Path(folder)
    left = _earlier_figures(folder) - set(figures)
    text = yaml.safe_dump(dict(parameters), sort_keys=False)
    documents = {"provenance": {**source, "figures": list(figures)}, **documents}
    writers = {
        "parameters.yaml": lambda part: part.write_text(text),
        "metrics.csv": lambda part: metrics.to_csv(part, index=False),
    }
    for name, document in documents.items():
        writers[f"{name}.json"] = partial(write_json, value=document)
    for name, figure in figures.items():
        writers[f"{name}.png"] = partial(figure.savefig, format="png", dpi=150)
    save_together({folder / name: write for name, write in writers.items()})
    for name in left:
        (folder / f"{name}.png").unlink(missing_ok=True)


def _earlier_figures(folder: Path) -> set[str]:
    """Names of the figures that an earlier `save_run` wrote into `folder`."""
    file = folder / "provenance.json"
    listed = json.loads(file.read_text()).get("figures", []) if file.exists() else []
    return {name for name in listed if Path(name).name == name}  # no path to another folder
