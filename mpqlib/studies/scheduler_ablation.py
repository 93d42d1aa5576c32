"""Scheduler, IDM and other rules of training, each switched alone: arms, policies, accuracy.

The study is also a command, which needs no notebook, ends within its minutes and resumes:

    python -m mpqlib.studies.scheduler_ablation PROFILE --output FOLDER --data FILE --minutes 9

Its primary outcome is the mean test top-1 of the uniform configurations that the profile names as
`primary`, such as 3 to 6 bits. It is measured before any policy is searched.
"""

import hashlib
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
from ..files import load_weights, remembered, save_json
from ..models import create
from ..network.bits import BitConfig
from ..network.cost import bitops_at
from ..network.supernet import Supernet
from ..report.claims import differences
from ..report.runs import measure, provenance, save_run
from ..search.assignment import front
from ..search.error import kl_error
from ..search.sensitivity import quick_table
from ..training.evaluation import evaluate
from ..training.loop import Run, TrainConfig, train
from .arms import KINDS, Setting
from .command import TIMED_STEPS, Command, agree_on_plan, load_splits, make_runs, time_steps
from .idm_density import compare_outputs, idm_share, sampled
from .latent_distance import LatentProbe
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

    @property
    def start(self) -> dict:
        """What the supernets start from, beside the training of the float network."""
        file = self.setting.float_weights
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
        return {"cutout": self.setting.float_cutout, "float_weights_sha256": digest}

    def rows_file(self, kind: str, arm: str, seed: int) -> Path:
        """Where `run` stores its rows."""
        return self.file(f"{arm}-{seed}-{kind}.json")

    def train(
        self,
        model: nn.Module,
        images: Dataset,
        config: TrainConfig,
        name: str,
        about: Mapping,
        probe: LatentProbe | None = None,
    ) -> tuple:
        """Trains a network with the checkpoint `name`; returns it and its history."""
        self.deadline.check()
        file = self.file(f"{name}.pt")
        stop = self.deadline.watch(file)

        def watch(run: Run) -> None:
            if probe:
                probe(run)
            stop(run)

        how = dict(device=self.device, label=name, about=self.setting.about | about)
        return train(model, images, config, checkpoint=file, watch=watch, **how)

    def train_float(self, seed: int) -> nn.Module:
        """The float network that all arms of a seed start from: stored, or trained now."""
        setting = self.setting
        config, cutout = setting.float_config(seed), setting.float_cutout
        torch.manual_seed(config.seed)
        network = create(setting.model, len(self.splits.classes))
        if setting.float_weights:
            load_weights(Path(setting.float_weights), network)
            return network.to(self.device).eval()
        images = replace(self.splits.train, cutout=cutout) if cutout else self.splits.train
        name, about = f"float-{config.seed}", {"cutout": cutout} if cutout else {}
        return self.train(network, images, config, name, about)[0]

    def build_supernet(self, network: nn.Module, arm: str) -> Supernet:
        """Converts a float network with the options of an arm."""
        batch_size = self.setting.arm_config(arm, 0).batch_size
        examples = self.splits.calibration[:batch_size][0].to(self.device)
        options = self.setting.arms[arm].get("supernet", {})
        return Supernet(network, examples, self.setting.arm_bits(arm), **options)

    def train_arm(self, arm: str, seed: int) -> Supernet:
        """Trains the supernet of one arm and seed. Raises ValueError for an unknown arm."""
        setting, name = self.setting, f"{arm}-{seed}"
        config = setting.arm_config(arm, seed)
        supernet = self.build_supernet(self.train_float(seed), arm)
        about = {"supernet": setting.arms[arm].get("supernet", {}), "start": self.start}
        watched = [b for b in setting.watched if b in setting.arm_bits(arm)]
        probe = None
        if watched:
            probe = LatentProbe(supernet.searchable, watched, self.file(f"{name}-latent.csv"))
        supernet, history = self.train(supernet, self.splits.train, config, name, about, probe)
        save_json(self.file(f"{name}-history.json"), history)
        return supernet

    def measure(self, supernet: Supernet, config: BitConfig) -> dict[str, object]:
        """Cost and accuracy of one configuration, and which test images it classifies correctly."""
        images = self.setting.recalibration_images
        return measure(
            supernet, config, self.splits, images=images, device=self.device, per_image=True
        )

    def measure_uniform(self, supernet: Supernet, arm: str, seed: int) -> list[dict]:
        """Measures the uniform configurations, and the primary outcome."""
        setting, bits = self.setting, self.setting.uniform_bits(arm)
        found = {b: self.measure(supernet, supernet.uniform(b)) for b in bits}
        rows = [{"configuration": f"uniform {b}"} | row for b, row in found.items()]
        if setting.primary and set(setting.primary) <= set(bits):
            numbers = pd.DataFrame([found[b] for b in setting.primary])
            mean = numbers.drop(columns=["top1_low", "top1_high", "correct"]).mean().to_dict()
            rows.append({"configuration": setting.primary_name} | mean)
        return rows

    def measure_policies(self, supernet: Supernet, arm: str, seed: int) -> list[dict]:
        """Finds a policy at each level by `front`, then measures them.

        The error to keep small is the KL divergence from the largest bits; it needs no labels.
        """
        x, _ = self.splits.search[: self.setting.search_images]
        error, levels = kl_error(supernet, x.to(self.device)), self.setting.arm_levels(arm)
        budgets = [bitops_at(supernet.table, level) for level in levels]
        table = quick_table(supernet, error)
        table.save(self.file(f"{arm}-{seed}-sensitivity.csv"))
        found = front(supernet, error, budgets, table) if budgets else []
        return [
            {"configuration": f"searched {level}", "kl": step.error}
            | self.measure(supernet, step.config)
            | {"policy": {name: list(bits) for name, bits in step.config.items()}}
            for level, step in zip(levels, found, strict=True)
        ]

    def measure_outputs(self, supernet: Supernet, arm: str, seed: int) -> list[dict]:
        """Distances of layer outputs at the smallest bits from those at the largest (Fig. 3, 4)."""
        setting, bits = self.setting, self.setting.arm_bits(arm)
        x, _ = self.splits.search[: setting.compared_images]
        images = setting.recalibration_images
        rows, outputs = compare_outputs(
            supernet, x, self.splits.train, min(bits), max(bits), self.device, images=images
        )
        config = setting.arm_config(arm, 0)
        weight, batch_size = config.idm_weight, config.batch_size
        share = idm_share(supernet, self.splits, weight, batch_size, 0, self.device)

        def drawn(layer: str) -> dict[int, list[float]]:
            """Some outputs of a layer by bit-width, for a picture of their densities."""
            return {b: sampled(values[layer], 2000).tolist() for b, values in outputs.items()}

        return [row | {"idm_share": share, "drawn": drawn(row["layer"])} for row in rows]

    def run(self, kind: str, arm: str, seed: int) -> list[dict]:
        """Rows of an arm and seed of one of KINDS.

        Trains the arm and measures it, unless the rows are stored.
        """
        measure_kind = {
            "uniform": self.measure_uniform,
            "policies": self.measure_policies,
            "outputs": self.measure_outputs,
        }[kind]

        def compute() -> list[dict]:
            supernet = self.train_arm(arm, seed)
            self.deadline.check(self.seconds.get(kind, 0))
            return [{"arm": arm, "seed": seed} | row for row in measure_kind(supernet, arm, seed)]

        about = self.setting.about_arm(arm, kind)
        return remembered(self.rows_file(kind, arm, seed), about, compute)

    def run_arm(self, arm: str, seed: int) -> list[dict]:
        """All rows of an arm and seed: uniform configurations, then policies."""
        return [row for kind in ("uniform", "policies") for row in self.run(kind, arm, seed)]

    def run_float(self, seed: int) -> dict:
        """Trains the float network of a seed; returns its test top-1 in %."""
        config = self.setting.float_config(seed)

        def compute() -> dict:
            tested = evaluate(self.train_float(seed), self.splits.test, device=self.device)
            return {"seed": config.seed, "top1": 100 * tested.top1}

        about = self.setting.about | {"start": self.start} | asdict(config)
        return remembered(self.file(f"float-{config.seed}.json"), about, compute)


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
    seconds["uniform"] = (time.perf_counter() - start) * len(setting.uniform_bits(arm))
    start = time.perf_counter()
    lowest.measure_policies(supernet, arm, 0)
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
    """Kind, arm and seed of all runs, in order: whole seeds first, each arm measured at once."""
    setting = command.setting
    seeds = command.seeds if setting.float_seed is None else command.seeds[:1]
    floats = [("float", None, seed) for seed in seeds]
    arms = [(arm, seed) for seed in command.seeds for arm in setting.arms]
    return floats + [(kind, arm, seed) for arm, seed in arms for kind in setting.kinds]


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
    study.deadline.wait_for(study.file(f"float-{study.setting.float_seed_of(seed)}.json"))
    if kind != "uniform":
        study.deadline.wait_for(study.rows_file("uniform", arm, seed))
    rows = study.run(kind, arm, seed)
    found = [f"{r['configuration']} {r['top1']:.1f}%" for r in rows if "top1" in r]
    return f"{arm}, seed {seed}: " + (", ".join(found) or kind)


def collect(study: Study, seeds: Sequence[int], kinds: Sequence[str] = KINDS) -> list[dict]:
    """The stored rows of seeds that are whole: of a kind, those that are measured in every arm."""
    rows, arms = [], list(study.setting.arms)
    for seed in seeds:
        for kind in kinds:
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
        seconds = sum(epoch["seconds"] for epoch in history)
        rows.append(
            {"arm": arm, "seed": seed, "decisions": decisions} | last | {"seconds": seconds}
        )
    return rows


def report(command: Command, study: Study, seconds: float) -> None:
    """Writes the results of all whole seeds, and prints the arms beside the first one.

    The files are metrics.csv, parameters.yaml, provenance.json and training.json.
    """
    done = sum(study.rows_file(*run).exists() for run in planned_runs(command) if run[0] != "float")
    total = len(planned_runs(command)) - len(command.seeds)
    remark = "" if done == total else "; the same command resumes"
    print(f"{done} of {total} runs are done{remark}")
    setting, found = study.setting, collect(study, command.seeds, ["uniform", "policies"])
    policies = [
        {key: row[key] for key in ("arm", "seed", "configuration", "policy")}
        for row in found
        if "policy" in row
    ]
    metrics = pd.DataFrame(found).drop(columns="policy", errors="ignore")
    if metrics.empty:
        print("No seed is whole yet: no results are written")
        return
    seeds, images = [int(seed) for seed in metrics["seed"].unique()], len(study.splits.train)
    one_start = setting.float_seed is not None
    training = {
        "float": [study.run_float(seed) for seed in (seeds[:1] if one_start else seeds)],
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
    documents = dict(training=training, policies=policies)
    save_run(
        command.output,
        parameters=parameters,
        metrics=metrics,
        source=source,
        figures={},
        **documents,
    )
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
