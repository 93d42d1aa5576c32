"""Compare greedy search with assignment, random and evolutionary search, and its own rules."""

import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from io import BytesIO

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data import Splits
from ..models import create
from ..network.bits import BitConfig
from ..network.cost import bitops, bitops_at
from ..network.supernet import Supernet
from ..report.intervals import t_interval
from ..report.plots import COLOURS
from ..report.runs import measure
from ..search.assignment import assignment, front
from ..search.baselines import best_step, evaluate_all, evolution, random_search, restrict
from ..search.error import Error, batch_error
from ..search.greedy import greedy
from ..search.limits import check_limits
from ..search.moves import BIT_WIDTHS, Step
from ..search.sensitivity import Sensitivity
from ..training.evaluation import batch_norms, batch_statistics
from ..training.step import in_float32
from .parameters import (
    BITS,
    LEVELS,
    WIDTH,
    check_parameters,
    check_subset,
    entries,
    items,
    number,
    one_of,
    optional,
    whole,
)
from .scheduler_ablation import Study


def top1_error(logits: Tensor, y: Tensor) -> Tensor:
    """Share of images that are classified wrongly, 0 to 1: a search error other than the loss.

    `logits`: (N, classes). `y`: labels (N).
    """
    return (logits.argmax(1) != y).float().mean()


# Options of `greedy`, or of the `search` that is named. `score`: "top-1" minimises `top1_error` in
# the place of the cross-entropy. `images`: share of the images to score on.
VARIANTS: dict[str, dict] = {
    "paper": dict(rule="paper"),
    "paper, no moves up": dict(rule="paper", up=False),
    "paper, jointly": dict(rule="paper", weights_first=False),
    "paper, jointly, no moves up": dict(rule="paper", up=False, weights_first=False),
    "ratio": dict(),
    "ratio, no moves up": dict(up=False),
    "ratio, jointly": dict(weights_first=False),
    "ratio, jointly, no moves up": dict(up=False, weights_first=False),
    "paper, by top-1": dict(rule="paper", score="top-1"),
    "paper, half of the images": dict(rule="paper", images=0.5),
    "ratio, half of the images": dict(images=0.5),
    "assignment": dict(search=assignment),
    "assignment, not smoothed": dict(search=assignment, smooth=False),
    "assignment, pairs": dict(search=assignment, smooth=False, pairs="neighbours"),
    "assignment, rounds": dict(search=assignment, rounds=3),
}


def run_variant(
    supernet: Supernet, x: Tensor, y: Tensor, levels: Sequence[float], variant: Mapping
) -> list[tuple[float, BitConfig, int]]:
    """Searches at each level; returns level, configuration and number of evaluations.

    `x`: images (N, C, H, W). `y`: labels (N). `levels`: budgets, as in `bitops_at`. `variant`: one
    of VARIANTS.
    """
    options, found = dict(variant), []
    search = options.pop("search", greedy)
    loss = {"loss": cross_entropy, "top-1": top1_error}[options.pop("score", "loss")]
    n = round(len(y) * options.pop("images", 1))
    error = cache(batch_error(supernet, x[:n], y[:n], loss))
    for level in levels:
        # Levels share their evaluations, but each counts all that it asks for.
        asked = cache(error)
        step = search(supernet, asked, bitops_at(supernet.table, level), **options)[-1]
        found.append((level, step.config, asked.cache_info().currsize))
    return found


def compare_rules(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    images: int,
    batches: int,
    levels: Sequence[float],
    variants: Mapping[str, Mapping],
) -> list[dict]:
    """Searches by each variant on each of several batches; returns one row per search.

    `x`: images (N, C, H, W). `y`: labels (N). `images`: number of images in a batch. `batches`: use
    the first ones. `levels`: budgets, as in `bitops_at`. `variants`: some of VARIANTS. Column
    `judged`: cross-entropy in nats on all images outside of the batch, which the search has not
    seen. Column `evaluations`: number of configurations that the search evaluated. Raises
    ValueError if there are too few images for the batches, or none is left to judge by.
    """
    if batches * images > len(y) or images == len(y):
        raise ValueError(
            f"images={images}, batches={batches} are not allowed: there are {len(y)} images, and"
            " some must lie outside of each batch"
        )
    rows = []
    for batch in range(batches):
        seen = (torch.arange(len(y), device=y.device) // images) == batch
        judge = batch_error(supernet, x[~seen], y[~seen])
        for name, variant in variants.items():
            for level, config, count in run_variant(supernet, x[seen], y[seen], levels, variant):
                found = {"judged": judge(config), "evaluations": count}
                rows.append({"arm": name, "level": level, "batch": batch, **found})
    return rows


SEARCH_RULES = {
    "other_levels": items(number(1), least=0),
    "top1_levels": optional(items(number(1), least=0)),
    "few": entries(layers=whole(1), bits=BITS, rest=WIDTH),
    "timed": entries(front=items(whole(0), least=0), literal=items(whole(0), least=0)),
    "rules": entries(variants=items(one_of(VARIANTS), least=0), levels=LEVELS, batches=whole(1)),
}


def check_searches(
    study: Study,
    *,
    seeds: Sequence[int],
    other_levels: Sequence[float],
    top1_levels: Sequence[float] | None,
    few: Mapping,
    timed: Mapping[str, Sequence[int]],
    rules: Mapping,
) -> None:
    """Raises ValueError, before any training, for parameters that do not fit together.

    `study`: trains the supernets; its setting holds the other parameters. The parameters must keep
    SEARCH_RULES.
    """
    setting, images = study.setting, len(study.splits.search)
    check_subset("other_levels", other_levels, setting.levels)
    check_subset("top1_levels", top1_levels or [], setting.levels)
    check_subset("timed", [*timed["front"], *timed["literal"]], seeds)
    check_parameters({"search_images": whole(1, images - 1)}, search_images=setting.search_images)
    if rules["batches"] * setting.search_images > images:
        raise ValueError(
            f"rules={rules!r} is not allowed: {rules['batches']} batches of {setting.search_images}"
            f" images, there are {images}"
        )
    network = create(setting.model, len(study.splits.classes)).to(study.device)
    supernet = study.build_supernet(network, "both")
    try:
        small = restrict(supernet, **few)
        check_limits(small, bitops_at(small.table, few["rest"] - 0.3))
    except ValueError as error:
        raise ValueError(f"few={few!r} is not allowed: {error}") from error
    # The lowest levels that are searched; fronts are timed from 2.25 bits on.
    lowest = {"levels": min(setting.levels), "rules": min(rules["levels"]), "bits": 2.25}
    for name, level in lowest.items():
        try:
            check_limits(supernet, bitops_at(supernet.table, level))
        except ValueError as error:
            raise ValueError(f"{name}: level {level} is not allowed: {error}") from error


def literal_error(supernet: Supernet, x: Tensor, y: Tensor):
    """Returns the error of `batch_error`, computed by a whole pass for each configuration."""
    norms = batch_norms(supernet.eval())

    @torch.inference_mode()
    def error(config: BitConfig) -> float:
        with batch_statistics(norms):
            return float(cross_entropy(in_float32(supernet(x, config)), y))

    return error


class CountedError:
    """An error that counts how often it is asked."""

    def __init__(self, error: Error):
        self.error, self.passes = error, 0

    def __call__(self, config: BitConfig) -> float:
        self.passes += 1
        return self.error(config)


# Searches that `time_search` times. "literal" is RFQuant's rule as the paper states it, with a
# whole pass for each move at each step.
TIMED = {"greedy": greedy, "literal": partial(greedy, rule="paper", exact=True)}


def time_search(
    supernet: Supernet, x: Tensor, y: Tensor, level: float, arm: str
) -> tuple[BitConfig, dict[str, float]]:
    """Searches once; returns the configuration, its error, and seconds, passes and steps taken.

    `level`: budget, as in `bitops_at`. `arm`: one of TIMED.
    """
    if arm not in TIMED:
        raise ValueError(f"arm={arm!r} is not allowed: one of {list(TIMED)}")
    error = CountedError((literal_error if arm == "literal" else batch_error)(supernet, x, y))
    start = time.perf_counter()
    path = TIMED[arm](supernet, error, bitops_at(supernet.table, level))
    costs = dict(seconds=time.perf_counter() - start, passes=error.passes, steps=len(path) - 1)
    return path[-1].config, {"error": path[-1].error} | costs


def time_front(
    supernet: Supernet, x: Tensor, y: Tensor, levels: Sequence[float]
) -> tuple[list[BitConfig], dict[str, float]]:
    """Assigns bits at all levels from one table; returns configurations, seconds and passes.

    `levels`: budgets, as in `bitops_at`. Seconds and passes are of the table and all levels.
    """
    error, start = CountedError(batch_error(supernet, x, y)), time.perf_counter()
    steps = front(supernet, error, [bitops_at(supernet.table, level) for level in levels])
    costs = dict(seconds=time.perf_counter() - start, passes=error.passes)
    return [step.config for step in steps], costs


def time_searches(
    supernet: Supernet, x: Tensor, y: Tensor, images: int, levels: Sequence[float], arm: str
) -> list[dict]:
    """Times a search on the first `images` of x, y at each level; returns one row each.

    `x`: images (N, C, H, W). `y`: labels (N). `arm`: one of TIMED. Column `budgets`: number of
    budgets that the time is for. Column `judged`: cross-entropy in nats on all other images, if
    there are any.
    """
    seen, rows = slice(images), []
    judge = batch_error(supernet, x[images:], y[images:]) if images < len(y) else None
    for level in levels:
        config, found = time_search(supernet, x[seen], y[seen], level, arm)
        judged = {"judged": judge(config)} if judge else {}
        rows.append({"arm": arm, "level": level, "budgets": 1, **found, **judged})
    return rows


def compare_speed(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    images: int,
    levels: Sequence[float],
    front_levels: Sequence[float],
) -> list[dict]:
    """Times greedy searches as `time_searches` does, and a front; returns one row each.

    Arm "front" assigns bits at all `front_levels` from one table.
    """
    _, costs = time_front(supernet, x[:images], y[:images], front_levels)
    rows = time_searches(supernet, x, y, images, levels, "greedy")
    return [*rows, {"arm": "front", "budgets": len(front_levels), **costs}]


SEARCHES = ("assignment", "greedy", "paper", "random", "evolution")


def run_searches(
    supernet: Supernet,
    error: Error,
    levels: Sequence[float],
    options: Mapping,
    seed: int,
    arms: Sequence[str] = SEARCHES,
) -> Iterator[tuple[str, float, Step, int]]:
    """Runs searches at each level; yields arm, level, result and number of evaluations.

    "assignment" solves all levels from one table; its number is for all of them together. "greedy"
    is that of `options`, "paper" has RFQuant's rule. "random" and "evolution" have as many
    evaluations as "greedy" needs at this level. `levels`: budgets, as in `bitops_at`. `arms`: some
    of SEARCHES.
    """
    budgets = {level: bitops_at(supernet.table, level) for level in levels}
    if "assignment" in arms:
        asked = cache(error)
        steps = front(supernet, asked, budgets.values())
        for level, step in zip(levels, steps, strict=True):
            yield "assignment", level, step, asked.cache_info().currsize
    for level, budget in budgets.items():
        counts = {}
        for arm, rule in {"greedy": options, "paper": {"rule": "paper"}}.items():
            if arm in arms or arm == "greedy":  # the others need the number of greedy
                asked = cache(error)
                step = greedy(supernet, asked, budget, **rule)[-1]
                counts[arm] = asked.cache_info().currsize
                if arm in arms:
                    yield arm, level, step, counts[arm]
        for arm, search in {"random": random_search, "evolution": evolution}.items():
            if arm in arms:
                generator = torch.Generator().manual_seed(seed)
                count = counts["greedy"]
                yield arm, level, search(supernet, error, budget, count, generator), count


def measure_front(
    supernet: Supernet,
    x: Tensor,
    y: Tensor,
    images: int,
    levels: Sequence[float],
    splits: Splits,
    options: Mapping,
    seed: int,
    *,
    arms: Sequence[str] = ("uniform", *SEARCHES),
    top1: Sequence[float] | None = None,
    device: torch.device,
    recalibration_images: int,
) -> list[dict]:
    """Measures what each search finds at each level, and the uniform configurations: one row each.

    `x`: images of the search split (N, C, H, W). `y`: labels (N). The searches score on the first
    `images`; column `judged` is the cross-entropy in nats on all others, which no search has seen.
    `levels`: budgets, as in `bitops_at`. `options`: of `greedy`. `arms`: some of SEARCHES and
    "uniform". `top1`: levels at which accuracy is measured as well; None: all. Uniform bits above
    the largest of them are left out.
    """
    error = cache(batch_error(supernet, x[:images], y[:images]))  # paths have much in common
    judge = batch_error(supernet, x[images:], y[images:])
    top1 = levels if top1 is None else top1

    def measure_row(arm: str, level: float, config: BitConfig, evaluations: int) -> dict:
        how = dict(images=recalibration_images, device=device)
        exact = arm == "uniform" or level in top1
        costs = measure(supernet, config, splits, **how) if exact else {}
        return {
            "arm": arm,
            "level": level,
            "budget_g": bitops_at(supernet.table, level) / 1e9,
            "bitops_g": bitops(supernet.table, config) / 1e9,
            **costs,
            "bits": config.to_json(),
            "error": error(config),
            "judged": judge(config),
            "evaluations": evaluations,
        }

    searchable = [c.weight for c in supernet.candidates.values() if len(c.weight) > 1]
    widths = sorted({b for choices in searchable for b in choices if b <= max(top1, default=0)})
    found = run_searches(supernet, error, levels, options, seed, arms)
    found = [(arm, level, step.config, count) for arm, level, step, count in found]
    uniform = [("uniform", b, supernet.uniform(b), 0) for b in widths if "uniform" in arms]
    return [measure_row(*row) for row in uniform + found]


def measure_regret(
    supernet: Supernet, error: Error, levels: Sequence[float], options: Mapping, seed: int
) -> list[dict]:
    """Measures how far each search ends above the lowest error; returns one row per search.

    `supernet`: with few configurations, such as from `restrict`. `levels`: budgets, as in
    `bitops_at`. `options`: of `greedy`. Column `of`: number of all configurations.
    """
    error, rows = cache(error), []
    everything = evaluate_all(supernet, error)
    budgets = {level: bitops_at(supernet.table, level) for level in levels}
    optimum = {level: best_step(supernet, everything, b) for level, b in budgets.items()}
    for arm, level, step, count in run_searches(supernet, error, levels, options, seed):
        regret = {"regret": step.error - optimum[level].error, "evaluations": count}
        rows.append({"arm": arm, "level": level, **regret, "of": len(everything)})
    return rows


def front_plot(rows: pd.DataFrame, value: str, label: str) -> Figure:
    """Draws a value over BitOPs, one line per search: means over seeds with 95% t-intervals.

    `rows`: with columns `arm`, `seed`, `budget_g` (G BitOPs per image) and `value`. `label`:
    describes the value. Rows without the value are left out.
    """
    rows = rows.dropna(subset=[value])
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    arms = list(rows["arm"].unique())
    colours = sns.color_palette("colorblind", len(arms))
    for i, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
        groups = rows[rows["arm"] == arm].groupby("budget_g")[value]
        points = pd.DataFrame([t_interval(v) for _, v in groups], index=list(groups.groups))
        places = points.index * (1 + 0.004 * (i - len(arms) / 2))  # searches side by side
        half = (points["high"] - points["mean"]).fillna(0)  # one seed has no interval
        style = dict(color=colour, marker="osD^v"[i % 5], capsize=2, label=arm)
        line = "" if arm == "uniform" else "-"
        axis.errorbar(places, points["mean"], half, linestyle=line, **style)
    axis.set(xlabel="budget (G BitOPs per image, log scale)", ylabel=label, xscale="log")
    ticks = sorted(rows.loc[rows["arm"] != "uniform", "budget_g"].unique())
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.legend(frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file with 60 pixels per inch."""
    figure.savefig(file := BytesIO(), dpi=60)
    return file.getvalue()


def slider(figures: Mapping[str, Figure], label: str) -> str:
    """Shows one of several figures, chosen with a slider that needs no kernel: HTML for a notebook.

    `figures`: by the text that names each, such as the budget. `label`: says what that text is.
    """
    pages = [
        f"<figure{' hidden' if i else ''}><figcaption>{label}: {text}</figcaption>"
        f'<img src="data:image/png;base64,{b64encode(png(figure)).decode()}"></figure>'
        for i, (text, figure) in enumerate(figures.items())
    ]
    show = (
        "this.parentNode.querySelectorAll('figure').forEach((f, i) => f.hidden = i != this.value)"
    )
    bar = f'<input type="range" min="0" max="{len(pages) - 1}" value="0" oninput="{show}">'
    return f"<div>{bar}{''.join(pages)}</div>"


def sensitivity_plot(table: Sensitivity) -> Figure:
    """Draws how the error changes when one layer's bits change: weights above, activations below.

    `table`: from `measure_sensitivity`. Layers in which all changes are missing have no choice.
    """
    rows = table.to_frame()
    rows = rows[rows["other_layer"].isna()] if "other_layer" in rows else rows
    names = list(table.base)
    size = (max(6, 1 + 0.33 * len(names)), 6)
    figure, axes = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    widths = sorted(rows.loc[rows["bits"] != rows["base_bits"], "bits"].unique())
    for axis, part, what in zip(axes, BIT_WIDTHS, ("weights", "activations"), strict=True):
        for i, bits in enumerate(widths):
            chosen = rows[(rows["part"] == part) & (rows["bits"] == bits)]
            chosen = chosen[chosen["bits"] != chosen["base_bits"]]
            shift = 0.15 * (i - (len(widths) - 1) / 2)  # bit-widths side by side
            places = [names.index(name) + shift for name in chosen["layer"]]
            axis.plot(places, chosen["change"], "o", color=COLOURS[bits], label=f"{bits} bits")
        axis.axhline(0, color="0.6", linewidth=1)
        axis.set(ylabel=f"change of the error\n(nats), {what}")
        axis.set_yscale("symlog", linthresh=0.01)
    axes[1].set_xticks(range(len(names)), names, rotation=90)
    axes[1].set_xlabel("layer, from input to output")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(widths), loc="outside upper center", frameon=False)
    return figure
