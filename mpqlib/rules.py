"""Which rule of the greedy search is best: its parts, one at a time and together."""

from collections.abc import Mapping, Sequence
from functools import cache

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .cost import bitops_at
from .search import batch_error, greedy
from .supernet import Supernet


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Share of images that are classified wrongly: a score in the place of cross-entropy."""
    return (logits.argmax(1) != y).float().mean()


# Options of `greedy`; `score`: "top-1" in the place of the loss; `images`: share of those at hand.
VARIANTS: dict[str, dict] = {
    "paper": {},
    "paper, no moves up": dict(up=False),
    "paper, jointly": dict(weights_first=False),
    "paper, jointly, no moves up": dict(up=False, weights_first=False),
    "ratio": dict(rule="ratio"),
    "ratio, no moves up": dict(rule="ratio", up=False),
    "ratio, jointly, no moves up": dict(rule="ratio", up=False, weights_first=False),
    "paper, by top-1": dict(score="top-1"),
    "paper, half of the images": dict(images=0.5),
    "ratio, jointly, no moves up, half of the images": dict(
        rule="ratio", up=False, weights_first=False, images=0.5
    ),
}


def judged(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    images: int,
    levels: Sequence[float],
    variants: Mapping[str, Mapping],
) -> list[dict]:
    """What each variant finds on the first `images` of x (N, C, H, W), y (N), at each level: rows.

    `judged`: the cross-entropy on the other images, which no search has seen; `evaluations`: how
    many configurations it took. Levels as in `bitops_at`; `variants`: some of VARIANTS.
    """
    judge, rows = batch_error(supernet, x[images:], y[images:]), []
    for name, variant in variants.items():
        options = dict(variant)
        loss = {"loss": torch.nn.functional.cross_entropy, "top-1": wrong}[
            options.pop("score", "loss")
        ]
        n = round(images * options.pop("images", 1))
        error = cache(batch_error(supernet, x[:n], y[:n], loss))
        for level in levels:
            asked = cache(error)  # the levels share what they ask, and are counted one by one
            step = greedy(supernet, asked, bitops_at(supernet.table, level), **options)[-1]
            found = {"judged": judge(step.config), "evaluations": asked.cache_info().currsize}
            rows.append({"arm": name, "level": level, **found})
    return rows


def differences_plot(differences: pd.DataFrame, base: str, label: str) -> Figure:
    """Paired differences of all variants from `base` with their 95% intervals, best on top.

    `differences`: rows of `claims.differences`; `label`: of what is compared, less is better.
    """
    rows = differences.sort_values("difference", ascending=False)
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.36 * len(rows)), layout="constrained")
    spread = [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
    axis.errorbar(rows["difference"], rows["compared"], xerr=spread, fmt="o", capsize=3, color="C0")
    axis.axvline(0, color="0.6", linewidth=1)
    axis.set(xlabel=f"{label}, less that of the rule {base!r}", ylabel="rule")
    return figure
