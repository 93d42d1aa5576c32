"""Plots of a run. A bit-width has the same colour in all of them."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..network.bits import LARGEST, SMALLEST, BitConfig
from ..network.cost import bitops, layer_bitops
from ..network.quantizer import BINARY, TERNARY
from ..network.supernet import LayerInfo

# viridis is ordered like bit-widths, and colour-blind people can read it. Above 8 bits, differences
# are small: these bit-widths share one colour.
_VIRIDIS = sns.color_palette("viridis", 7)
COLOURS = {bits: _VIRIDIS[min(bits, 8) - SMALLEST] for bits in range(SMALLEST, LARGEST + 1)}
# Weights of two or three values are no steps of that scale.
COLOURS |= dict(zip((BINARY, TERNARY), sns.color_palette("rocket_r", 6)[1:4:2], strict=True))
ARM_COLOURS = sns.color_palette("colorblind")[1:]  # none is a colour of a bit-width


def training_curves(histories: Mapping[str, Sequence[Mapping]]) -> Figure:
    """Loss (nats) and top-1 (%) on training images over epochs.

    `histories`: the history that `train` returns, by name of the phase, such as "float".
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for phase, history in histories.items():
        rows = pd.DataFrame(list(history))
        for suffix, line in (("", "-"), ("_random", "--")):
            if f"accuracy{suffix}" in rows:
                name = phase + (", random bits" if suffix else "")
                style = dict(linestyle=line, marker="o", label=name)
                axes[0].plot(rows["epoch"], rows[f"loss{suffix}"], **style)
                axes[1].plot(rows["epoch"], 100 * rows[f"accuracy{suffix}"], **style)
    axes[0].set(xlabel="epoch", ylabel="training loss (nats)")
    axes[1].set(xlabel="epoch", ylabel="training top-1 (%)")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(frameon=False)
    return figure


def turbulence_map(history: Sequence[Mapping]) -> Figure:
    """Turbulence of each layer at each decision of the scheduler; dots mark frozen layers.

    `history`: of a supernet, from `train`.
    """
    decisions = [decision for row in history for decision in row["decisions"]]
    values = pd.DataFrame([decision["turbulence"] for decision in decisions]).T
    size = (max(5, 3 + 0.12 * len(decisions)), 1.4 + 0.22 * len(values))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    labels = dict(xlabel="training step (dot: smallest weight bit-width frozen)", ylabel="layer")
    if values.empty:
        axis.set(**labels, title="no decision of the scheduler")
        return figure
    bar = {"label": "turbulence (unstable share / bits)"}
    sns.heatmap(values, cmap="mako_r", cbar_kws=bar, ax=axis)
    frozen = np.array([[name in d["frozen"] for d in decisions] for name in values.index])
    rows, columns = frozen.nonzero()
    axis.plot(columns + 0.5, rows + 0.5, "o", color="C1", markersize=4)
    every = max(1, len(decisions) // 8)
    steps = [decision["step"] for decision in decisions[::every]]
    axis.set_xticks(np.arange(len(decisions))[::every] + 0.5, steps, rotation=0)
    axis.set_yticks(np.arange(len(values)) + 0.5, values.index, rotation=0)
    axis.set(**labels)
    return figure


def policy_bits(table: Sequence[LayerInfo], config: BitConfig) -> Figure:
    """Weight bits, activation bits and share of all BitOPs of each layer.

    `table`: of the supernet. `config`: bits of its layers.
    """
    names = [info.name for info in table]
    total = bitops(table, config)
    share = [100 * layer_bitops(info, config[info.name]) / total for info in table]
    rows = {
        "weight bits": [config[name].weight for name in names],
        "activation bits": [config[name].act for name in names],
    }
    size = (max(6, 1 + 0.33 * len(names)), 6.6)
    figure, axes = plt.subplots(3, 1, figsize=size, sharex=True, layout="constrained")
    for axis, (label, bits) in zip(axes[:2], rows.items(), strict=True):
        axis.bar(names, bits, color=[COLOURS[b] for b in bits])
        axis.set(ylabel=label, ylim=(0, 10), yticks=range(0, 9, 2))
        axis.bar_label(axis.containers[0], fontsize=8)
    axes[2].bar(names, share, color="0.55")
    axes[2].set(ylabel="BitOPs (%)", xlabel="layer, from input to output")
    axes[2].tick_params(axis="x", rotation=90)
    used = sorted({b for bits in rows.values() for b in bits})
    handles = [Patch(color=COLOURS[b], label=f"{b} bits") for b in used]
    figure.legend(handles=handles, ncols=len(used), loc="outside upper center", frameon=False)
    return figure


def accuracy_over_cost(rows: pd.DataFrame, budget: float) -> Figure:
    """Test top-1 (%) with its 95% interval over BitOPs (G per image).

    `rows`: from `runs.measure`, with a column `configuration`, such as "searched" or "uniform 3",
    and one row "float". `budget`: in G, drawn as a line.
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


def policies_plot(configs: Mapping[str, BitConfig], label: str) -> Figure:
    """Bits of each layer in several policies, weights on the left and activations on the right.

    `configs`: the policies by the text under their column, such as the budget. `label`: says what
    that text is.
    """
    names = list(next(iter(configs.values())))
    size = (max(7, 2.5 + 0.8 * len(configs)), 1.4 + 0.24 * len(names))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axis, part in zip(axes, ("weight", "act"), strict=True):
        bits = pd.DataFrame(
            {text: [getattr(config[n], part) for n in names] for text, config in configs.items()},
            index=names,
        )
        # One colour for each bit-width of the range; those above 8 share the last one.
        colours = [COLOURS[b] for b in range(SMALLEST, 9)]
        style = dict(cmap=colours, vmin=SMALLEST - 0.5, vmax=8.5, cbar=False, linewidths=0.5)
        sns.heatmap(bits, annot=True, annot_kws={"fontsize": 7}, ax=axis, **style)
        title = "weight bits" if part == "weight" else "activation bits"
        axis.set(title=title, xlabel=label, ylabel="layer" if part == "weight" else "")
        axis.tick_params(axis="both", labelsize=8)
    return figure


def differences_plot(
    differences: pd.DataFrame,
    rows: str,
    label: str,
    colours: str | None = None,
    axis: Axes | None = None,
) -> Figure:
    """Paired differences with their 95% intervals, in the order given, the first on top.

    `differences`: from `claims.differences`. `rows`: the column whose entries name the rows.
    `colours`: the column whose entries get one colour each, such as "compared"; None: one colour.
    `label`: of the horizontal axis. `axis`: where to draw; None makes a figure.
    """
    names = list(differences[rows].unique())
    groups = {"": differences}
    if colours is not None:
        groups = dict(list(differences.groupby(colours, sort=False)))
    height = 1.1 + 0.3 * len(names) * max(1, 0.6 * len(groups))
    if axis is None:
        axis = plt.subplots(figsize=(7, height), layout="constrained")[1]
    for i, (name, part) in enumerate(groups.items()):
        shift = 0.2 * (i - (len(groups) - 1) / 2)  # so that colours lie side by side
        places = [names.index(entry) + shift for entry in part[rows]]
        spread = [part["difference"] - part["low"], part["high"] - part["difference"]]
        style = dict(fmt="o", capsize=3, color=ARM_COLOURS[i % len(ARM_COLOURS)], label=name)
        axis.errorbar(part["difference"], places, xerr=spread, **style)
    axis.axvline(0, color="0.6", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel=label, ylabel=rows, ylim=(len(names) - 0.5, -0.5))
    axis.locator_params(axis="x", nbins=6)
    if colours is not None:
        axis.figure.legend(frameon=False, ncols=len(groups), loc="outside upper center")
    return axis.figure
