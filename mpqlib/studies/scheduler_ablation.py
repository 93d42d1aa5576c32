"""Scheduler, IDM and other rules of training, each switched alone: arms, policies, accuracy.

The study is also a command, which needs no notebook, ends within its minutes and resumes:

    python -m mpqlib.studies.scheduler_ablation PROFILE --output FOLDER --data FILE --minutes 9

Its primary outcome is the mean test top-1 of the uniform configurations that the profile names as
`primary`, such as 3 to 6 bits. It is measured before any policy is searched.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset

from ..data import Splits
from ..files import remembered, save_json
from ..models import create
from ..network.bits import BitConfig
from ..network.cost import bitops_at
from ..network.supernet import Supernet
from ..report.claims import differences
from ..report.runs import measure, provenance, save_run
from ..search.error import batch_error
from ..search.greedy import greedy
from ..training.evaluation import evaluate
from ..training.loop import TrainConfig, train
from .arms import KINDS, Setting
from .command import TIMED_STEPS, Command, agree_on_plan, load_splits, make_runs, time_steps
from .processes import NEVER, Deadline, Team, run_processes


@dataclass(frozen=True)
class Study:
    """The runs of an ablation: each method resumes from the files in `folder`.

    `splits`: from `load_splits`. At the deadline, training raises OutOfTime.
    """

    setting: Setting
    splits: Splits
    folder: Path
    device: torch.device
    deadline: Deadline = NEVER
    seconds: Mapping[str, float] = field(default_factory=dict)  # expected, to measure each kind

    def file(self, name: str) -> Path:
        """A file of the study."""
        return self.folder / name

    def rows_file(self, kind: str, arm: str, seed: int) -> Path:
        """Where `run` stores its rows."""
        return self.file(f"{arm}-{seed}-{kind}.json")

    def train(
        self, model: nn.Module, images: Dataset, config: TrainConfig, name: str, about: Mapping
    ) -> tuple:
        """Trains a network with the checkpoint `name`; returns it and its history."""
        self.deadline.check()
        file = self.file(f"{name}.pt")
        how = dict(device=self.device, label=name, about=self.setting.about | about)
        how |= dict(checkpoint=file, watch=self.deadline.watch(file))
        return train(model, images, config, **how)

    def train_float(self, seed: int) -> nn.Module:
        """Trains the float network that all arms of a seed start from."""
        config, cutout = self.setting.float_config(seed), self.setting.float_cutout
        torch.manual_seed(config.seed)
        network = create(self.setting.model, len(self.splits.classes))
        images = replace(self.splits.train, cutout=cutout) if cutout else self.splits.train
        name, about = f"float-{config.seed}", {"cutout": cutout} if cutout else {}
        return self.train(network, images, config, name, about)[0]

    def build_supernet(self, network: nn.Module, arm: str) -> Supernet:
        """Converts a float network with the options of an arm."""
        batch_size = self.setting.arm_config(arm, 0).batch_size
        examples = self.splits.calibration[:batch_size][0].to(self.device)
        options = self.setting.arms[arm].get("supernet", {})
        return Supernet(network, examples, self.setting.bits, **options)

    def train_arm(self, arm: str, seed: int) -> Supernet:
        """Trains the supernet of one arm and seed. Raises ValueError for an unknown arm."""
        config = self.setting.arm_config(arm, seed)
        supernet = self.build_supernet(self.train_float(seed), arm)
        about = {"supernet": self.setting.arms[arm].get("supernet", {})}
        supernet, history = self.train(supernet, self.splits.train, config, f"{arm}-{seed}", about)
        save_json(self.file(f"{arm}-{seed}-history.json"), history)
        return supernet

    def measure(self, supernet: Supernet, config: BitConfig) -> dict[str, float]:
        """Cost and accuracy of one configuration."""
        images = self.setting.recalibration_images
        return measure(supernet, config, self.splits, images=images, device=self.device)

    def measure_uniform(self, supernet: Supernet) -> dict[str, Mapping[str, float]]:
        """Measures the uniform configurations, by name, and the primary outcome."""
        setting = self.setting
        found = {b: self.measure(supernet, supernet.uniform(b)) for b in setting.uniform_bits}
        rows = {f"uniform {b}": row for b, row in found.items()}
        if setting.primary:
            mean = pd.DataFrame([found[b] for b in setting.primary]).mean()
            rows[setting.primary_name] = mean.drop(["top1_low", "top1_high"]).to_dict()
        return rows

    def measure_policies(self, supernet: Supernet) -> dict[str, Mapping[str, float]]:
        """Searches a policy at each level, then measures them, by name."""
        x, y = self.splits.search[: self.setting.search_images]
        error, rows = batch_error(supernet, x.to(self.device), y.to(self.device)), {}
        for level in self.setting.levels:
            budget = bitops_at(supernet.table, level)
            path = greedy(supernet, error, budget, **self.setting.search)
            rows[f"searched {level}"] = path[-1].config
        return {name: self.measure(supernet, config) for name, config in rows.items()}

    def run(self, kind: str, arm: str, seed: int) -> list[dict]:
        """Rows of an arm and seed, one for each configuration of a kind, "uniform" or "policies".

        Trains the arm and measures it, unless the rows are stored.
        """
        measure_kind = {"uniform": self.measure_uniform, "policies": self.measure_policies}[kind]

        def compute() -> list[dict]:
            supernet = self.train_arm(arm, seed)
            self.deadline.check(self.seconds.get(kind, 0))
            found = measure_kind(supernet)
            return [{"arm": arm, "seed": seed, "configuration": n} | r for n, r in found.items()]

        about = self.setting.about_arm(arm, kind)
        return remembered(self.rows_file(kind, arm, seed), about, compute)

    def run_arm(self, arm: str, seed: int) -> list[dict]:
        """All rows of an arm and seed: uniform configurations, then policies."""
        return [row for kind in KINDS for row in self.run(kind, arm, seed)]

    def run_float(self, seed: int) -> dict:
        """Trains the float network of a seed; returns its test top-1 in %."""

        def compute() -> dict:
            network = self.train_float(seed)
            tested = evaluate(network, self.splits.test, device=self.device)
            return {"seed": seed, "top1": 100 * tested.top1}

        about = self.setting.about | {"cutout": self.setting.float_cutout}
        config = self.setting.float_config(seed)
        return remembered(self.file(f"float-{config.seed}.json"), about | asdict(config), compute)


def seconds_of_parts(study: Study, network: nn.Module) -> dict[str, float]:
    """Measured seconds: of a float step, of a step of the timed arm, and to measure each kind.

    `network`: float, not trained; it is used up.
    """
    setting, splits, device = study.setting, study.splits, study.device
    arm = setting.timed_arm
    steps = len(splits.train) // setting.arm_config(arm, 0).batch_size
    long = dict(epochs=ceil((TIMED_STEPS + 3) / max(steps, 1)))

    def of_step(model: nn.Module, config: TrainConfig) -> float:
        config = replace(config, **long)
        return time_steps(
            lambda watch: train(model, splits.train, config, device=device, watch=watch)
        )

    seconds = {"float_step": of_step(network, setting.float_config(0))}
    supernet = study.build_supernet(network.eval(), arm)
    seconds["step"] = of_step(supernet, setting.arm_config(arm, 0))
    lowest = replace(study, setting=replace(setting, levels=[min(setting.levels)]))
    start = time.perf_counter()
    study.measure(supernet, supernet.uniform(setting.bits[0]))
    seconds["uniform"] = (time.perf_counter() - start) * len(setting.uniform_bits)
    start = time.perf_counter()
    lowest.measure_policies(supernet)
    seconds["policies"] = (time.perf_counter() - start) * len(setting.levels)
    return seconds


def plan_epochs(
    setting: Setting,
    steps: int,
    seconds: Mapping[str, float],
    *,
    seeds: int,
    processes: int,
    left: float,
) -> tuple[int, float]:
    """The epochs of every supernet that fit into the `left` seconds, and the seconds needed.

    `steps`: in an epoch. `seconds`: from `seconds_of_parts`. The number of epochs is at least that
    of the setting. The seconds are those of the whole study at the setting's number of epochs.
    """
    floats = ceil(seeds / processes) * setting.float_epochs * steps * seconds["float_step"]
    rounds = ceil(seeds * len(setting.arms) / processes)  # of arms, one in each process
    measuring = rounds * (seconds["uniform"] + seconds["policies"])
    epoch = rounds * steps * seconds["step"]
    # A tenth for what is not counted, such as checkpoints and conversion.
    fitting = int((0.9 * left - floats - measuring) // epoch)
    return max(fitting, setting.epochs), (floats + measuring + setting.epochs * epoch) / 0.9


def planned_runs(command: Command) -> list[tuple]:
    """Kind, arm and seed of all runs, in order: the primary outcome comes before policies."""
    floats = [("float", None, seed) for seed in command.seeds]
    arms = [(arm, seed) for seed in command.seeds for arm in command.setting.arms]
    return floats + [(kind, arm, seed) for kind in KINDS for arm, seed in arms]


def work(rank: int, team: Team, command: Command) -> None:
    """One process of the command: takes runs until all are done or the time is used up.

    When all processes have stopped, the first one writes the results.
    """
    device, folder, stopwatch = command.device, command.folder, command.stopwatch(rank)
    splits = load_splits(command.setting, command.root, device)
    study = Study(command.setting, splits, folder, torch.device(device), command.deadline)
    setting = study.setting
    steps = len(splits.train) // setting.arm_config(setting.timed_arm, 0).batch_size

    def measure_seconds() -> dict[str, float]:
        return seconds_of_parts(study, create(setting.model, len(splits.classes)).to(device))

    def plan(seconds: Mapping[str, float], left: float) -> tuple[int, float]:
        how = dict(seeds=len(command.seeds), processes=team.size, left=left)
        return plan_epochs(setting, steps, seconds, **how)

    about = {name: value for name, value in asdict(setting).items() if name != "arms"}
    found = agree_on_plan(command, team, rank, about, measure_seconds, plan)
    setting = replace(setting, epochs=found["epochs"])
    study = replace(study, setting=setting, seconds=found["seconds"])
    make_runs(team, planned_runs(command), partial(take_run, study), rank, stopwatch)
    seconds = stopwatch.seconds()
    team.barrier.wait()
    if rank == 0:
        report(command, study, seconds)


def take_run(study: Study, kind: str, arm: str | None, seed: int) -> str:
    """Makes one of `planned_runs`, after those that it needs; returns what was done, in words."""
    if kind == "float":
        return f"float, seed {seed}: test top-1 {study.run_float(seed)['top1']:.1f}%"
    study.deadline.wait_for(study.file(f"float-{seed}.json"))
    if kind == "policies":
        study.deadline.wait_for(study.rows_file("uniform", arm, seed))
    rows = study.run(kind, arm, seed)
    return f"{arm}, seed {seed}: " + ", ".join(
        f"{row['configuration']} {row['top1']:.1f}%" for row in rows
    )


def collect(study: Study, seeds: Sequence[int]) -> list[dict]:
    """The stored rows of seeds that are whole: of a kind, those that are measured in every arm."""
    rows, arms = [], list(study.setting.arms)
    for seed in seeds:
        for kind in KINDS:
            if all(study.rows_file(kind, arm, seed).exists() for arm in arms):
                rows += [row for arm in arms for row in study.run(kind, arm, seed)]
    return rows


def describe_training(study: Study, seed: int) -> list[dict]:
    """The last epoch of the supernet of each arm: losses, and how far its steps have moved."""
    rows = []
    for arm in study.setting.arms:
        history = json.loads(study.file(f"{arm}-{seed}-history.json").read_text())
        decisions = sum(len(epoch.pop("decisions")) for epoch in history)
        last = history[-1] if history else {}
        rows.append({"arm": arm, "seed": seed, "decisions": decisions} | last)
    return rows


def report(command: Command, study: Study, seconds: float) -> None:
    """Writes the results of all whole seeds, and prints the arms beside the first one.

    The files are metrics.csv, parameters.yaml, provenance.json and training.json.
    """
    done = sum(study.rows_file(*run).exists() for run in planned_runs(command) if run[0] != "float")
    total = len(planned_runs(command)) - len(command.seeds)
    remark = "" if done == total else "; the same command resumes"
    print(f"{done} of {total} runs are done{remark}")
    metrics, setting = pd.DataFrame(collect(study, command.seeds)), study.setting
    if metrics.empty:
        print("No seed is whole yet: no results are written")
        return
    seeds, images = [int(seed) for seed in metrics["seed"].unique()], len(study.splits.train)
    training = {
        "float": [study.run_float(seed) for seed in seeds],
        "supernet": [row for seed in seeds for row in describe_training(study, seed)],
    }
    parameters = asdict(setting) | dict(
        seeds=seeds,
        training_images=images,
        images_seen=setting.epochs * images,
        device=command.device,
        processes=command.processes,
    )
    source = provenance(seeds, seconds)
    found = dict(parameters=parameters, metrics=metrics, figures={}, training=training)
    save_run(command.output, source=source, **found)
    if len(setting.arms) > 1:
        first = next(iter(setting.arms))
        compared = differences(metrics, "top1", first, "configuration")
        columns = ["compared", "configuration", "difference", "low", "high", "n"]
        print(f"Test top-1 minus that of {first!r}, in points, with its 95% interval:")
        print(compared[columns].round(2).to_string(index=False), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments, of this process by default."""
    command = Command.parse(Setting, __doc__, arguments)
    run_processes(work, command.processes, command)


if __name__ == "__main__":
    main()
