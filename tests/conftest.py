"""How pytest shares the cores, and a network and images small enough to train in a second."""

import gc
import os
from pathlib import Path

# One process for each core, one thread for each process: more threads than cores would wait for
# each other. Notebook kernels inherit the setting. It must stand before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mpqlib.network.supernet import Supernet
from mpqlib.studies.train import beside_float
from mpqlib.training.loop import TrainConfig

# A forked process does not collect the garbage of this one: a store of torch.distributed, for one,
# waits for its thread at its end, but a fork has no copy of the thread (SIGSEGV).
os.register_at_fork(after_in_child=gc.freeze)


# nbval reads the outputs of a cell when it has ended. If progress bars send more messages than fit
# into the queue, the last ones are lost, and nbval waits for them in vain. So bars move rarely.
os.environ.setdefault("TQDM_MININTERVAL", "5")  # s


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return 0 to run a single file without workers, or None for one worker for each core."""
    paths = [Path(argument.partition("::")[0]) for argument in config.args]
    return 0 if len(paths) == 1 and paths[0].is_file() else None


class TinyNet(nn.Module):
    """Three convolutions, one of them depth-wise and in a residual branch, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x))
        y += x
        return self.last(self.pointwise(y.relu()).mean((2, 3)))


class Normalised(nn.Module):
    """Normalises its images, in place or not, before TinyNet, or that network without norms."""

    def __init__(self, in_place: bool, norms: bool = True):
        super().__init__()
        self.in_place = in_place
        torch.manual_seed(0)
        self.net = TinyNet()
        if not norms:
            self.net.stem[1], self.net.norm = nn.Identity(), nn.Identity()

    def forward(self, x):
        if self.in_place:
            x.sub_(0.5).div_(0.25)
        return self.net(x if self.in_place else (x - 0.5) / 0.25)


# A short training in which all rules take part.
SMALL = TrainConfig(
    epochs=3,
    batch_size=16,
    schedule_parts=3,
    warmup=1,
    step_travel=0.01,
    freeze_start=1,
    freeze_every=1,
    grid_start=1,
)


def images(n: int, seed: int = 0) -> TensorDataset:
    """n images (3, 8, 8) of three classes, each brightest in its own channel."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    x[torch.arange(n), y] += 1
    return TensorDataset(x, y)


@pytest.fixture
def dataset() -> TensorDataset:
    return images(48)


@pytest.fixture
def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet(TinyNet(), images(16, seed=1).tensors[0], (2, 3, 4))


def measured(name, cost, search, test, loss=1.0):
    """One row of a table of evaluated configurations, from made-up values."""
    return {
        "configuration": name,
        "bitops_g": cost,
        "size_mb": cost,
        "search_top1": search,
        "search_loss": loss,
        "top1": test,
        "top1_low": test - 2,
        "top1_high": test + 2,
    }


@pytest.fixture
def metrics(supernet):
    """A table of a searched policy and uniform ones, with made-up values."""
    rows = [
        measured("searched", 2.9, 80.0, 75.0),
        measured("uniform 2", 1.0, 60.0, 99.0),  # best on the test split, which must not choose
        measured("uniform 3", 2.0, 70.0, 72.0),
        measured("uniform 4", 4.0, 90.0, 90.0),
    ]
    top1 = {"top1": 91.0, "top1_low": 89.0, "top1_high": 93.0}
    return beside_float(rows, top1, supernet.table)
