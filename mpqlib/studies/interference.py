"""Bit-width interference on two weights: linear regression at one bit-width, and with another."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from torch import Tensor
from tqdm.auto import tqdm

from ..files import remembered
from ..network.quantizer import Quantizer, integer_range
from ..report.plots import COLOURS

VALUES = {"variance": "variance of direction (0 to 1)", "crossings": "crossings per 100 steps"}


@dataclass(frozen=True)
class Settings:
    """One experiment; raises ValueError where a setting makes no sense.

    `steps` of SGD at `lr`, the first `burn_in` not measured, each on `batch` new examples whose
    labels carry normal noise of standard deviation `noise`. `learn_steps`: LSQ learns the step
    sizes, else they stay as initialised. `sharing`: "sum" adds the loss at the other bit-width;
    "drawn" adds the loss at one of the two, drawn at every step, as RFQuant's random pass does.
    """

    steps: int = 400
    batch: int = 32
    lr: float = 0.05
    noise: float = 0.1
    learn_steps: bool = True
    sharing: str = "sum"
    burn_in: int = 200

    def __post_init__(self):
        rules = {
            "steps": (self.steps >= 2, "a whole number from 2"),
            "batch": (self.batch >= 1, "a whole number from 1"),
            "lr": (self.lr > 0, "a number above 0"),
            "noise": (self.noise >= 0, "a number from 0"),
            "sharing": (self.sharing in ("sum", "drawn"), "'sum' or 'drawn'"),
            "burn_in": (0 <= self.burn_in <= self.steps - 2, "from 0 to two less than the steps"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: {allowed}")


class Problem(NamedTuple):
    """All that is random about a seed: target and start (2,), x (steps, batch, 2), y, draws."""

    target: Tensor
    start: Tensor
    x: Tensor
    y: Tensor
    draws: Tensor  # (steps,): 1 where "drawn" sharing takes the other bit-width


class Trajectory(NamedTuple):
    """What each step (a row of two) saw before its update, and the step sizes at the end."""

    w: Tensor  # latent weights
    w_hat: Tensor  # on the grid of the measured bit-width
    integers: Tensor  # w_hat / step size
    gradients: Tensor  # of the loss at the measured bit-width alone, for w
    step_sizes: dict[int, float]  # by bit-width


def problem(settings: Settings, seed: int) -> Problem:
    """The regression of a seed: y = x w* + noise with x ~ N(0, I).

    Target w* and start are drawn on the unit circle, so that they have one scale and the step sizes
    that LSQ derives from the start suit the target.
    """
    generator = torch.Generator().manual_seed(seed)
    like = dict(generator=generator, dtype=torch.float64)
    angles = 2 * torch.pi * torch.rand(2, **like)
    target, start = torch.stack([angles.cos(), angles.sin()], 1)
    x = torch.randn(settings.steps, settings.batch, 2, **like)
    noise = settings.noise * torch.randn(settings.steps, settings.batch, **like)
    draws = torch.randint(2, (settings.steps,), generator=generator)
    return Problem(target, start, x, x @ target + noise, draws)


def descend(
    given: Problem, settings: Settings, bits: int, with_bits: int | None = None
) -> Trajectory:
    """SGD on latent weights w at `bits`, alone or with `with_bits` (the same: counted twice)."""
    w = given.start.clone().requires_grad_()
    quantizer = Quantizer({bits, with_bits or bits}, w.detach(), signed=True)
    quantizer.requires_grad_(settings.learn_steps)
    optimizer = torch.optim.SGD([w, *quantizer.parameters()], lr=settings.lr)
    # The gradient of a batch's mean squared error for w_hat is A w_hat - c; all batches at once
    A, c = (2 / settings.batch * given.x.mT @ right for right in (given.x, given.y[..., None]))
    rows = []
    for A_t, c_t, other in zip(A, c.squeeze(2), given.draws.tolist(), strict=True):
        optimizer.zero_grad()
        w_hat = quantizer(w, bits)
        w_hat.backward(A_t @ w_hat.detach() - c_t)  # straight through the rounding to w
        integers = (w_hat / quantizer.step(bits)).round()
        rows.append([row.detach().clone() for row in (w, w_hat, integers, w.grad)])
        if with_bits is not None:
            second = with_bits if other or settings.sharing == "sum" else bits
            shared = quantizer(w, second)
            shared.backward(A_t @ shared.detach() - c_t)  # adds to the gradients
        optimizer.step()
    step_sizes = {b: quantizer.step(b).item() for b in quantizer.bits}
    return Trajectory(*map(torch.stack, zip(*rows, strict=True)), step_sizes)


def direction_variance(gradients: Tensor) -> float:
    """1 - |mean of g / |g||^2 over the rows g: 0 where all point one way, 1 where they cancel.

    The sum of the variances of the unit vectors' components; a row of zeros counts as zeros.
    """
    return 1 - float(torch.nn.functional.normalize(gradients, dim=1).mean(0).square().sum())


def crossings(integers: Tensor) -> float:
    """How often a number of `integers` (steps, weights) changes, in changes per 100 steps."""
    return 100 * float((integers[1:] != integers[:-1]).sum()) / (len(integers) - 1)


def summarise(run: Trajectory, target: Tensor, settings: Settings) -> dict[str, float]:
    """Variance of direction, crossings, mean distance of w_hat from the target; after burn-in."""
    return {
        "variance": direction_variance(run.gradients[settings.burn_in :]),
        "crossings": crossings(run.integers[settings.burn_in :]),
        "distance": float((run.w_hat[settings.burn_in :] - target).norm(dim=1).mean()),
    }


def compare_arms(settings: Settings, seed: int, pairs: Sequence[tuple[int, int]]) -> list[dict]:
    """One row per pair (bits, with_bits) and arm, all of one seed's data and start.

    Arms: "alone"; "shared" with the other bit-width; where `pairs` has it, "doubled": sharing with
    itself, which takes the longer strides of two losses but has nothing that interferes.
    """
    given, done, rows = problem(settings, seed), {}, []
    for bits, with_bits in pairs:
        arms = {"alone": None, "shared": with_bits}
        for arm, other in (arms | {"doubled": bits} if (bits, bits) in pairs else arms).items():
            if (bits, other) not in done:
                run = descend(given, settings, bits, other)
                done[bits, other] = summarise(run, given.target, settings)
            rows += [dict(seed=seed, bits=bits, with_bits=with_bits, arm=arm) | done[bits, other]]
    return rows


def collect(cases: Mapping[str, tuple], seeds: Sequence[int], folder: Path) -> pd.DataFrame:
    """Rows of `compare_arms` for every seed; a seed that `folder` holds is read, not computed.

    `cases`: name -> (settings, pairs).
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds!r} is not allowed: at least one, none twice")
    about = {name: asdict(case) | {"pairs": pairs} for name, (case, pairs) in cases.items()}
    rows = []

    def compute(seed: int) -> list[dict]:
        found = {name: compare_arms(case, seed, pairs) for name, (case, pairs) in cases.items()}
        return [{"setting": name} | row for name in found for row in found[name]]

    for seed in tqdm(seeds, desc="seeds"):
        rows += remembered(folder / f"seed{seed}.json", about, lambda seed=seed: compute(seed))
    return pd.DataFrame(rows)


def differences(metrics: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """`value` shared minus alone, paired by seed, for each group of `by`: mean, and its 95%
    t-interval from low to high (NaN for a single seed)."""
    arms = metrics.pivot_table(index=[*by, "seed"], columns="arm", values=value, sort=False)
    groups = (arms["shared"] - arms["alone"]).groupby(list(by), sort=False)
    mean, n = groups.mean(), groups.count()
    half = groups.std() / n**0.5 * student.ppf(0.975, (n - 1).where(n > 1))
    return pd.DataFrame({"mean": mean, "low": mean - half, "high": mean + half})


def legend_below(figure: Figure) -> None:
    """One legend for all panels, from the labels of the last."""
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def trajectories(runs: Mapping[str, Trajectory], target: Tensor) -> Figure:
    """The latent weights' way over the quantization bounds at the end; a panel per run."""
    figure, axes = plt.subplots(1, len(runs), figsize=(9, 4.9), layout="constrained")
    limit = 1.12 * float(torch.cat([target[None], *(r.w for r in runs.values())]).abs().max())
    for axis, (title, run) in zip(axes, runs.items(), strict=True):
        for bits, step in run.step_sizes.items():
            bounds = (np.arange(*integer_range(bits, signed=True)) + 0.5) * step
            style = dict(color=COLOURS[bits], linewidth=5 / bits, zorder=1)  # fewer bits, thicker
            axis.vlines(bounds, -limit, limit, **style, label=f"bounds, {bits} bits")
            axis.hlines(bounds, -limit, limit, **style)
        axis.plot(*run.w.T, color="0.15", linewidth=0.9, label="latent weights")
        axis.plot(*run.w[0], "o", color="0.15", markersize=8, label="start")
        axis.plot(*target, "*", color="C3", markersize=15, label="float optimum", zorder=3)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title)
        axis.set(xlabel="first weight (no unit)", ylabel="second weight (no unit)")
    legend_below(figure)
    return figure


def directions(runs: Mapping[str, Trajectory], bits: int, first: int) -> Figure:
    """Where the gradient at `bits`, scaled to length 1, points at each step; a panel per run."""
    figure, axes = plt.subplots(1, len(runs), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (title, run) in zip(axes, runs.items(), strict=True):
        degrees = torch.rad2deg(torch.atan2(run.gradients[:, 1], run.gradients[:, 0]))
        axis.axvspan(0, first, color="0.93", label="not measured")
        axis.plot(degrees, "o", color=COLOURS[bits], markersize=3, label=f"{bits}-bit gradient")
        axis.set(xlabel="training step", ylim=(-190, 190), yticks=range(-180, 181, 90))
        axis.set_title(f"{title}: variance {direction_variance(run.gradients[first:]):.2f}")
    axes[0].set_ylabel("direction (degrees)")
    legend_below(figure)
    return figure


def heat_maps(metrics: pd.DataFrame) -> Figure:
    """Shared minus alone for every pair of bit-widths; bold: the 95% interval excludes zero."""
    base = metrics[metrics["setting"] == "base"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.6), layout="constrained")
    for axis, (value, label) in zip(axes, VALUES.items(), strict=True):
        found = differences(base, value, ["bits", "with_bits"]).unstack("with_bits")
        top = float(found["mean"].abs().to_numpy().max())  # of the colours: white is zero
        sure = (found["low"] * found["high"] > 0).to_numpy()
        style = dict(annot=True, fmt="+.2f" if value == "variance" else "+.1f", square=True)
        style |= dict(vmin=-top, vmax=top, cmap="PuOr_r", cbar_kws={"shrink": 0.75})
        sns.heatmap(found["mean"], ax=axis, **style)
        for text, bold in zip(axis.texts, sure.flat, strict=True):
            text.set_fontweight("bold" if bold else "normal")
        axis.set(xlabel="sharing bit-width (bits)", ylabel="measured bit-width (bits)")
        axis.set_title(f"{label},\nshared minus alone", fontsize=11)
    return figure


def robustness(metrics: pd.DataFrame, pair: tuple[int, int]) -> Figure:
    """Shared minus alone of one pair of bit-widths in every setting, with 95% intervals."""
    chosen = metrics[(metrics["bits"] == pair[0]) & (metrics["with_bits"] == pair[1])]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True, layout="constrained")
    for axis, (value, label) in zip(axes, VALUES.items(), strict=True):
        found = differences(chosen, value, ["setting"])[::-1]  # "base" on top
        spread = [found["mean"] - found["low"], found["high"] - found["mean"]]
        axis.errorbar(found["mean"], found.index, xerr=spread, fmt="o", capsize=3, color="0.15")
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set(xlabel=f"{label},\nshared minus alone, 95% interval")
    axes[0].set_ylabel("setting")
    return figure
