"""A study as a command: its profile, a plan that fits the time, and runs that processes share."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from .. import data
from ..data import Splits
from ..files import check_writable, remembered, save_json
from ..report.runs import Stopwatch
from ..training.evaluation import select_device
from ..training.loop import Run
from .parameters import check_parameters
from .processes import Deadline, OutOfTime, Team

TIMED_STEPS = 20


def load_splits(setting: Any, root: str | Path, device: str | torch.device) -> Splits:
    """The images of a study, decoded once, on the device.

    `setting`: has the fields `dataset`, `image_size`, `search_share` and `train_images`. `root`: as
    in `data.load`. Raises ValueError as `data.load` does.
    """
    check_parameters(data_root=root)
    how = dict(search_share=setting.search_share, train_images=setting.train_images)
    return data.load(setting.dataset, root, setting.image_size, **how).to(device)


def time_steps(train_on: Callable[[Callable[[Run], None]], object]) -> float:
    """Seconds of a training step, the mean of TIMED_STEPS after two others.

    `train_on(watch)` trains for at least so many steps.
    """
    times = []

    class Enough(Exception):
        pass

    def watch(run: Run) -> None:
        times.append(time.perf_counter())
        if len(times) > TIMED_STEPS + 2:
            raise Enough

    try:
        train_on(watch)
    except Enough:
        return (times[-1] - times[2]) / TIMED_STEPS
    raise RuntimeError(f"training ended after {len(times)} steps, too few to time")


@dataclass(frozen=True)
class Command:
    """What the command of a study runs, and until when."""

    setting: Any  # of the study; has `epochs`
    seeds: list[int]
    most_epochs: int | None  # None: as many as fit
    root: str  # of the data set
    output: Path
    device: str
    processes: int
    started: float  # in the seconds of `time.time`
    deadline: Deadline

    @classmethod
    def parse(
        cls, setting: type, description: str, arguments: Sequence[str] | None = None
    ) -> "Command":
        """Reads the command line, of this process by default, and the profile that it names.

        A profile holds the fields of the class `setting`, `seeds`, and if wanted `most_epochs`,
        `data_root` and `output_dir`. Raises TypeError or ValueError for what is unknown or not
        allowed.
        """
        started, parser = time.time(), argparse.ArgumentParser(description=description)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("profile", type=Path, help="YAML file of settings")
        data_help = "folder or file of the data set (default: the profile's data_root, or data)"
        parser.add_argument("--data", help=data_help)
        output_help = "folder to write to (default: the profile's output_dir)"
        parser.add_argument("--output", type=Path, help=output_help)
        device_help = "auto, cpu, cuda or mps (default: auto)"
        parser.add_argument("--device", default="auto", help=device_help)
        minutes_help = "end within so many, above 0 (default: no limit)"
        parser.add_argument("--minutes", type=float, help=minutes_help)
        processes_help = "number that share the device, from 1 (default: 1)"
        parser.add_argument("--processes", type=int, default=1, help=processes_help)
        given = parser.parse_args(arguments)
        if given.processes < 1 or (given.minutes is not None and not given.minutes > 0):
            parser.error("--processes starts at 1, --minutes must be above 0")
        profile = yaml.safe_load(given.profile.read_text())
        if not isinstance(profile, dict) or "seeds" not in profile:
            raise ValueError(
                f"{given.profile} is no profile: fields of {setting.__name__} and a list of seeds"
            )
        check_parameters(seeds=profile["seeds"])
        output = profile.pop("output_dir", None)
        seeds, most = profile.pop("seeds"), profile.pop("most_epochs", None)
        root = profile.pop("data_root", "data")
        if given.output is None and output is None:
            parser.error("--output is missing, and the profile has no output_dir")
        output = given.output or Path(output)
        check_writable(output / "metrics.csv")
        return cls(
            setting=setting(**profile),
            seeds=list(seeds),
            most_epochs=most,
            root=given.data or root,
            output=output,
            device=str(select_device(given.device)),
            processes=given.processes,
            started=started,
            deadline=Deadline.after(given.minutes),
        )

    @property
    def folder(self) -> Path:
        """Where the runs of the study lie."""
        return self.output / "runs"

    def stopwatch(self, rank: int) -> Stopwatch:
        """The time of one process, from the start of the command on."""
        stopwatch = Stopwatch(self.folder / f"time-{rank}.json")
        stopwatch.earlier += time.time() - self.started
        return stopwatch


def agree_on_plan(
    command: Command,
    team: Team,
    rank: int,
    about: Mapping,
    measure_seconds: Callable[[], Mapping[str, float]],
    plan: Callable[[Mapping[str, float], float], tuple[int, float]],
) -> dict:
    """The plan of a study, which is the same in all processes and when it resumes.

    It holds the `epochs` of each training, and measured `seconds`, which are none without a limit
    of time. `about`: settings that it depends on. `measure_seconds()`: of parts of the study, taken
    in all processes side by side. `plan(seconds, left)`: the epochs that fit into the seconds that
    are left, and the seconds needed at the setting's own epochs.
    """
    file, setting = command.folder / "plan.json", command.setting
    limited = command.deadline.end < inf
    if not file.exists() and limited:
        team.barrier.wait()
        save_json(command.folder / f"seconds-{rank}.json", measure_seconds())
    team.barrier.wait()

    def compute() -> dict:
        if not limited:
            return {"epochs": setting.epochs, "seconds": {}}
        files = [command.folder / f"seconds-{r}.json" for r in range(team.size)]
        seconds = pd.DataFrame([json.loads(f.read_text()) for f in files]).max().to_dict()
        left = command.deadline.left()
        epochs, needed = plan(seconds, left)
        if needed > left:
            print(
                f"The time does not suffice for {setting.epochs} epochs: about {needed / 60:.1f} "
                f"minutes are needed, {left / 60:.1f} are left. Whole seeds come first, and the "
                "same command resumes.",
                flush=True,
            )
        epochs = max(min(epochs, command.most_epochs or epochs), setting.epochs)
        print(f"{epochs} epochs of each training", flush=True)
        return {"epochs": epochs, "seconds": seconds}

    if rank == 0:
        remembered(file, about, compute)
    team.barrier.wait()
    return remembered(file, about, compute)


def make_runs(
    team: Team, runs: Sequence[tuple], make: Callable[..., str], rank: int, stopwatch: Stopwatch
) -> None:
    """Takes runs until all are done or the time is used up; prints what `make(*run)` returns."""
    try:
        for run in team.take(runs):
            print(make(*run), flush=True)
            stopwatch.seconds()
    except OutOfTime:
        print(f"process {rank + 1}: time is used up", flush=True)
