"""One bit-width for all weights against mixed ones at equal model size: width as free parameter.

At a given size, fewer bits allow a wider network. The study is also a command, which needs no
notebook, ends within its minutes and resumes:

    python -m mpqlib.studies.one_bitwidth PROFILE --output FOLDER --data FILE --minutes 9

Source: One Weight Bitwidth to Rule Them All (arXiv 2008.09916).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil
from numbers import Integral
from pathlib import Path

import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Subset

from ..data import Splits, draw
from ..files import remembered
from ..models import CIFAR_NETWORKS, create
from ..network.bits import BitConfig, Candidates, check_bits, check_weight_bits, largest, smallest
from ..network.cost import model_size
from ..network.quantizer import TERNARY
from ..network.supernet import LayerInfo, Supernet
from ..network.width import inner_layers, nearest_width, solve_width, weight_bytes
from ..report.claims import Claim, documents, table
from ..report.intervals import t_interval
from ..report.plots import COLOURS
from ..report.runs import measure, provenance, save_run
from ..search.error import batch_error
from ..search.greedy import greedy
from ..search.moves import Step
from ..training.loop import TrainConfig, train
from .command import (
    TIMED_STEPS,
    Command,
    agree_on_plan,
    load_splits,
    make_runs,
    time_steps,
)
from .parameters import check_training
from .processes import NEVER, Deadline, Team, run_processes

SEARCHED, FEWEST = "searched", "fewest bits"
MIXED = [SEARCHED, FEWEST]  # the arms that mix bit-widths
SHARED = "searched, shared weights"  # the searched policy before it is trained alone
# A network that is trained at one configuration: no rule that couples bit-widths.
ALONE = dict(random_paths=0, scheduler=False, idm=False, grid_weight=0.0, region_decay=False)
CLAIM = Claim(
    "One weight bit-width for all layers beats mixed bit-widths at equal size: test top-1 (%)",
    "top1",
    "one",
    "mixed",
    +1,
)


def name_arm(bits: float) -> str:
    """The arm in which all inner layers have these weight bits."""
    if bits == TERNARY:
        return "ternary"
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


@dataclass(frozen=True)
class SizeSetting:
    """Settings of the study. Raises ValueError for a value that is not allowed.

    First and last layers have `edge_bits`. All other layers have activations of `act_bits`, and
    weights of one of the bits in `single`, or mixed out of `candidates`.
    """

    families: dict  # network of models.CIFAR_NETWORKS -> sizes of its weights, in kB
    dataset: str
    train_images: int | None  # None: all
    search_share: float  # share of the training images held out for the search
    image_size: int  # side in pixels
    single: list  # weight bits: 1, 1.6 (ternary), 2 to 16
    candidates: list[int]  # weight bits from which the policies are mixed
    float_epochs: int  # of each network, before its quantizers
    epochs: int  # with quantizers: of each network alone, and of the supernet
    search_images: int  # images that the search scores on
    training: dict = field(default_factory=dict)  # options of TrainConfig, of all trainings
    float_training: dict = field(default_factory=dict)  # others for the float networks
    act_bits: int = 8
    edge_bits: int = 8
    recalibration_images: int = 2000  # training images for batch-norm statistics
    test_images: int | None = None  # test on so many, drawn by `data.draw`; None: all

    def __post_init__(self):
        check_families(self.families)
        if not isinstance(self.single, list) or not self.single:
            raise ValueError(f"single={self.single!r} is not allowed: bits, such as [1, 1.6, 2]")
        for bits in self.single:
            check_weight_bits("single", [bits])
        if len(set(self.single)) < len(self.single):
            raise ValueError(f"single={self.single!r} is not allowed: no bits may stand twice")
        check_bits("candidates", self.candidates)
        check_bits("act_bits", [self.act_bits])
        check_bits("edge_bits", [self.edge_bits])
        least = dict(float_epochs=0, epochs=0, search_images=1, recalibration_images=2)
        least |= {} if self.test_images is None else dict(test_images=1)
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}={value!r} is not allowed: a whole number from {low}")
        for name in ("training", "float_training"):
            check_training(name, getattr(self, name))
        for kind in ("float", "alone", "supernet"):
            self.config(kind, 0)

    @property
    def arms(self) -> list[str]:
        """The arms: single bit-widths, then mixed ones."""
        return [*map(name_arm, self.single), *MIXED]

    def config(self, kind: str, seed: int) -> TrainConfig:
        """How a "float" network, one at its bits "alone", or a "supernet" is trained."""
        epochs = self.float_epochs if kind == "float" else self.epochs
        own = {"float": self.float_training, "alone": ALONE, "supernet": {}}[kind]
        return TrainConfig(epochs=epochs, seed=seed, **self.training | own)

    @property
    def about(self) -> dict:
        """Settings that every training and search depends on."""
        others = {"families", "single"}
        return {name: value for name, value in asdict(self).items() if name not in others}


def check_families(families: Mapping[str, Sequence[float]]) -> None:
    """Raises ValueError unless each family is one of CIFAR_NETWORKS and has sizes in kB."""
    if not isinstance(families, Mapping) or not families:
        raise ValueError(f"families={families!r} is not allowed: a dict of network -> sizes")
    for name, sizes in families.items():
        if name not in CIFAR_NETWORKS:
            known = list(CIFAR_NETWORKS)
            raise ValueError(f"families={families!r}: {name!r} is not allowed: one of {known}")
        numbers = isinstance(sizes, list) and all(type(s) in (int, float) for s in sizes)
        if not numbers or not sizes or not all(0 < size <= 1e12 for size in sizes):
            raise ValueError(f"families[{name!r}]={sizes!r} is not allowed: a list of sizes in kB")
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"families[{name!r}]={sizes!r} is not allowed: none may stand twice")


def find_policies(
    path: Sequence[Step], table: Sequence[LayerInfo], sizes: Sequence[float]
) -> dict[str, BitConfig]:
    """Two kinds of policies on one greedy path, from the most bits to the fewest, by name.

    "searched", a space and the size: the first one within each of the `sizes`, in kB. "fewest
    bits": the smallest one whose error is at most that of the most bits. Raises ValueError for a
    size that none has.
    """
    found = {}
    for size in sizes:
        within = [step.config for step in path if model_size(table, step.config) <= 1000 * size]
        if not within:
            least = min(model_size(table, step.config) for step in path) / 1000
            raise ValueError(f"size={size} kB is not allowed: the fewest bits need {least:.1f} kB")
        found[f"{SEARCHED} {size}"] = within[0]
    lossless = [step.config for step in path if step.error <= path[0].error]
    return found | {FEWEST: min(lossless, key=partial(model_size, table))}


@dataclass(frozen=True)
class SizeStudy:
    """The runs of the study: what is finished is read from files in `folder`.

    `splits`: from `load_splits`. At the deadline, training raises OutOfTime.
    """

    setting: SizeSetting
    splits: Splits
    folder: Path
    device: torch.device
    deadline: Deadline = NEVER

    def file(self, *names: object) -> Path:
        """A file of the study."""
        return self.folder / ("-".join(map(str, names)).replace(" ", "_") + ".json")

    def build(self, family: str, width: float) -> nn.Module:
        """A float network of a family."""
        return create(family, len(self.splits.classes), width=width)

    def find_width(self, family: str, size: float, arm: str, bits: Mapping[str, float]) -> float:
        """The width at which a family has `size` kB. `bits`: of its inner layers.

        A single bit-width must meet the size within 1%. A policy takes the nearest width, because
        its seed decides which sizes there are.
        """
        given = partial(self.build, family), bits, self.setting.edge_bits, 1000 * size
        return nearest_width(*given)[0] if arm in MIXED else solve_width(*given)

    def check_sizes(self, family: str) -> None:
        """Raises ValueError, before any training, for a size that an arm cannot have."""
        network = self.build(family, 1.0)
        inner, edge = inner_layers(network), self.setting.edge_bits
        fewest = dict.fromkeys(inner, min(self.setting.candidates))
        least = weight_bytes(network, fewest, edge) / 1000
        for size in self.setting.families[family]:
            if size < least:
                raise ValueError(
                    f"size={size} kB is not allowed: {family} at width 1 needs {least:.1f} kB with "
                    "the fewest bits"
                )
            for bits in self.setting.single:
                self.find_width(family, size, name_arm(bits), dict.fromkeys(inner, bits))

    def train(self, model: nn.Module, kind: str, seed: int) -> nn.Module:
        """Trains a network; see `SizeSetting.config`."""
        self.deadline.check()
        how = dict(device=self.device, label=kind, watch=lambda run: self.deadline.check())
        return train(model, self.splits.train, self.setting.config(kind, seed), **how)[0]

    def train_float(self, family: str, width: float, seed: int) -> nn.Module:
        """Trains a float network."""
        torch.manual_seed(seed)
        return self.train(self.build(family, width), "float", seed)

    def quantize(self, network: nn.Module, bits: Mapping[str, Sequence[float]]) -> Supernet:
        """Converts a float network. `bits`: weight candidates of its inner layers by name."""
        examples = self.splits.calibration[: self.setting.config("alone", 0).batch_size][0]
        act = (self.setting.act_bits,)
        own = {name: Candidates(tuple(weight), act) for name, weight in bits.items()}
        edge = self.setting.edge_bits
        return Supernet(network, examples.to(self.device), act, edge_bits=edge, overrides=own)

    def measure(self, supernet: Supernet, config: BitConfig) -> dict[str, float]:
        """Cost and accuracy of one configuration."""
        splits, tested = self.splits, self.setting.test_images
        if tested is not None:
            test = Subset(splits.test, draw(splits.test, tested))
            splits = replace(splits, test=test)
        images = self.setting.recalibration_images
        return measure(supernet, config, splits, images=images, device=self.device)

    def train_supernet(self, family: str, seed: int) -> Supernet:
        """Trains the supernet of width 1, out of which the policies are searched."""
        network = self.train_float(family, 1.0, seed)
        candidates = dict.fromkeys(inner_layers(network), self.setting.candidates)
        return self.train(self.quantize(network, candidates), "supernet", seed)

    def search_path(self, supernet: Supernet) -> list[Step]:
        """One greedy search by size, from the most bits to the fewest."""
        x, y = self.splits.search[: self.setting.search_images]
        error = batch_error(supernet, x.to(self.device), y.to(self.device))
        least = model_size(supernet.table, smallest(supernet.candidates))
        return greedy(supernet, error, size=least, up=False, weights_first=False)

    def search(self, family: str, seed: int) -> dict:
        """The policies of a seed: bits of the inner layers, and the rows of the shared weights."""

        def compute() -> dict:
            self.check_sizes(family)
            supernet = self.train_supernet(family, seed)
            sizes = self.setting.families[family]
            policies = find_policies(self.search_path(supernet), supernet.table, sizes)
            inner = supernet.searchable
            bits = {name: {n: c[n].weight for n in inner} for name, c in policies.items()}
            shared = {s: self.measure(supernet, policies[f"{SEARCHED} {s}"]) for s in sizes}
            return {"bits": bits, "shared": {str(size): row for size, row in shared.items()}}

        about = self.setting.about | {"sizes": self.setting.families[family]}
        return remembered(self.file("policies", family, seed), about, compute)

    def bits_of(self, family: str, size: float, arm: str, seed: int) -> dict[str, float]:
        """Weight bits of the inner layers in an arm, by name."""
        if arm in MIXED:
            name = FEWEST if arm == FEWEST else f"{SEARCHED} {size}"
            return self.search(family, seed)["bits"][name]
        bits = {name_arm(b): b for b in self.setting.single}[arm]
        return dict.fromkeys(inner_layers(self.build(family, 1.0)), bits)

    def row_file(self, family: str, size: float, arm: str, seed: int) -> Path:
        """Where `run` stores its row."""
        return self.file(family, size, arm, seed)

    def run(self, family: str, size: float, arm: str, seed: int) -> dict:
        """Trains the network of an arm at its width and bits, from scratch; returns its row."""

        def compute() -> dict:
            bits = self.bits_of(family, size, arm, seed)
            width = self.find_width(family, size, arm, bits)
            network = self.train_float(family, width, seed)
            supernet = self.quantize(network, {name: [b] for name, b in bits.items()})
            supernet = self.train(supernet, "alone", seed)
            about = {"family": family, "size_kb": size, "arm": arm, "seed": seed, "width": width}
            return about | self.measure(supernet, largest(supernet.candidates))

        about = self.setting.about | dict(family=family, size=size, arm=arm, seed=seed)
        return remembered(self.row_file(family, size, arm, seed), about, compute)

    def rows(self, seed: int) -> list[dict]:
        """All rows of a seed, with those of the shared weights."""
        found = [self.run(*where, seed) for where in places(self.setting)]
        for family, sizes in self.setting.families.items():
            shared = self.search(family, seed)["shared"]
            for size in sizes:
                about = {"family": family, "size_kb": size, "arm": SHARED, "seed": seed}
                found.append(about | {"width": 1.0} | shared[str(size)])
        return found


def places(setting: SizeSetting) -> Iterator[tuple[str, float, str]]:
    """Family, size and arm of all networks of a seed."""
    for family, sizes in setting.families.items():
        for size in sizes:
            for arm in setting.arms:
                yield family, size, arm


def choose_arms(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of arms "one" and "mixed": the best single bit-width, and the better way to mix.

    Both are chosen for each family and size by the mean top-1 on the search split. Column `of`: the
    chosen arm.
    """
    metrics, chosen = metrics[metrics["arm"] != SHARED], []
    for _, part in metrics.groupby(["family", "size_kb"], sort=False):
        for arm, own in (("one", ~part["arm"].isin(MIXED)), ("mixed", part["arm"].isin(MIXED))):
            means = part[own].groupby("arm", sort=False)["search_top1"].mean()
            best = part[part["arm"] == means.idxmax()]
            chosen.append(best.assign(arm=arm, of=best["arm"]))
    return pd.concat(chosen, ignore_index=True)


def size_plot(metrics: pd.DataFrame) -> Figure:
    """Test top-1 (%) over model size (kB), a panel for each family, a line for each arm.

    Means over seeds with 95% t-intervals. A bit-width has its colour; mixed arms are grey, dashed.
    """
    families = list(metrics["family"].unique())
    size = (5 * len(families), 4.2)
    figure, axes = plt.subplots(1, len(families), figsize=size, layout="constrained", squeeze=False)
    singles = {name_arm(bits): colour for bits, colour in COLOURS.items()}
    mixed = dict(zip((*MIXED, SHARED), ("0", "0.4", "0.65"), strict=True))
    arms = [arm for arm in metrics["arm"].unique() if arm in singles | mixed]
    for axis, family in zip(axes[0], families, strict=True):
        rows = metrics[metrics["family"] == family]
        for i, arm in enumerate(arms):
            groups = rows[rows["arm"] == arm].groupby("size_kb")["top1"]
            points = pd.DataFrame([t_interval(v) for _, v in groups], index=list(groups.groups))
            places = points.index * (1 + 0.012 * (i - len(arms) / 2))  # arms side by side
            half = (points["high"] - points["mean"]).fillna(0)  # one seed has no interval
            style = dict(color=(singles | mixed)[arm], marker="osD^v<>P*"[i % 9], capsize=2)
            style |= dict(linestyle="--" if arm in mixed else "-", label=arm)
            axis.errorbar(places, points["mean"], half, **style)
        ticks = sorted(rows["size_kb"].unique())
        axis.set(xscale="log", title=family, xlabel="size of the weights (kB, log scale)")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axis.minorticks_off()
    axes[0, 0].set_ylabel("test top-1 (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right center")
    return figure


def seconds_of_seed(study: SizeStudy) -> dict[str, float]:
    """Measured seconds of one seed: `epoch` of all its trainings, and `rest`, what is left.

    At each size, the widest network with a single bit-width is timed in place of all arms.
    """
    setting, rest, epoch = study.setting, 0.0, 0.0
    steps = len(study.splits.train) // setting.config("alone", 0).batch_size
    enough = ceil((TIMED_STEPS + 3) / max(steps, 1))

    def seconds_of_epoch(model: nn.Module, kind: str) -> float:
        config = replace(setting.config(kind, 0), epochs=enough)
        train_model = partial(train, model, study.splits.train, config, device=study.device)
        return steps * time_steps(lambda watch: train_model(watch=watch))

    for family, sizes in setting.families.items():
        network = study.build(family, 1.0).to(study.device)
        rest += setting.float_epochs * seconds_of_epoch(network, "float")
        candidates = dict.fromkeys(inner_layers(network), setting.candidates)
        supernet = study.quantize(network.eval(), candidates)
        epoch += seconds_of_epoch(supernet, "supernet")
        start = time.perf_counter()
        study.search_path(supernet)
        rest += time.perf_counter() - start
        for size in sizes:
            arm = name_arm(min(setting.single))
            bits = study.bits_of(family, size, arm, 0)
            network = study.build(family, study.find_width(family, size, arm, bits))
            network = network.to(study.device)
            rest += len(setting.arms) * setting.float_epochs * seconds_of_epoch(network, "float")
            supernet = study.quantize(network.eval(), {name: [b] for name, b in bits.items()})
            epoch += len(setting.arms) * seconds_of_epoch(supernet, "alone")
            start = time.perf_counter()
            study.measure(supernet, largest(supernet.candidates))
            rest += (len(setting.arms) + 1) * (time.perf_counter() - start)
    return {"epoch": epoch, "rest": rest}


def work_on_sizes(rank: int, team: Team, command: Command) -> None:
    """One process of the command: takes runs until all are done or the time is used up.

    When all processes have stopped, the first one writes the results.
    """
    stopwatch = command.stopwatch(rank)
    splits = load_splits(command.setting, command.root, command.device)
    device = torch.device(command.device)
    study = SizeStudy(command.setting, splits, command.folder, device, command.deadline)

    def plan(seconds: Mapping[str, float], left: float) -> tuple[int, float]:
        share = len(command.seeds) / team.size / 0.9  # a tenth for what is not counted
        fitting = int((left / share - seconds["rest"]) // seconds["epoch"])
        return fitting, share * (seconds["rest"] + command.setting.epochs * seconds["epoch"])

    measure_seconds = partial(seconds_of_seed, study)
    found = agree_on_plan(command, team, rank, asdict(command.setting), measure_seconds, plan)
    study = replace(study, setting=replace(study.setting, epochs=found["epochs"]))
    make_runs(team, size_runs(command), partial(make_size_run, study), rank, stopwatch)
    seconds = stopwatch.seconds()
    team.barrier.wait()
    if rank == 0:
        report_sizes(command, study, seconds)


def size_runs(command: Command) -> list[tuple]:
    """Family, size, arm and seed of all runs, seed by seed: first its policies, without size."""
    runs = []
    for seed in command.seeds:
        runs += [(family, None, None, seed) for family in command.setting.families]
        runs += [(*where, seed) for where in places(command.setting)]
    return runs


def make_size_run(study: SizeStudy, family: str, size: float | None, arm: str | None, seed: int):
    """Makes one of `size_runs`, after what it needs; returns what was done, in words."""
    if size is None:
        study.search(family, seed)
        return f"{family}, seed {seed}: policies found"
    if arm in MIXED:
        study.deadline.wait_for(study.file("policies", family, seed))
    row = study.run(family, size, arm, seed)
    return f"{family}, {size:g} kB, {arm}, seed {seed}: test top-1 {row['top1']:.1f}%"


def whole_seeds(study: SizeStudy, seeds: Sequence[int]) -> list[int]:
    """The seeds all of whose rows are stored."""
    where = list(places(study.setting))
    return [s for s in seeds if all(study.row_file(*place, s).exists() for place in where)]


def save_sizes(folder: Path, parameters: Mapping, rows: pd.DataFrame, seconds: float) -> None:
    """Writes the results of the study with its claim: metrics.csv and the files beside it."""
    metrics = pd.concat([rows, choose_arms(rows)], ignore_index=True)
    seeds = [int(seed) for seed in metrics["seed"].unique()]
    stored = dict(parameters=parameters, metrics=metrics, figures={"sizes": size_plot(rows)})
    claims = documents([CLAIM])
    save_run(folder, source=provenance(seeds, seconds), claims=claims, **stored)


def report_sizes(command: Command, study: SizeStudy, seconds: float) -> None:
    """Writes the results of all whole seeds, and prints the means and the claim."""
    seeds = whole_seeds(study, command.seeds)
    print(f"{len(seeds)} of {len(command.seeds)} seeds are whole; the same command resumes")
    if not seeds:
        print("No results are written")
        return
    rows = pd.DataFrame([row for seed in seeds for row in study.rows(seed)])
    images = len(study.splits.train)
    parameters = asdict(study.setting) | dict(
        seeds=seeds,
        training_images=images,
        images_seen=(study.setting.float_epochs + study.setting.epochs) * images,
        device=command.device,
        processes=command.processes,
    )
    save_sizes(command.output, parameters, rows, seconds)
    means = rows.pivot_table(index="arm", columns=["family", "size_kb"], values="top1", sort=False)
    print(means.round(1).to_string())
    print(table(choose_arms(rows), [CLAIM]), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with these arguments, of this process by default."""
    command = Command.parse(SizeSetting, __doc__, arguments)
    run_processes(work_on_sizes, command.processes, command)


if __name__ == "__main__":
    main()
