"""How training runs fastest: the number type of convolutions and linear layers, and compilation."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist

from ..network.bits import Candidates
from ..network.compilation import can_compile
from ..network.quantizer import most_bits

DTYPES = "float32", "bfloat16"
CHOICES = {"dtype": ("auto", *DTYPES), "compile": ("auto", "never", "always")}

# Minutes of training from which compilation is worth it. It takes one to five minutes on a CPU,
# where it saves some hundredths of a step at best; on an accelerator it was not measured.
WORTH_COMPILING = 120


def check_choice(name: str, value: object) -> None:
    """Raises ValueError unless `value` is one of the CHOICES of the setting `name`."""
    if value not in CHOICES[name]:
        *others, last = CHOICES[name]
        raise ValueError(f"{name}={value!r} is not allowed: {', '.join(others)} or {last}")


def fitting_dtype(dtype: str, candidates: Mapping[str, Candidates]) -> str:
    """The setting `dtype`, but float32 for "auto" if bfloat16 cannot hold all candidates' integers.

    `candidates`: of each layer, empty for a float network. Raises ValueError for bfloat16 then.
    """
    most = most_bits(torch.bfloat16)
    wide = {name: max(c.weight + c.act) for name, c in candidates.items()}
    wide = {name: bits for name, bits in wide.items() if bits > most}
    if not wide:
        return dtype
    if dtype == "bfloat16":
        name, bits = next(iter(wide.items()))
        raise ValueError(
            f"dtype='bfloat16' is not allowed: layer {name!r} has candidates of {bits} bits, but "
            f"bfloat16 holds whole numbers of {most} bits at most: use float32 or auto"
        )
    return "float32"


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


def is_worth_compiling(seconds: float, device: torch.device) -> bool:
    """Whether training that takes another `seconds` should be compiled, and can be."""
    return seconds >= 60 * WORTH_COMPILING and can_compile(device.type)
