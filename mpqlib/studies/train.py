"""Compare a searched policy with uniform configurations and with the float network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from ..network.bits import Bits
from ..network.cost import bitops, model_size
from ..network.supernet import LayerInfo
from ..report.tables import markdown_table, show_markdown

if TYPE_CHECKING:
    from IPython.display import Markdown

COLUMNS = "configuration", "BitOPs (G)", "size (MB)", "test top-1 (%)", "95%", "search top-1 (%)"


def beside_float(
    rows: Sequence[Mapping], float_top1: Mapping, table: Sequence[LayerInfo]
) -> pd.DataFrame:
    """The float network's row, with 32 bits in every layer, above `rows` of `runs.measure`."""
    in_float = {info.name: Bits(32, 32) for info in table}
    bitops_g, size_mb = bitops(table, in_float) / 1e9, model_size(table, in_float) / 1e6
    costs = {"bitops_g": bitops_g, "size_mb": size_mb}
    return pd.DataFrame([{"configuration": "float", **costs, **float_top1}, *rows])


def comparison_table(metrics: pd.DataFrame) -> Markdown:
    """The comparison as a table. Values that depend on the processor follow an \u2248 sign."""
    rows = []
    for row in metrics.to_dict("records"):
        about = "\u2248 " if row["configuration"] == "searched" else ""
        cells = [
            row["configuration"],
            f"{about}{row['bitops_g']:.3f}",
            f"{about}{row['size_mb']:.2f}",
            f"\u2248 {row['top1']:.1f}",
            f"\u2248 [{row['top1_low']:.1f}, {row['top1_high']:.1f}]",
            "" if pd.isna(row["search_top1"]) else f"\u2248 {row['search_top1']:.1f}",
        ]
        rows.append(cells)
    return show_markdown(markdown_table(COLUMNS, rows))


def best_within(metrics: pd.DataFrame, budget: float, kind: str = "") -> str | None:
    """Name of the configuration within `budget` (G) that is best on the search split, or None.

    Compares top-1, then loss. `kind`: consider only names that start with it, such as "uniform".
    """
    fits = metrics["configuration"].str.startswith(kind) & (metrics["bitops_g"] <= budget)
    fits &= metrics["search_top1"].notna()  # the float network is no policy
    ranked = metrics[fits].sort_values(["search_top1", "search_loss"], ascending=[False, True])
    return None if ranked.empty else ranked.iloc[0]["configuration"]


def verdict(metrics: pd.DataFrame, budget: float) -> str:
    """Compare the searched policy with the best uniform configuration within `budget` (G)."""
    best = best_within(metrics, budget, "uniform")
    if best is None:
        return f"No uniform configuration is within {budget} G: there is none to compare with."
    rows = metrics.set_index("configuration")
    found, uniform = rows.loc["searched"], rows.loc[best]
    search, test = (found[key] - uniform[key] for key in ("search_top1", "top1"))
    apart = found["top1_low"] > uniform["top1_high"] or uniform["top1_low"] > found["top1_high"]
    return (
        f"Of the uniform configurations within {budget} G, {best} is best on the search split."
        f" It costs {uniform['bitops_g']:.3f} G.\n"
        f"The searched configuration costs {found['bitops_g']:.3f} G. Its top-1 differs by"
        f" {search:+.1f} points on the search split and by {test:+.1f} points on the test split."
        f" There, the 95% intervals {'do not overlap' if apart else 'overlap'}.\n"
        f"The policy is the best configuration on the search split: {best_within(metrics, budget)}."
    )


def result(metrics: pd.DataFrame, budget: float, seed: int, seconds: float) -> dict:
    """Contents of result.json: values of the policy and of all configurations beside it.

    `budget`: G BitOPs. `seconds`: wall time. Raises ValueError if nothing is within `budget`.
    """
    rows = {row["configuration"]: row for row in metrics.to_dict("records")}
    chosen = best_within(metrics, budget)
    if chosen is None:
        raise ValueError(f"budget={budget} G is not allowed: every configuration costs more")
    return {
        "bitops_budget_g": budget,
        **rows[chosen],
        "top1_float": rows["float"]["top1"],
        "searched": rows["searched"],
        "uniform": [row for name, row in rows.items() if name.startswith("uniform")],
        "seed": seed,
        "seconds": round(seconds, 1),
    }
