"""The table of results on the first page, computed from stored runs."""

import json
from pathlib import Path
from statistics import mean

import pandas as pd
import yaml

from .intervals import t_interval
from .runs import has_earlier_rules
from .tables import markdown_table

RESULT_HEADS = (
    "network, data",
    "BitOPs at most (G)",
    "searched policy, test top-1 (%)",
    "best uniform bits, test top-1 (%)",
    "float (%)",
    "n",
)
# Runs of 04_search, and the budget shown, as the bits that a uniform network has at its BitOPs.
SHOWN = {"resnet18_variants": 4.149, "digits": 3, "cifar10_variants": 3}
DATA = {"digits": "digits (scikit-learn)", "cifar10": "CIFAR-10, 10,000 training images"}


def _named(folder: Path) -> str:
    """The network and the data of a stored run."""
    stored = yaml.safe_load((folder / "parameters.yaml").read_text())
    size = stored["image_size"]
    return f"{stored['model']}, {DATA[stored['dataset']]}, {size} px"


def searched_beside_uniform(front: pd.DataFrame, level: float) -> pd.DataFrame:
    """Test top-1 of the greedy search and of the best uniform bits at one budget, a row per seed.

    `front`: rows of the study "front" of 04_search. `level`: of the budget. The uniform bits are
    the best on the search split within the budget. Columns: `budget_g`, `searched`, `uniform`, and
    `uniform_g`, the BitOPs of the uniform bits.
    """
    rows = []
    for seed, part in front.groupby("seed"):
        found = part[(part["arm"] == "greedy") & (part["level"] == level)].squeeze()
        uniform = part[(part["arm"] == "uniform") & (part["bitops_g"] <= found["budget_g"])]
        best = uniform.loc[uniform["search_top1"].idxmax()]
        top1 = {"searched": found["top1"], "uniform": best["top1"]}
        costs = {"budget_g": found["budget_g"], "uniform_g": best["bitops_g"]}
        rows.append({"seed": seed} | costs | top1)
    return pd.DataFrame(rows)


def _compared(rows: pd.DataFrame) -> tuple[str, str]:
    """The cells of the searched policy and of uniform bits, from one row per seed."""
    searched, uniform = rows["searched"].mean(), rows["uniform"].mean()
    costs = dict.fromkeys(f"{cost:.3g}" for cost in sorted(rows["uniform_g"]))
    beside = f"{uniform:.1f} (at {' or '.join(costs)} G)"
    if len(rows) == 1:
        return f"{searched:.1f}", beside
    gain = t_interval(rows["searched"] - rows["uniform"])
    return f"{searched:.1f} ({gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}])", beside


def _seeds(count: int, folders: list[Path]) -> str:
    number = f"{count} seeds" if count > 1 else "1 seed"
    return f"{number}, earlier rules" if any(map(has_earlier_rules, folders)) else number


def _searched_cells(folder: Path, level: float) -> list[str]:
    """One row of the table, from a run of 04_search."""
    metrics = pd.read_csv(folder / "metrics.csv")
    rows = searched_beside_uniform(metrics[metrics["study"] == "front"], level)
    budget = f"{rows['budget_g'].iloc[0]:.3g}"
    seeds = _seeds(len(rows), [folder])
    return [_named(folder), budget, *_compared(rows), "not measured", seeds]


def _trained_cells(folders: list[Path]) -> list[str]:
    """One row of the table, from runs of 03_train that differ in their seeds alone.

    Uniform bits are the best on the search split within the budget, in each run.
    """
    found = [json.loads((folder / "result.json").read_text()) for folder in folders]
    budget, rows = found[0]["bitops_budget_g"], []
    for run in found:
        within = [row for row in run["uniform"] if row["bitops_g"] <= budget]
        best = max(within, key=lambda row: row["search_top1"])
        top1 = {"searched": run["searched"]["top1"], "uniform": best["top1"]}
        rows.append({"uniform_g": best["bitops_g"]} | top1)
    return [
        _named(folders[0]),
        f"{budget:.3g}",
        *_compared(pd.DataFrame(rows)),
        f"{mean(run['top1_float'] for run in found):.1f}",
        _seeds(len(found), folders),
    ]


def results_table(results: Path) -> str:
    """Searched policies beside uniform bits and the float network, as Markdown.

    In parentheses: searched minus uniform, paired by seed, with its 95% t-interval. The runs of
    03_train with other seeds lie beside the first one, as digits_seed1 and so on.
    """
    rows = [_trained_cells(sorted((results / "03_train").glob("digits*")))]
    rows += [_searched_cells(results / "04_search" / run, level) for run, level in SHOWN.items()]
    return markdown_table(RESULT_HEADS, rows)
