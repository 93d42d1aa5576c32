"""The number type of convolutions and linear layers: float32 or bfloat16."""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

DTYPES = "float32", "bfloat16"


def check_dtype(name: object) -> None:
    """Raises ValueError unless `name` is "float32", "bfloat16" or "auto"."""
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype={name!r} is not allowed: auto, float32 or bfloat16")


def seconds(task: Callable[[], object]) -> float:
    """Wall time of one call of `task`, in s, an accelerator's work included."""
    start = time.perf_counter()
    task()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def faster_dtype(step: Callable[[str], object], device: torch.device, repeats: int = 3) -> str:
    """The name of the type in which `step(name)` takes less time; float32 if they take the same.

    Each type runs once to warm up, then `repeats` times in turn. Medians are compared. All
    processes of torch.distributed get the same answer, for their mean; `device` is theirs.
    """
    times = [[seconds(partial(step, name)) for name in DTYPES] for _ in range(repeats + 1)]
    medians = torch.tensor(times[1:]).quantile(0.5, dim=0).to(device)
    if dist.is_initialized():
        dist.all_reduce(medians)
    float32, bfloat16 = medians.tolist()
    return "bfloat16" if bfloat16 < float32 else "float32"
