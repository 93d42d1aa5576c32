"""The tasks of a study, shared by several processes that end within a time limit."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from ..training.loop import Run

RESERVE = 20  # seconds before the end that are kept for writing the results


class OutOfTime(Exception):
    """The time of a study is used up. What is finished is stored."""


@dataclass(frozen=True)
class Deadline:
    """The time at which a study stops, in the seconds of `time.time`. The default is never."""

    end: float = inf

    @classmethod
    def after(cls, minutes: float | None) -> "Deadline":
        """A deadline in `minutes` from now, less the reserve; None is never."""
        if minutes is None:
            return cls()
        return cls(time.time() + 60 * minutes - min(RESERVE, 20 * minutes))

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.time()

    def check(self, needed: float = 0) -> None:
        """Raises OutOfTime if fewer than `needed` seconds are left."""
        if self.left() < needed:
            raise OutOfTime

    def watch(self, checkpoint: Path) -> Callable[[Run], None]:
        """For `train`: writes `checkpoint` and raises OutOfTime when the time is used up."""

        def stop(run: Run) -> None:
            if self.left() >= 0:
                return
            # After the last step of an epoch, the epoch is not yet in the history: take another.
            if run.step % run.steps:
                run.save(checkpoint)
                raise OutOfTime
            if run.steps == 1:  # there is no other
                raise OutOfTime

        return stop

    def wait_for(self, file: Path) -> None:
        """Waits until `file` exists, which another process writes; raises OutOfTime."""
        while not file.exists():
            self.check()
            time.sleep(0.2)


NEVER = Deadline()


class Team:
    """What the processes of a study share: a barrier, and the number of tasks that are taken."""

    def __init__(self, size: int):
        context = torch.multiprocessing.get_context("spawn")
        self.size, self.barrier, self.taken = size, context.Barrier(size), context.Value("l", 0)

    def take(self, tasks: Sequence) -> Iterator:
        """Yields tasks in their order, each to one process alone. Call it once in each process."""
        while True:
            with self.taken.get_lock():
                number = self.taken.value
                self.taken.value += 1
            if number >= len(tasks):
                return
            yield tasks[number]


def run_processes(work: Callable, processes: int, *args: object) -> None:
    """Calls `work(rank, team, *args)` in new processes, with ranks from 0, and waits for them.

    They show no progress bars and divide the processor's cores, unless OMP_NUM_THREADS is set.
    They stop if one of them fails, whose error is raised, and if this process is killed.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, os.cpu_count() // processes))
    with _environment(OMP_NUM_THREADS=threads, TQDM_DISABLE="1"):
        torch.multiprocessing.spawn(_start, (work, Team(processes), *args), processes)


def _start(rank: int, work: Callable, team: Team, *args: object) -> None:
    """Calls `work` in a new process, which ends when the process that started it ends."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    work(rank, team, *args)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Within the block, new processes have these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
