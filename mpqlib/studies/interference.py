"""Bit-width interference in a regression with two weights (RFQuant, Fig. 1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ..network.quantizer import integer_range
from ..report.claims import differences
from ..report.paper import Claim
from ..report.plots import ARM_COLOURS, COLOURS
from .parameters import OPTIONS, TRUTH, Rule, check_parameters, items, named, number, whole

MEASURED = 4  # bits of the first pass, whose gradient is measured
WEIGHT_RANGE = 1.0  # where the grids of all bit-widths end
OPTIMA = ("off the grid", "on the grid")
ARM_NAMES = {"alone": "4 bits alone", "shared": "2 bits sharing"}
STABILITY = {  # readings of "the weight is more unstable", with their units
    "spread": "spread of the weights",
    "movement": "movement of the weights per step",
    "extent": "extent of the weights",
    "distance": "distance from the optimum",
    "crossings": "crossings of 4-bit bounds per 100 steps",
}
GRADIENT = {  # readings of "the L2-normalised gradient has a larger variance"
    "direction_variance": "variance of the gradient's direction (0 to 1)",
    "norm_variance": "variance of the gradient's L2 norm",
    "gradient_variance": "variance of the raw gradient",
}
READINGS = STABILITY | GRADIENT
PRIMARY = ("spread", "direction_variance")
ARM_STYLE = {"alone": ARM_COLOURS[-1], "shared": ARM_COLOURS[2]}
SIGN_COLOURS = {
    "\u25bc falls": ARM_COLOURS[0],
    "? interval holds zero": "0.92",
    "\u25b2 rises, as claimed": ARM_COLOURS[-1],
}


SECOND_PASS = items(whole(2, 8), least=0)
BELOW_1 = Rule("a number from 0, below 1", lambda value: number(0).holds(value) and value < 1)
POSITIVE = Rule("a number above 0", lambda value: number(0).holds(value) and value > 0)
SETTINGS = {
    "seeds": whole(1, 10_000),
    "steps": whole(4, 10_000_000),
    "batch": whole(1, 1_000_000),
    "full_batch": TRUTH,
    "lr": POSITIVE,
    "momentum": BELOW_1,
    "noise": number(0),
    "alone": SECOND_PASS,
    "shared": SECOND_PASS,
    "random_start": TRUTH,
}


@dataclass(frozen=True)
class Settings:
    """Settings of one experiment; raises ValueError for a value that is not allowed.

    `steps`: steps of SGD with learning rate `lr` and `momentum`; the second half is measured.
    `batch`: examples per step, new ones at each step unless `full_batch`. `noise`: standard
    deviation of the labels' noise. `alone`, `shared`: the bit-widths from which each arm draws its
    second pass, all equally likely; without any there is no second pass. `random_start`: start at
    random weights, and not at w*, where training in float ends.
    """

    steps: int = 2000
    batch: int = 32
    full_batch: bool = False
    lr: float = 0.01
    momentum: float = 0.9
    noise: float = 0.0
    alone: Sequence[int] = (4,)
    shared: Sequence[int] = (2, 4)
    random_start: bool = False

    def __post_init__(self):
        check_parameters(SETTINGS, **vars(self))


def set_ups(
    base: Settings, secondary: Mapping, variants: Mapping[str, Mapping]
) -> dict[str, Settings]:
    """All set-ups by name: `base` is "primary", and the others change it.

    `secondary`: what "full batch" changes. `variants`: name -> what else to change in `base`.
    Raises ValueError, with the parameter, for a change that Settings does not allow.
    """
    rules = {"secondary": OPTIONS, "variants": named(OPTIONS, least=0)}
    check_parameters(rules, secondary=secondary, variants=variants)
    cases = {"primary": base}
    for name, change in {"full batch": secondary, **variants}.items():
        parameter = "variants" if name in variants else "secondary"
        try:
            cases[name] = replace(base, **change)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{parameter}: {change!r} is not allowed: {error}") from error
    return cases


class Problem(NamedTuple):
    """Regression problems of several seeds and both kinds of optimum; all that is random."""

    target: Tensor  # (seeds, optima, 2): w*, which minimises the loss in float
    start: Tensor  # (seeds, optima, 2)
    A: Tensor  # (steps, seeds, 1, 2, 2): the gradient of a batch is A (w_hat - w*) - b
    b: Tensor  # (steps, seeds, 1, 2): from the labels' noise
    draws: Tensor  # (steps, seeds): from 0 to 1, each picks the bit-width of a second pass


class Trajectory(NamedTuple):
    """Values before each update, (steps, seeds, optima, 2)."""

    w: Tensor  # latent weights
    w_hat: Tensor  # quantized at the measured bit-width
    gradients: Tensor  # for w, of the measured pass only


def fixed_step(bits: int | Tensor) -> float | Tensor:
    """Step size at `bits`: range / 2^(bits - 1), so that each grid is a part of the finer ones."""
    return WEIGHT_RANGE / 2 ** (bits - 1)


def quantize_at(w: Tensor, bits: int | Tensor) -> tuple[Tensor, Tensor]:
    """Quantized weights w_hat, and dw_hat/dw (LSQ, equations 1, 2 and 5); both like `w`.

    `bits`: a tensor has a bit-width for each weight; it is broadcast. Each signed grid goes from
    -range to range - step.
    """
    step = torch.as_tensor(fixed_step(bits), dtype=w.dtype)
    low, high = torch.full_like(step, -WEIGHT_RANGE), WEIGHT_RANGE - step
    w_hat = (w.clamp(low, high) / step).round() * step
    return w_hat, ((low < w) & (w < high)).to(w.dtype)


def draw_problem(settings: Settings, seed: int) -> Problem:
    """The regression problems of one seed, without the dimension of seeds.

    y = x w* + noise, with x ~ N(0, I). Target w* and a random start have normal entries whose
    standard deviation is a third of the range, as the release's initial steps assume of weights.
    Optimum "off the grid": w* as drawn. "on the grid": the point of the 4-bit grid next to it.
    """
    generator = torch.Generator().manual_seed(seed)
    like = dict(generator=generator, dtype=torch.float64)
    target, start = WEIGHT_RANGE / 3 * torch.randn(2, 2, **like)
    draws = torch.rand(settings.steps, **like)
    batches = 1 if settings.full_batch else settings.steps
    x = torch.randn(batches, settings.batch, 2, **like)
    noise = settings.noise * torch.randn(batches, settings.batch, 1, **like)
    # The mean squared error's gradient for w_hat: 2 / batch * x^T (x (w_hat - w*) - noise)
    A, b = (2 / settings.batch * (x.mT @ right)[:, None] for right in (x, noise))
    targets = torch.stack([target, quantize_at(target, MEASURED)[0]])
    return Problem(
        targets,
        start.expand(len(OPTIMA), 2) if settings.random_start else targets,
        A.expand(settings.steps, 1, 2, 2),
        b[..., 0].expand(settings.steps, 1, 2),
        draws,
    )


def draw_problems(settings: Settings, seeds: Sequence[int]) -> Problem:
    """The problems of several seeds; raises ValueError for no seed, or the same seed twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds!r} is not allowed: at least one, none twice")
    target, start, *by_step = zip(*(draw_problem(settings, s) for s in seeds), strict=True)
    points = (torch.stack(entries) for entries in (target, start))
    return Problem(*points, *(torch.stack(entries, 1) for entries in by_step))


def pass_gradient(
    w: Tensor, bits: int | Tensor, target: Tensor, A: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantized weights of one pass, and its gradient for w, straight through the rounding."""
    w_hat, slope = quantize_at(w, bits)
    error = (w_hat - target)[..., None]  # a column, for the product with A
    return w_hat, slope * ((A @ error)[..., 0] - b)


def descend(given: Problem, settings: Settings, second_bits: Sequence[int]) -> Trajectory:
    """SGD on the latent weights of all problems: a pass at 4 bits, one drawn from `second_bits`."""
    w, velocity, rows = given.start, torch.zeros_like(given.start), []
    index = (given.draws * len(second_bits)).long()
    drawn = torch.tensor(second_bits)[index][..., None, None] if second_bits else None
    for t, (A, b) in enumerate(zip(given.A, given.b, strict=True)):
        w_hat, gradient = pass_gradient(w, MEASURED, given.target, A, b)
        rows.append((w, w_hat, gradient))
        if drawn is not None:
            gradient = gradient + pass_gradient(w, drawn[t], given.target, A, b)[1]
        velocity = settings.momentum * velocity + gradient
        w = w - settings.lr * velocity
    return Trajectory(*map(torch.stack, zip(*rows, strict=True)))


def train_arms(settings: Settings, seeds: Sequence[int]) -> tuple[Problem, dict[str, Trajectory]]:
    """Trains both arms on the same problems: the same start, batches and draws."""
    given = draw_problems(settings, seeds)
    return given, {arm: descend(given, settings, getattr(settings, arm)) for arm in ARM_NAMES}


def sum_variances(rows: Tensor) -> Tensor:
    """Sum of the variances of the two components over the steps; (steps, ..., 2) becomes (...)."""
    return rows.var(0, correction=0).sum(-1)


def direction_variance(gradients: Tensor) -> Tensor:
    """Sum of the variances of the components of g / |g|, which is 1 - |mean of g / |g||^2.

    0 if all gradients (steps, ..., 2) have one direction, 1 if they cancel out. A gradient of zero
    has no direction and is left out. Where no other gradient is left, nothing varies: 0.
    """
    norms = gradients.norm(dim=-1, keepdim=True)
    units = torch.where(norms > 0, gradients / norms, 0.0)
    count = (norms > 0).sum(0)
    mean = units.sum(0) / count.clamp(min=1)
    variance = (1 - mean.square().sum(-1)).clamp(min=0)  # rounding may leave -1e-16
    return torch.where(count[..., 0] > 0, variance, 0.0)


def count_crossings(w_hat: Tensor) -> Tensor:
    """Changes of quantized weights from one step to the next, per 100 steps.

    (steps, ..., 2) becomes (...); both weights count.
    """
    return 100 * (w_hat[1:] != w_hat[:-1]).double().mean(0).sum(-1)


def measured_half(run: Trajectory) -> Trajectory:
    """The second half of the steps."""
    return Trajectory(*(rows[len(rows) // 2 :] for rows in run))


def read(run: Trajectory, target: Tensor) -> dict[str, Tensor]:
    """All readings of the second half of the steps, (seeds, optima) each."""
    w, w_hat, gradients = measured_half(run)
    return {
        "spread": sum_variances(w).sqrt(),
        "movement": w.diff(dim=0).norm(dim=-1).mean(0),
        "extent": (w.amax(0) - w.amin(0)).norm(dim=-1),
        "distance": (w_hat - target).norm(dim=-1).mean(0),
        "crossings": count_crossings(w_hat),
        "direction_variance": direction_variance(gradients),
        "norm_variance": gradients.norm(dim=-1).var(0, correction=0),
        "gradient_variance": sum_variances(gradients),
    }


def collect_readings(cases: Mapping[str, Settings], seeds: Sequence[int]) -> pd.DataFrame:
    """All readings: a row for each set-up in `cases`, arm, kind of optimum and seed."""
    parts = []
    for setting, settings in cases.items():
        given, arms = train_arms(settings, seeds)
        for arm, run in arms.items():
            values = read(run, given.target)
            for i, optimum in enumerate(OPTIMA):
                about = dict(setting=setting, optimum=optimum, arm=arm, seed=list(seeds))
                parts.append(pd.DataFrame(about | {k: v[:, i] for k, v in values.items()}))
    return pd.concat(parts, ignore_index=True)


def reading_claims(setting: str, optimum: str) -> list[Claim]:
    """The caption's claims by all readings, in one set-up and for one kind of optimum."""
    return [
        Claim(
            f"{setting}, optimum {optimum}: {label}",
            value,
            "shared",
            "alone",
            +1,
            where={"setting": setting, "optimum": optimum},
        )
        for value, label in READINGS.items()
    ]


def typical_seed(metrics: pd.DataFrame) -> int:
    """The seed whose differences shared minus alone are nearest to the median in rank.

    Both primary readings count: the seed with the smallest sum of both distances. `metrics`: rows
    of one set-up and one kind of optimum.
    """
    table = metrics.pivot(index="seed", columns="arm", values=list(PRIMARY))
    ranks = pd.DataFrame({v: table[v, "shared"] - table[v, "alone"] for v in PRIMARY}).rank()
    return int((ranks - (len(ranks) + 1) / 2).abs().sum(axis=1).idxmin())


def typical_runs(
    settings: Settings, metrics: pd.DataFrame
) -> dict[str, tuple[Tensor, dict[str, Trajectory]]]:
    """Target and both arms of the typical seed, by kind of optimum.

    `metrics`: rows of `collect_readings` in these settings. The target is (2,). A Trajectory is
    (steps, 2) and has the second half of the steps.
    """
    found = {}
    for i, optimum in enumerate(OPTIMA):
        seed = typical_seed(metrics[metrics["optimum"] == optimum])
        given, arms = train_arms(settings, [seed])
        halves = {arm: measured_half(run) for arm, run in arms.items()}
        cut = {arm: Trajectory(*(rows[:, 0, i] for rows in run)) for arm, run in halves.items()}
        found[optimum] = given.target[0, i], cut
    return found


def draw_path(axis: Axes, arm: str, run: Trajectory, target: Tensor) -> None:
    """Draws the path of the latent weights (steps, 2), the rounding bounds and the optimum."""
    for bits in (MEASURED, 2):
        bounds = (np.arange(*integer_range(bits, signed=True)) + 0.5) * fixed_step(bits)
        style = dict(color=COLOURS[bits], linewidth=8 / bits - 1, zorder=1)
        axis.vlines(bounds, -2, 2, **style, label=f"rounding bounds, {bits} bits")
        axis.hlines(bounds, -2, 2, **style)
    style = dict(color="0", markersize=15, markeredgecolor="1", linestyle="", zorder=3)
    axis.plot(*target, "*", **style, label="optimum")
    size = 4 if run.w.diff(dim=0).any() else 40  # a single point must be seen behind the optimum
    axis.plot(*run.w.T, color=ARM_STYLE[arm], linewidth=0.5, marker=".", markersize=size)
    axis.set(xlabel="first weight (no unit)", ylabel="second weight (no unit)", aspect="equal")


def draw_directions(axis: Axes, arms: Mapping[str, Trajectory]) -> None:
    """Draws the directions of the gradients (steps, 2) on a polar axis: a ring for each arm.

    The first measured step is on the inner edge of a ring, the last one on the outer edge.
    """
    circle = torch.linspace(0, 2 * torch.pi, 200)
    for ring, (arm, run) in zip((1.0, 2.5), arms.items(), strict=True):
        colour = ARM_STYLE[arm]
        axis.fill_between(circle, ring, ring + 1, color=colour, alpha=0.15, linewidth=0)
        moving = run.gradients.norm(dim=-1) > 0
        angles = torch.atan2(run.gradients[:, 1], run.gradients[:, 0])[moving]
        radius = (ring + torch.arange(len(moving)) / len(moving))[moving]
        axis.plot(angles, radius, ".", color=colour, markersize=3)
        if not moving.any():
            axis.text(np.pi / 2, ring + 0.5, "no gradient", ha="center", va="center", fontsize=9)
    axis.set(ylim=(0, 3.5), yticks=[], xticks=np.arange(4) * np.pi / 2)
    axis.grid(False)
    axis.spines["polar"].set_visible(False)


def square_window(points: Tensor, half_width: float) -> dict[str, tuple[float, float]]:
    """Limits of an axis: a square around the middle of `points` (points, 2)."""
    middle = ((points.amax(0) + points.amin(0)) / 2).tolist()
    limits = [(value - half_width, value + half_width) for value in middle]
    return dict(zip(("xlim", "ylim"), limits, strict=True))


def draw_fig1(typical: Mapping[str, tuple[Tensor, Mapping[str, Trajectory]]]) -> Figure:
    """Paths of the weights (a), (b) and directions (c): one row for each kind of optimum.

    `typical`: from `typical_runs`. All paths have the same scale.
    """
    figure = plt.figure(figsize=(10, 7.2), layout="constrained")
    points = [torch.cat([t[None], *(r.w for r in arms.values())]) for t, arms in typical.values()]
    extents = [float((p.amax(0) - p.amin(0)).max()) for p in points]
    half_width = 0.55 * max(*extents, fixed_step(MEASURED))
    for row, (optimum, (target, arms)) in enumerate(typical.items()):
        for column, (arm, run) in enumerate(arms.items()):
            axis = figure.add_subplot(2, 3, 3 * row + column + 1)
            draw_path(axis, arm, run, target)
            spread = f"spread {float(sum_variances(run.w).sqrt()):.3f}"
            title = f"({'ab'[column]}) {ARM_NAMES[arm]}\n{spread}"
            axis.set_title(title, color=ARM_STYLE[arm], weight="bold")
            axis.set(**square_window(points[row], half_width))
            if column == 0:
                axis.set_ylabel(f"Optimum {optimum}", weight="bold", fontsize=13, labelpad=12)
        axis = figure.add_subplot(2, 3, 3 * row + 3, projection="polar")
        draw_directions(axis, arms)
        values = [f"{float(direction_variance(run.gradients)):.2f}" for run in arms.values()]
        change = " \u2192 ".join(values)
        axis.set_title(f"(c) direction of the gradient\nvariance {change}", weight="bold")
    rings = zip(("inner", "outer"), ARM_NAMES.items(), strict=True)
    patches = [Patch(color=ARM_STYLE[a], label=f"{ring} ring: {text}") for ring, (a, text) in rings]
    handles = [*figure.axes[0].get_legend_handles_labels()[0], *patches]
    style = dict(ncols=5, frameon=False, fontsize=9, columnspacing=1.5)
    figure.legend(handles=handles, loc="outside lower center", **style)
    return figure


def sign_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Signs of shared minus alone: readings in rows, set-ups in columns.

    +1 or -1 if the 95% interval of the paired difference excludes zero, else 0. `metrics`: rows of
    one kind of optimum.
    """
    signs = {}
    for value in READINGS:
        found = differences(metrics, value, "alone", "setting").set_index("setting")
        excluded = found["low"] * found["high"] > 0
        signs[value] = np.sign(found["difference"]).where(excluded, 0).astype(int)
    return pd.DataFrame(signs).T


def draw_signs(metrics: pd.DataFrame) -> Figure:
    """Whether each reading rises or falls if 2 bits share, in each set-up, for both optima."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
    for axis, optimum in zip(axes, OPTIMA, strict=True):
        table = sign_table(metrics[metrics["optimum"] == optimum])
        words = table.replace({-1: "\u25bc", 0: "?", 1: "\u25b2"})
        style = dict(cmap=list(SIGN_COLOURS.values()), vmin=-1, vmax=1, cbar=False, linewidths=1)
        sns.heatmap(table, annot=words, fmt="", annot_kws={"color": "0"}, ax=axis, **style)
        axis.axhline(len(STABILITY), color="0", linewidth=2)
        axis.set_title(f"optimum {optimum}", weight="bold")
        axis.set(xlabel="set-up", ylabel="")
        axis.tick_params(axis="x", rotation=90)
    labels = [f"{text} (primary)" if v in PRIMARY else text for v, text in READINGS.items()]
    axes[0].set_yticklabels(labels, rotation=0)
    axes[0].set_ylabel("reading")
    handles = [Patch(color=colour, label=word) for word, colour in SIGN_COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return figure
