"""A searched policy beside the uniform ones and the float network: table, verdict, result."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from IPython.display import Markdown

from ..network.bits import Bits
from ..network.cost import bitops, model_size
from ..network.supernet import LayerInfo


def beside_float(
    rows: Sequence[Mapping], float_top1: Mapping, table: Sequence[LayerInfo]
) -> pd.DataFrame:
    """Rows of `report.measure` below the float network, which counts 32 bits everywhere."""
    in_float = {info.name: Bits(32, 32) for info in table}
    bitops_g, size_mb = bitops(table, in_float) / 1e9, model_size(table, in_float) / 1e6
    costs = {"bitops_g": bitops_g, "size_mb": size_mb}
    return pd.DataFrame([{"configuration": "float", **costs, **float_top1}, *rows])


def comparison_table(metrics: pd.DataFrame) -> Markdown:
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
