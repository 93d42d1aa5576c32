"""The table of results on the first page, computed from stored runs."""

import json
from pathlib import Path

import pandas as pd
import yaml

from .intervals import t_interval
from .tables import markdown_table

RESULT_HEADS = (
    "network, data",
    "BitOPs at most (G)",
    "searched policy, test top-1 (%)",
    "best uniform bits, test top-1 (%)",
    "float (%)",
    "n",
    "time of a run",
)
# Runs of 04_search, and the budget shown, as the bits that a uniform network has at its BitOPs.
SHOWN = {"resnet18": 4.149, "digits": 3, "cifar10": 3}
DATA = {"digits": "digits (scikit-learn)", "cifar10": "CIFAR-10, 10,000 training images"}


def _named(folder: Path) -> str:
    """The network and the data of a stored run."""
    stored = yaml.safe_load((folder / "parameters.yaml").read_text())
    size = stored["image_size"]
    return f"{stored['model']}, {DATA[stored['dataset']]}, {size} px"


def searched_beside_uniform(front: pd.DataFrame, level: float) -> pd.DataFrame:
    """Test top-1 of the greedy search and of the best uniform bits at one budget, a row per seed.

    `front`: rows of the study "front" of 04_search. `level`: of the budget. The uniform bits are
    the best on the search split within the budget. Columns: `budget_g`, `searched`, `uniform`.
    """
    rows = []
    for seed, part in front.groupby("seed"):
        found = part[(part["arm"] == "greedy") & (part["level"] == level)].squeeze()
        uniform = part[(part["arm"] == "uniform") & (part["bitops_g"] <= found["budget_g"])]
        best = uniform.loc[uniform["search_top1"].idxmax()]
        top1 = {"searched": found["top1"], "uniform": best["top1"]}
        rows.append({"seed": seed, "budget_g": found["budget_g"]} | top1)
    return pd.DataFrame(rows)


def _searched_cells(folder: Path, level: float) -> list[str]:
    """One row of the table, from a run of 04_search."""
    metrics = pd.read_csv(folder / "metrics.csv")
    rows = searched_beside_uniform(metrics[metrics["study"] == "front"], level)
    searched, uniform = (t_interval(rows[column]) for column in ("searched", "uniform"))
    gain = t_interval(rows["searched"] - rows["uniform"])
    return [
        _named(folder),
        f"{rows['budget_g'].iloc[0]:.3g}",
        f"{searched.mean:.1f} ({gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}])",
        f"{uniform.mean:.1f}",
        "not measured",
        f"{len(rows)} seeds",
        "",
    ]


def _trained_cells(folder: Path) -> list[str]:
    """One row of the table, from a run of 03_train."""
    found = json.loads((folder / "result.json").read_text())
    budget = found["bitops_budget_g"]
    within = [row for row in found["uniform"] if row["bitops_g"] <= budget]
    best = max(within, key=lambda row: row["search_top1"])
    return [
        _named(folder),
        f"{budget:.3g}",
        f"{found['searched']['top1']:.1f}",
        f"{best['top1']:.1f}",
        f"{found['top1_float']:.1f}",
        "1 seed",
        f"{found['seconds'] / 60:.0f} min",
    ]


def results_table(results: Path) -> str:
    """Searched policies beside uniform bits and the float network, as Markdown.

    In parentheses: searched minus uniform, paired by seed, with its 95% t-interval.
    """
    rows = [_trained_cells(results / "03_train" / "digits")]
    rows += [_searched_cells(results / "04_search" / run, level) for run, level in SHOWN.items()]
    return markdown_table(RESULT_HEADS, rows)
