"""What one-shot training costs, as ratios measured side by side: `python -m mpqlib.benchmark`."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import models
from .quantizer import compile_quantizers
from .scheduler import turbulence
from .supernet import Supernet
from .training import Run, TrainConfig, update


def seconds(task: Callable[[], object]) -> float:
    """Wall time of one call of `task`, in s."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def training_step(
    name: str, size: int = 64, batch: int = 64, repeats: int = 5, compile: bool = False
) -> list[float]:
    """Ratios of a one-shot step (1 largest + 3 random passes, IDM, update) to four plain passes.

    One ratio per repeat; `size` in pixels. A plain pass is forward and backward of the float model
    in the same memory format. `compile`: quantizers by torch.compile.
    """
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,))
    plain = models.create(name, 10).to(memory_format=torch.channels_last).train()
    supernet = Supernet(models.create(name, 10), x).to(memory_format=torch.channels_last).train()
    if compile:
        compile_quantizers(supernet)
    run = Run.start(TrainConfig(), supernet)
    run.set_learning_rate(1)

    def four_plain_passes() -> None:
        for _ in range(4):
            F.cross_entropy(plain(x), y).backward()
        plain.zero_grad()

    tasks = four_plain_passes, lambda: update(run, x, y)
    for task in tasks:  # warm up
        task()
    pairs = [[seconds(task) for task in tasks] for _ in range(repeats)]
    return [ours / theirs for theirs, ours in pairs]


def turbulence_call(name: str, repeats: int = 9) -> list[float]:
    """Milliseconds that the turbulence of all of a model's layers takes, per repeat."""
    supernet = Supernet(models.create(name, 10), torch.randn(2, 3, 64, 64))
    layers = list(supernet.layers.values())
    return [1e3 * seconds(lambda: [turbulence(layer) for layer in layers]) for _ in range(repeats)]


def main() -> None:
    """Prints the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    for name in parser.parse_args().models:
        rows = {
            "training step / 4 plain passes": training_step(name),
            "the same, quantizers compiled": training_step(name, compile=True),
            "turbulence (ms)": turbulence_call(name),
        }
        for label, values in rows.items():
            middle, spread = statistics.median(values), f"{min(values):.2f} to {max(values):.2f}"
            print(f"{name}: {label} = {middle:.2f} ({spread}, n = {len(values)})")


if __name__ == "__main__":
    main()
