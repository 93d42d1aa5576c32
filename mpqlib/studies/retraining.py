"""Is retraining really not needed? Searched policies against the same policies trained alone.

This is the title claim of RFQuant (arXiv 2401.01543). The study is also a command, which resumes:

    python -m mpqlib.studies.retraining PROFILE --output FOLDER --data FILE --device cpu
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..data import Splits
from ..files import plain, remembered
from ..models import create
from ..network.bits import BitConfig, Candidates, largest
from ..network.supernet import Supernet
from ..report.claims import differences, documents
from ..report.intervals import t_interval
from ..report.paper import Claim
from ..report.runs import provenance, save_run
from ..report.tables import show_markdown
from ..training.loop import TrainConfig
from .arms import Setting
from .command import Command, load_splits, make_runs
from .parameters import NAME, PLACE, Rule, check_parameters, check_subset, items, number, optional
from .processes import NEVER, Deadline, Team
from .scheduler_ablation import Study

if TYPE_CHECKING:
    from IPython.display import Markdown

ONE_PASS = {"random_paths": 0, "scheduler": False, "idm": False}  # one pass a step, cross-entropy
RETRAINED = ("retrained", "uniform retrained", "retrained as long")  # ways to train alone
RETRAINING_RULES = {
    "setting": Rule("a Setting, or a dict of its fields", lambda v: isinstance(v, Setting)),
    "long_levels": items(number(1), least=0),
    "arm": NAME,
    "supernets": optional(PLACE),
}


@dataclass(frozen=True)
class RetrainingSetting:
    """Which policies of which supernets are trained alone.

    Raises ValueError for a value that is not allowed, and TypeError for an unknown setting.
    """

    setting: Setting  # of the supernets; or a dict of its fields
    levels: list[float]  # budgets whose policies are trained alone: some of the setting's
    long_levels: list[float] = field(default_factory=lambda: [3])  # of these, trained as long, too
    arm: str = "both"  # of the setting
    supernets: str | None = None  # output folder of a run of scheduler_ablation; None: train here

    def __post_init__(self):
        if isinstance(self.setting, Mapping):
            object.__setattr__(self, "setting", Setting(**self.setting))  # the class is frozen
        check_parameters(RETRAINING_RULES, **vars(self))
        check_subset("arm", [self.arm], self.setting.arms)
        check_subset("levels", self.levels, self.setting.arm_levels(self.arm))
        check_subset("long_levels", self.long_levels, self.levels)

    @property
    def uniform_bits(self) -> list[int]:
        """The most uniform bits at each level, or below it."""
        bits = self.setting.arm_bits(self.arm)
        return sorted({max(b for b in bits if b <= level) for level in self.levels})

    def networks(self) -> list[tuple[str, float]]:
        """The way and the bits (level, or uniform) of each network that is trained alone."""
        bits = dict(zip(RETRAINED, (self.levels, self.uniform_bits, self.long_levels), strict=True))
        return [(way, b) for way in RETRAINED for b in bits[way]]

    def config(self, seed: int) -> TrainConfig:
        """How the supernet is trained."""
        return self.setting.arm_config(self.arm, seed)

    def setting_alone(self, way: str, policy: BitConfig) -> Setting:
        """The setting whose only arm, `way`, has exactly the bits of a policy as candidates."""
        own, config = self.setting.arms[self.arm], self.config(0)
        overrides = {name: Candidates((b.weight,), (b.act,)) for name, b in policy.items()}
        parts = {"training": ONE_PASS, "supernet": {"overrides": overrides}}
        options = own | {name: own.get(name, {}) | part for name, part in parts.items()}
        times = 1 + config.random_paths if way == "retrained as long" else 1
        return replace(self.setting, arms={way: options}, epochs=times * config.epochs)


def image_passes(config: TrainConfig, images: int) -> int:
    """Images that a forward and a backward pass run through, in training on so many images."""
    steps = images // config.batch_size * config.epochs
    return steps * config.batch_size * (1 + config.random_paths)


def search_passes(supernet: Supernet, images: int, levels: int) -> int:
    """Images that run forward in the search for policies at so many levels, by `quick_table`."""
    choices = [part for c in supernet.candidates.values() for part in c]
    return images * (1 + sum(min(2, len(part) - 1) for part in choices) + levels)


@dataclass(frozen=True)
class Retraining:
    """Supernets, and networks that are trained alone: each resumes from its own files.

    `study`: of the supernets. `folder`: of the networks alone. Only one process at a time may use
    these folders.
    """

    setting: RetrainingSetting
    study: Study
    folder: Path

    @classmethod
    def of(
        cls,
        setting: RetrainingSetting,
        splits: Splits,
        folder: Path,
        device: torch.device,
        deadline: Deadline = NEVER,
    ) -> Retraining:
        """A study in `folder`. `splits`: from `load_splits`."""
        supernets = Path(setting.supernets) / "runs" if setting.supernets else folder
        study = Study(setting.setting, splits, supernets, device, deadline)
        return cls(setting, study, folder)

    @cached_property
    def sketch(self) -> Supernet:
        """A supernet that is not trained: its candidates and costs are those of all seeds."""
        network = create(self.setting.setting.model, len(self.study.splits.classes))
        return self.study.build_supernet(network.to(self.study.device).eval(), self.setting.arm)

    def row(self, arm: str, seed: int, bits: float, found: Mapping, **cost: float) -> dict:
        """A row of the metrics."""
        return dict(found) | {"arm": arm, "seed": seed, "configuration": f"{bits:g} bits"} | cost

    def searched(self, seed: int) -> dict[float, dict]:
        """The measured policies of the seed's supernet, by level."""
        levels = self.setting.setting.arm_levels(self.setting.arm)
        found = self.study.run("policies", self.setting.arm, seed)
        return {b: row for b, row in zip(levels, found, strict=True) if b in self.setting.levels}

    def run_supernet(self, seed: int) -> list[dict]:
        """Rows of a seed's supernet and of its float network: stored, or measured now."""
        own, arm, study = self.setting.setting, self.setting.arm, self.study
        measured = {row["configuration"]: row for row in study.run("uniform", arm, seed)}
        uniform = {bits: measured[f"uniform {bits}"] for bits in own.uniform_bits(arm)}
        searched, in_float = self.searched(seed), study.run_float(seed)
        history = json.loads(study.file(f"{arm}-{seed}-history.json").read_text())
        cost = {
            "image_passes": image_passes(self.setting.config(seed), len(study.splits.train)),
            "seconds": sum(epoch["seconds"] for epoch in history),
        }
        rows = [self.row("uniform", seed, bits, row, **cost) for bits, row in uniform.items()]
        cost["search_passes"] = search_passes(self.sketch, own.search_images, len(own.levels))
        rows += [self.row("searched", seed, bits, row, **cost) for bits, row in searched.items()]
        return [*rows, {"arm": "float", "seed": seed, "top1": in_float["top1"]}]

    def policy(self, way: str, bits: float, seed: int) -> BitConfig:
        """The bits of each layer of a network that is trained alone."""
        if way == "uniform retrained":
            return self.sketch.uniform(bits)
        return BitConfig.of(self.searched(seed)[bits]["policy"])

    def run_alone(self, way: str, bits: float, seed: int) -> dict:
        """The row of a network trained alone, in one of the ways RETRAINED: stored, or made now."""
        setting = self.setting.setting_alone(way, self.policy(way, bits, seed))
        study = replace(self.study, setting=setting, folder=self.folder)
        name = f"{way} {bits:g} bits-{seed}".replace(".", "_")
        config, images = setting.arm_config(way, seed), study.splits.train

        def compute() -> dict:
            supernet = study.build_supernet(self.study.train_float(seed), way)
            about = {"supernet": setting.arms[way]["supernet"], "start": study.start}
            supernet, history = study.train(supernet, images, config, name, about)
            found = study.measure(supernet, largest(supernet.candidates))
            seconds = sum(epoch["seconds"] for epoch in history)
            passes = image_passes(config, len(images))
            return self.row(way, seed, bits, found, image_passes=passes, seconds=seconds)

        return remembered(study.file(f"{name}.json"), setting.about_arm(way, "uniform"), compute)

    def run(self, seed: int) -> list[dict]:
        """All rows of a seed."""
        rows = self.run_supernet(seed)
        return rows + [self.run_alone(way, bits, seed) for way, bits in self.setting.networks()]


def costs(metrics: pd.DataFrame, budgets: Sequence[int] = (1, 3, 12)) -> pd.DataFrame:
    """Image passes and hours for networks at so many budgets: a row per way, a column per number.

    `metrics`: rows of `Retraining.run`. The way "searched" is one supernet with its search for all
    budgets; the others train a network for each. Each image of a search, which runs forward only,
    counts as a whole pass, at the seconds of a pass in training. `sharing wins from`: the least
    number of budgets at which the supernet takes fewer passes.
    """
    columns = ["image_passes", "seconds", "search_passes"]
    means, rows = metrics.groupby("arm")[columns].mean(), {}
    passes = means["image_passes"] + means["search_passes"].fillna(0)
    hours = passes * means["seconds"] / means["image_passes"] / 3600
    for way in [w for w in ("searched", "retrained", "retrained as long") if w in means.index]:
        times = {count: 1 if way == "searched" else count for count in budgets}
        rows[way] = {f"passes for {n}": passes[way] * times[n] for n in budgets}
        rows[way] |= {f"hours for {n}": hours[way] * times[n] for n in budgets}
        if way != "searched":
            rows[way]["sharing wins from"] = passes["searched"] // passes[way] + 1
    return pd.DataFrame.from_dict(rows, "index").rename_axis("way")


def retraining_claims(setting: RetrainingSetting) -> list[Claim]:
    """The title claim, over all levels, and beside the networks that are trained as long."""
    how = dict(value="top1", arm="searched", sign=+1, margin=0.5)
    title = "needs no retraining: test top-1 (%), at most 0.5 points below"
    return [
        Claim(f"A searched policy {title}, mean of all budgets", base="retrained", **how),
        *(
            Claim(
                f"A policy searched at {level:g} bits {title} if trained as long",
                base="retrained as long",
                where={"configuration": f"{level:g} bits"},
                **how,
            )
            for level in setting.long_levels
        ),
    ]


def finding(metrics: pd.DataFrame) -> Markdown:
    """How far the networks that were trained alone lie above the supernet, in words."""
    lines = []
    for way, base in zip(RETRAINED, ("searched", "uniform", "searched"), strict=True):
        pair = metrics[metrics["arm"].isin([way, base])]
        each = [
            f"{d.configuration} \u2248 {d.difference:+.2g}"
            + (f" [{d.low:+.2g}, {d.high:+.2g}]" if d.n > 1 else "")
            for d in differences(pair, "top1", base, "configuration").itertuples()
        ]
        lines.append(f"- {way} minus {base}: {', '.join(each) or 'not trained'}")
    head = "Test top-1 in points, paired by seed, with 95% intervals if there are several seeds:"
    return show_markdown("\n".join([head, "", *lines]))


def top1_over_bitops(metrics: pd.DataFrame) -> Figure:
    """Test top-1 over BitOPs: the supernets as lines, networks trained alone as points.

    `metrics`: rows of `Retraining.run`. Bands and bars are 95% intervals over seeds. Points at the
    same BitOPs are drawn 3% beside the line.
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    blue, orange, grey = "#0072B2", "#D55E00", "0.35"
    styles = {  # arm: label, shift of BitOPs, style
        "searched": ("supernet, searched", 1, dict(color=blue, fmt="o-")),
        "uniform": ("supernet, uniform", 1, dict(color=grey, fmt="s--")),
        "retrained": ("searched, retrained", 0.97, dict(color=orange, fmt="^")),
        "retrained as long": (
            "searched, retrained as long",
            1.03,
            dict(color=orange, fmt="D", mfc="white"),
        ),
        "uniform retrained": ("uniform, retrained", 0.97, dict(color="k", fmt="v")),
    }
    for arm, (label, shift, style) in styles.items():
        groups = metrics[metrics["arm"] == arm].groupby("configuration")
        points = [(g["bitops_g"].mean() * shift, *t_interval(g["top1"])) for _, g in groups]
        found = pd.DataFrame(sorted(points), columns=["x", "mean", "low", "high"])
        spread = [found["mean"] - found["low"], found["high"] - found["mean"]]
        is_line = "-" in style["fmt"]
        how = dict(yerr=None if is_line else spread, capsize=3, markersize=7, label=label)
        axis.errorbar(found["x"], found["mean"], **how | style)
        if is_line:
            axis.fill_between(
                found["x"], found["low"], found["high"], color=style["color"], alpha=0.2
            )
    in_float = metrics.loc[metrics["arm"] == "float", "top1"].mean()
    axis.axhline(in_float, color="0.6", linestyle=":", label="float")
    ticks = metrics[metrics["arm"] == "uniform"].groupby("configuration")["bitops_g"].mean()
    axis.set(xscale="log", xlabel="BitOPs (G per image; ticks: uniform bits)")
    axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set(ylabel="test top-1 (%), 95% interval over seeds")
    figure.legend(frameon=False, ncols=3, loc="outside upper center")
    return figure


def save_retraining(
    folder: Path, study: Retraining, rows: Sequence[Mapping], device: str, seconds: float
) -> pd.DataFrame:
    """Writes the results of whole seeds into `folder`; returns their metrics."""
    metrics = pd.DataFrame(rows)
    seeds = [int(seed) for seed in metrics["seed"].unique()]
    policies = metrics.dropna(subset="policy")[["seed", "configuration", "policy"]]
    metrics = metrics.drop(columns="policy")
    figure = top1_over_bitops(metrics)
    parameters = asdict(study.setting) | dict(seeds=seeds, device=device)
    save_run(
        folder,
        parameters=plain(parameters, "parameters"),
        metrics=metrics,
        source=provenance(seeds, seconds),
        figures={"top1": figure},
        claims=documents(retraining_claims(study.setting)),
        policies=policies.to_dict("records"),
    )
    plt.close(figure)  # a notebook draws its own
    return metrics


def run_seed(study: Retraining, rows: list[dict], seed: int) -> str:
    """Adds all rows of a seed to `rows`; returns them in words."""
    new = study.run(seed)
    rows += new
    found = [f"{r['arm']} {r.get('configuration', '')} {r['top1']:.1f}%" for r in new]
    return f"seed {seed}: {', '.join(found)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments, in this process. Whole seeds come first."""
    command, rows = Command.parse(RetrainingSetting, __doc__, arguments), []
    if command.processes > 1 or command.most_epochs:
        raise ValueError("--processes and most_epochs are not allowed here: one process trains")
    device, stopwatch = command.device, command.stopwatch(0)
    splits = load_splits(command.setting.setting, command.root, device)
    where = command.folder, torch.device(device), command.deadline
    study = Retraining.of(command.setting, splits, *where)
    seeds = [(seed,) for seed in command.seeds]
    make_runs(Team(1), seeds, partial(run_seed, study, rows), 0, stopwatch)
    if rows:
        save_retraining(command.output, study, rows, device, stopwatch.seconds())
    else:
        print("No seed is whole yet: no results are written; the same command resumes")


if __name__ == "__main__":
    main()
