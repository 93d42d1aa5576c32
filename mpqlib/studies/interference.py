"""Bit-width interference in a regression with two weights (RFQuant, Fig. 1)."""

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
from torch import Tensor
from tqdm.auto import tqdm

from ..files import remembered
from ..network.quantizer import Quantizer, integer_range
from ..report.claims import differences
from ..report.plots import COLOURS, differences_plot

VALUES = {"variance": "variance of direction (0 to 1)", "crossings": "crossings per 100 steps"}


@dataclass(frozen=True)
class Settings:
    """Settings of one experiment; raises ValueError for a value that is not allowed.

    `steps`: steps of SGD with learning rate `lr`; the first `burn_in` are not measured. `batch`:
    new examples per step. `noise`: standard deviation of the normal noise in their labels.
    `learn_steps`: whether LSQ learns the step sizes. `sharing`: "sum" adds the loss at the other
    bit-width; "drawn" adds the loss at one of the two bit-widths, drawn at every step, like
    RFQuant's random pass.
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
    """Everything that is random in one seed."""

    target: Tensor  # (2,)
    start: Tensor  # (2,)
    x: Tensor  # (steps, batch, 2)
    y: Tensor  # (steps, batch)
    draws: Tensor  # (steps,): 1 if "drawn" sharing uses the other bit-width


class Trajectory(NamedTuple):
    """Values before each update, one row of two per step, and the final step sizes."""

    w: Tensor  # latent weights
    w_hat: Tensor  # quantized at the measured bit-width
    integers: Tensor  # w_hat / step size
    gradients: Tensor  # for w, of the loss at the measured bit-width only
    step_sizes: dict[int, float]  # by bit-width


def problem(settings: Settings, seed: int) -> Problem:
    """The regression problem of one seed: y = x w* + noise with x ~ N(0, I).

    Target w* and start are drawn from the unit circle. So they have the same scale, and the step
    sizes that LSQ derives from the start also fit the target.
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
    """SGD on latent weights w at `bits`, alone or shared with `with_bits`.

    If both are equal, the loss counts twice.
    """
    w = given.start.clone().requires_grad_()
    quantizer = Quantizer({bits, with_bits or bits}, w.detach(), signed=True)
    quantizer.requires_grad_(settings.learn_steps)
    optimizer = torch.optim.SGD([w, *quantizer.parameters()], lr=settings.lr)
    # The mean squared error of a batch has the gradient A w_hat - c for w_hat; all batches at once
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
    """1 - |mean of g / |g||^2 over the rows g: 0 if all have one direction, 1 if they cancel out.

    This is the sum of the variances of the unit vectors' components. A row of zeros stays zero.
    """
    return 1 - float(torch.nn.functional.normalize(gradients, dim=1).mean(0).square().sum())


def crossings(integers: Tensor) -> float:
    """Changes of `integers` (steps, weights) from one step to the next, per 100 steps."""
    return 100 * float((integers[1:] != integers[:-1]).sum()) / (len(integers) - 1)


def summarise(run: Trajectory, target: Tensor, settings: Settings) -> dict[str, float]:
    """Direction variance, crossings and mean distance of w_hat from the target, after burn-in."""
    return {
        "variance": direction_variance(run.gradients[settings.burn_in :]),
        "crossings": crossings(run.integers[settings.burn_in :]),
        "distance": float((run.w_hat[settings.burn_in :] - target).norm(dim=1).mean()),
    }


def compare_arms(settings: Settings, seed: int, pairs: Sequence[tuple[int, int]]) -> list[dict]:
    """One row per pair (bits, with_bits) and arm, all with the data and start of one seed.

    Arms: "alone"; "shared" with the other bit-width; and "doubled" if `pairs` has (bits, bits).
    "doubled" counts the loss at `bits` twice: its updates are as long as those of two losses, but
    no other bit-width interferes.
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
    """Rows of `compare_arms` for every seed. Seeds that are stored in `folder` are read from there.

    `cases`: name -> (settings, pairs). Raises ValueError if there is no seed or a seed comes twice.
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


def shared_minus_alone(metrics: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """`claims.differences` of the arms shared and alone, for each combination of `by`."""
    both = metrics[metrics["arm"].isin(["shared", "alone"])]
    return differences(both, value, "alone", by)


def legend_below(figure: Figure) -> None:
    """Adds one legend for all panels, with the labels of the last panel."""
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def trajectories(runs: Mapping[str, Trajectory], target: Tensor) -> Figure:
    """Paths of the latent weights and the final rounding bounds, one panel per run."""
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
    """Direction of the gradient at `bits` at each step, one panel per run.

    `first`: the first step that is measured.
    """
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
    """Shared minus alone for every pair of bit-widths; bold if the 95% interval excludes zero."""
    base = metrics[metrics["setting"] == "base"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.6), layout="constrained")
    for axis, (value, label) in zip(axes, VALUES.items(), strict=True):
        found = shared_minus_alone(base, value, ["bits", "with_bits"])
        found = found.set_index(["bits", "with_bits"]).unstack("with_bits")
        top = float(found["difference"].abs().to_numpy().max())  # zero is white
        sure = (found["low"] * found["high"] > 0).to_numpy()
        style = dict(annot=True, fmt="+.2f" if value == "variance" else "+.1f", square=True)
        style |= dict(vmin=-top, vmax=top, cmap="PuOr_r", cbar_kws={"shrink": 0.75})
        sns.heatmap(found["difference"], ax=axis, **style)
        for text, bold in zip(axis.texts, sure.flat, strict=True):
            text.set_fontweight("bold" if bold else "normal")
        axis.set(xlabel="sharing bit-width (bits)", ylabel="measured bit-width (bits)")
        axis.set_title(f"{label},\nshared minus alone", fontsize=11)
    return figure


def robustness(metrics: pd.DataFrame, pair: tuple[int, int]) -> Figure:
    """Shared minus alone for one pair of bit-widths in every setting, with 95% intervals."""
    chosen = metrics[(metrics["bits"] == pair[0]) & (metrics["with_bits"] == pair[1])]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True, layout="constrained")
    for axis, (value, label) in zip(axes, VALUES.items(), strict=True):
        found = shared_minus_alone(chosen, value, ["setting"])
        text = f"{label},\nshared minus alone, 95% interval"
        differences_plot(found, "setting", text, axis=axis)
    axes[1].set_ylabel("")
    return figure
