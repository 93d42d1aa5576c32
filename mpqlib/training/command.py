"""Trains a supernet as notebooks/03_train.ipynb does, in any number of processes.

    torchrun --nproc_per_node=4 -m mpqlib.training --profile FILE --data-root FOLDER

Each setting of a profile (a YAML file) is an option, too, and an option overrides the profile.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .. import data, models
from ..files import check_writable, save_atomically, save_json, save_weights
from ..network.cost import bitops
from ..network.supernet import Supernet
from .distributed import process_group, rank_and_size
from .loop import Run, TrainConfig, train

EXAMPLES = 64  # images that set the initial step sizes
LOG_EVERY = 100  # steps between two lines of output
IMAGENET = 1_281_167, 1000  # training images and classes, for a dry run without the data
WARM_UP, TIMED = 5, 20  # steps of a dry run
MEANINGS = {  # what each setting of a profile means, for --help
    "model": "name of a CNN of torchvision or timm",
    "pretrained": "true: start from the library's pretrained weights (a download)",
    "dataset": "digits, fashion-mnist, cifar10, cifar100, pets, imagenet, folder or npz",
    "data_root": "folder of the data set; digits needs none",
    "train_images": "train on at most this many images; null: all",
    "image_size": "side of the input in pixels",
    "bits": "candidate bit-widths, each from 2 to 16",
    "float_epochs": "epochs of the float network; 0: do not train it",
    "epochs": "epochs of the supernet",
    "scheduler": "dynamic bit-width scheduler, true or false",
    "idm": "information distortion mitigation, true or false",
    "batch_size": "images in a training step, of all processes together",
    "training": "further options of TrainConfig, for both networks",
    "seed": "of the initial weights and of all random numbers",
    "device": "auto, cpu, cuda or mps",
    "output_dir": "folder for weights and checkpoints",
    "workers": "processes that load images, for each training process",
    "checkpoint_minutes": "time between two checkpoints within an epoch",
    "log_dir": "folder to write to for TensorBoard; null: none",
}
TIMING_COLUMNS = ("model", "image_size", "batch_size", "processes", "device", "dtype", "compile")
TIMING_COLUMNS += ("timed_steps", "seconds_per_step", "images_per_second", "waiting")
TIMING_COLUMNS += ("hours", "memory_gb")


@dataclass(frozen=True)
class Profile:
    """What to train, on what and how: the parameters of notebooks/03_train.ipynb up to the search.

    The last four settings concern this command alone. `workers` belong to each process.
    """

    model: str = "resnet18"
    pretrained: bool = False
    dataset: str = "digits"
    data_root: str | None = None
    train_images: int | None = None
    image_size: int = 80
    bits: list = field(default_factory=lambda: [2, 3, 4, 5, 6])
    float_epochs: int = 4
    epochs: int = 3
    scheduler: bool = True
    idm: bool = True
    batch_size: int = 64
    training: dict = field(default_factory=lambda: {"lr": 0.02})
    seed: int = 0
    device: str = "auto"
    output_dir: str = "runs/03_train"
    workers: int = 0
    checkpoint_minutes: float = 10
    log_dir: str | None = None

    @property
    def about(self) -> dict:
        """What the notebook's checkpoints say of a run, beside its `TrainConfig`."""
        names = "model", "pretrained", "dataset", "train_images", "image_size", "bits"
        return {name: getattr(self, name) for name in names}

    @property
    def float_config(self) -> TrainConfig:
        """Settings of the float network's training."""
        shared = dict(batch_size=self.batch_size, seed=self.seed) | self.training
        return TrainConfig(epochs=self.float_epochs, **shared)

    @property
    def supernet_config(self) -> TrainConfig:
        """Settings of the supernet's training."""
        switches = dict(epochs=self.epochs, scheduler=self.scheduler, idm=self.idm)
        return replace(self.float_config, **switches)


def read_profile(path: Path | None, options: Mapping) -> Profile:
    """The profile in the YAML file `path`, or else the default one, overridden by `options`.

    `options["training"]` overrides single entries of `training`. Raises ValueError for a file that
    holds no settings, and for an unknown name in it.
    """
    found = yaml.safe_load(path.read_text("utf-8")) if path else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings: lines such as 'epochs: 3' are needed")
    defaults = asdict(Profile())
    if unknown := [key for key in found if key not in defaults]:
        raise ValueError(f"{path}: {unknown} are not settings; allowed are {list(defaults)}")
    values = defaults | found
    training = values["training"], options.get("training", {})
    if wrong := [each for each in training if not isinstance(each, dict)]:
        raise ValueError(f'training={wrong[0]!r} is not allowed: options such as "{{lr: 0.02}}"')
    if twice := [key for key in defaults if key in training[0] | training[1]]:
        raise ValueError(f"training: {twice} are not allowed here: they are settings of their own")
    return Profile(**values | dict(options) | {"training": training[0] | training[1]})


def load_images(profile: Profile, synthetic: bool) -> tuple[Dataset, Tensor, int]:
    """Training images, examples (N, 3, H, W) and the number of classes.

    `synthetic`: noise as large as ImageNet stands for the images. Raises ValueError without the
    folder of a data set, and for a folder that is not read.
    """
    p = profile
    if synthetic:
        count, classes = IMAGENET
        count = min(count - data.SEARCH_LIMIT, p.train_images or count)
        noise = data.Noise(count, classes, p.image_size)
        return noise, torch.stack([noise[i][0] for i in range(EXAMPLES)]), classes
    if p.data_root is None and p.dataset != "digits":
        raise ValueError(f"data_root is not set: name the folder of dataset={p.dataset!r}")
    if p.data_root is not None and p.dataset == "digits":
        raise ValueError(f"data_root={p.data_root!r} is not read by dataset='digits': name another")
    view = models.preprocessing(p.model) if p.pretrained else {}
    view |= dict(image_size=p.image_size, train_images=p.train_images)
    splits = data.load(p.dataset, p.data_root or "data", **view)
    examples = next(iter(data.loader(splits.calibration, EXAMPLES)))[0]
    return splits.train, examples, len(splits.classes)


class Speed:
    """Speed of a run's training since `start`."""

    def __init__(self, run: Run):
        self.run = run
        self.start()

    def start(self) -> None:
        """Measures from here on."""
        self.step, self.waited, self.began = self.run.step, self.run.waited, time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds a step, images a second, and the share of time in which it waited for images."""
        seconds, steps = time.perf_counter() - self.began, self.run.step - self.step
        return {
            "seconds_per_step": seconds / steps,
            "images_per_second": steps * self.run.config.batch_size / seconds,
            "waiting": (self.run.waited - self.waited) / seconds,
        }


def describe_speed(speed: Mapping[str, float]) -> str:
    """What `Speed.read` returns, as text."""
    rate, waiting = speed["images_per_second"], speed["waiting"]
    return f"{rate:.1f} images/s, {waiting:.0%} of the time waiting for images"


class Log:
    """Prints losses and speed of a run, and writes them for TensorBoard where `folder` is given.

    For `train(watch=...)`. Losses are means over the epoch so far, the speed is that since the last
    line. The float network and the supernet are two runs of TensorBoard, in folders of these names.
    Only the first process writes. Raises ImportError if TensorBoard is not installed.
    """

    def __init__(self, folder: str | None):
        self.first = rank_and_size()[0] == 0
        self.folder = Path(folder) if folder and self.first else None
        self.writer_class = find_tensorboard(folder) if self.folder else None
        self.speed: Speed | None = None

    def __call__(self, run: Run) -> None:
        if not self.first:
            return
        if self.speed is None or self.speed.run is not run:  # the first step of a training
            self.start(run)
            return
        step = run.step % run.steps or run.steps  # in its epoch, from 1
        if step % LOG_EVERY and step != run.steps:
            return
        losses = {name: float(total) / step for name, total in run.epoch.sums.items()}
        speed = self.speed.read()
        tqdm.write(  # above the progress bar
            f"epoch {run.epoch.row['epoch']} of {run.config.epochs}, step {step} of {run.steps}: "
            f"loss {losses['loss']:.3f}, {describe_speed(speed)}"
        )
        if self.folder:
            for name, value in (losses | speed).items():
                self.writer.add_scalar(name, value, run.step)
            self.writer.flush()
        self.speed.start()

    def start(self, run: Run) -> None:
        """Begins with the first step of a training, which may have resumed.

        Hides what was written for this step and later ones before it resumed: they come again.
        """
        self.speed = Speed(run)
        if self.folder:
            kind = "supernet" if isinstance(run.model, Supernet) else "float"
            self.writer = self.writer_class(str(self.folder / kind), purge_step=run.step)


def find_tensorboard(folder: str) -> type:
    """PyTorch's SummaryWriter. Raises ImportError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"log_dir={folder!r} needs TensorBoard: uv sync --extra tensorboard, or pip install "
            "tensorboard"
        ) from error
    return SummaryWriter


def say(text: str) -> None:
    """Prints `text` in the first process."""
    if rank_and_size()[0] == 0:
        print(text, flush=True)


class Enough(Exception):
    """A dry run has taken its steps; holds what `Speed.read` returned."""


def rehearse(profile: Profile, supernet: Supernet, dataset: Dataset, device: torch.device) -> dict:
    """Trains the supernet for some steps, and says how long the training would take.

    Returns the settings that matter for speed and what was measured, as a row of a table. Raises
    ValueError if the whole training has fewer steps than a dry run needs.
    """
    config, speeds = profile.supernet_config, []

    def watch(run: Run) -> None:
        if run.step == WARM_UP:
            speeds.append(Speed(run))
        if run.step == WARM_UP + TIMED:
            raise Enough(speeds[0].read())

    try:
        train(supernet, dataset, config, device=device, workers=profile.workers, watch=watch)
        needed = WARM_UP + TIMED
        raise ValueError(f"epochs={config.epochs} is not allowed: a dry run needs {needed} steps")
    except Enough as enough:
        (found,) = enough.args
    total = config.epochs * (len(dataset) // config.batch_size)
    say(f"{describe_speed(found)}, in {TIMED} timed steps")
    hours, memory = total * found["seconds_per_step"] / 3600, memory_used(device) / 1e9
    say(f"{hours:.3g} hours are expected for {total} steps of the supernet")
    say(f"{memory:.2f} GB of memory at most in the first process")
    return {
        "model": profile.model,
        "image_size": profile.image_size,
        "batch_size": config.batch_size,
        "processes": rank_and_size()[1],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "dtype": config.dtype,
        "compile": config.compile,
        "timed_steps": TIMED,
        **found,
        "hours": hours,
        "memory_gb": memory,
    }


def read_timings(path: Path) -> pd.DataFrame:
    """Rows that earlier dry runs added to the csv file `path`; none if it does not exist.

    Raises ValueError if the file is another one, or cannot be written.
    """
    check_writable(path)
    if not path.exists():
        return pd.DataFrame(columns=TIMING_COLUMNS)
    try:
        table = pd.read_csv(path)
    except ValueError as error:  # empty, or no table
        raise ValueError(f"timings={str(path)!r} cannot be read: {error}") from error
    if tuple(table.columns) != TIMING_COLUMNS:
        raise ValueError(f"timings={str(path)!r} is another table: columns {list(table.columns)}")
    return table


def append_row(path: Path, row: Mapping) -> None:
    """Adds a row to the csv file `path`, atomically."""
    table = pd.DataFrame([*read_timings(path).to_dict("records"), row])
    save_atomically(path, lambda part: table.to_csv(part, index=False))


def memory_used(device: torch.device) -> int:
    """The most bytes that this process has held on its device so far; on a CPU, in all."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def save_results(profile: Profile, supernet: Supernet, history: Sequence[dict]) -> None:
    """Writes weights, history and profile into the output folder, and says how to search."""
    folder = Path(profile.output_dir)
    save_weights(folder / "supernet.safetensors", supernet, profile.about)
    save_json(folder / "history.json", history)
    own = "workers", "checkpoint_minutes", "log_dir"  # the notebook does not know them
    given = {n: v for n, v in asdict(profile).items() if n not in own and v is not None}
    text = yaml.safe_dump(given, sort_keys=False)
    save_atomically(folder / "profile.yaml", lambda part: part.write_text(text))
    budget = -(-bitops(supernet.table, supernet.uniform(4)) // 10**6) / 1000  # rounded up
    say(
        f"{folder} holds the weights (supernet.safetensors), history.json and the checkpoints.\n"
        "From these, the notebook only searches, here at the BitOPs of 4 bits:\n"
        f"papermill notebooks/03_train.ipynb out.ipynb -f {folder / 'profile.yaml'} "
        f"-p bitops {budget}"
    )


def run_profile(profile: Profile, dry_run: bool = False, timings: Path | None = None) -> None:
    """Trains the float network, then the supernet, as 03_train does; resumes from checkpoints.

    `dry_run`: trains the supernet for a few steps, and writes nothing but a row of the csv file
    `timings`, if it is given. Raises ValueError, and what `train` raises, for settings that are not
    allowed.
    """
    p, folder = profile, Path(profile.output_dir)
    with process_group(p.device) as device:
        synthetic = dry_run and p.data_root is None and p.dataset == "imagenet"
        dataset, examples, classes = load_images(p, synthetic)
        torch.manual_seed(p.seed)
        # Downloads nothing for a dry run: its speed does not depend on the weights.
        network = models.create(p.model, classes, p.pretrained and not dry_run).to(device)
        kind, world = "synthetic images" if synthetic else "images", rank_and_size()[1]
        say(
            f"{p.model}: {len(dataset)} {kind} of {p.dataset} at {p.image_size} px, "
            f"{p.epochs} epochs of {len(dataset) // p.batch_size} steps\n"
            f"processes: {world} on {device.type}, {p.batch_size // world} images each in a step"
        )
        if dry_run:
            if timings:
                read_timings(timings)  # before the run
            row = rehearse(p, Supernet(network, examples.to(device), p.bits), dataset, device)
            if timings and rank_and_size()[0] == 0:
                append_row(timings, row)
            return
        check_writable(folder / "supernet.safetensors")
        how = dict(device=device, workers=p.workers, about=p.about, watch=Log(p.log_dir))
        how |= dict(checkpoint_minutes=p.checkpoint_minutes)
        file = dict(checkpoint=folder / "float.pt", label="float")
        network, _ = train(network, dataset, p.float_config, **file, **how)
        supernet = Supernet(network, examples.to(device), p.bits)
        file = dict(checkpoint=folder / "supernet.pt", label="supernet")
        supernet, history = train(supernet, dataset, p.supernet_config, **file, **how)
        if rank_and_size()[0] == 0:
            save_results(p, supernet, history)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m mpqlib.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    profile = "YAML file of settings"
    parser.add_argument("--profile", type=Path, default=None, metavar="FILE", help=profile)
    parser.add_argument("--dry-run", action="store_true", help="time a few steps, then stop")
    timings = "csv file that a dry run adds a row to"
    parser.add_argument("--timings", type=Path, default=None, metavar="FILE", help=timings)
    for name, value in asdict(Profile()).items():
        option = f"--{name.replace('_', '-')}"
        default = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
        text = f"{MEANINGS[name]} (default: {default})"
        parser.add_argument(option, type=yaml.safe_load, metavar="VALUE", help=text)
    options = vars(parser.parse_args(arguments))
    dry_run, path = options.pop("dry_run", False), options.pop("profile")
    timings = options.pop("timings")
    try:
        if timings and not dry_run:
            raise ValueError(f"timings={str(timings)!r} needs --dry-run")
        profile = read_profile(path, options)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    run_profile(profile, dry_run, timings)


if __name__ == "__main__":
    main()
