"""What one-shot quantization costs, side by side: `python -m mpqlib.studies.benchmark`."""

import argparse
import math
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .. import models
from ..files import save_atomically
from ..network.bits import largest
from ..network.cost import bitops_at
from ..network.quantizer import integer_range, lsq
from ..network.supernet import Supernet
from ..report import runs
from ..search.assignment import front
from ..search.error import batch_error
from ..search.greedy import greedy
from ..search.sensitivity import measure_sensitivity
from ..training.evaluation import recalibrate, select_device
from ..training.loop import Run, TrainConfig, update
from ..training.scheduler import turbulence
from ..training.speed import seconds
from ..training.step import OneShotStep
from .parameters import MODEL, Rule, items, number, one_of, whole


def ratios(task: Callable[[], object], base: Callable[[], object], repeats: int) -> list[float]:
    """Times of `task` over those of `base`, called in turn; each twice before, to warm up."""
    for each in (base, task) * 2:
        each()
    return [seconds(task) / seconds(base) for _ in range(repeats)]


def setting(
    name: str, size: int, batch: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor, nn.Module, Supernet]:
    """Random images and labels, a plain network and a supernet of the same kind, to train."""
    layout = dict(memory_format=torch.channels_last)
    x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    supernet = Supernet(models.create(name, 10), x).to(device, **layout).train()
    plain = models.create(name, 10).to(device, **layout).train()
    return x.to(device, **layout), y.to(device), plain, supernet


# How torch.compile runs the passes of a step. "captured": CUDA replays one captured graph.
MODES = {"eager": None, "compiled": "default", "captured": "reduce-overhead"}


BENCHMARK_RULES = {
    "models": items(MODEL),
    "modes": items(one_of(MODES)),
    "elements": whole(1),
    "search_models": items(MODEL),
    "literal_models": items(MODEL, least=0),
    "level": Rule("a number from 3 to 6", lambda value: number(3).holds(value) and value <= 6),
}


def one_shot_run(supernet: Supernet, batch: int, mode: str) -> Run:
    """A training run of `supernet` whose passes run as `mode` says, one of MODES."""
    run = Run.start(TrainConfig(batch_size=batch, compile="never"), supernet, images=batch)
    if MODES[mode]:
        run.one_shot = OneShotStep(supernet, compile=True, mode=MODES[mode])
    return run


def training_step(
    name: str,
    size: int = 64,
    batch: int = 64,
    repeats: int = 9,
    mode: str = "eager",
    device: str | torch.device = "cpu",
) -> list[float]:
    """Ratios of a one-shot step (1 largest + 3 random passes, IDM, update) to four plain passes.

    One ratio per repeat; `size` in pixels. A plain pass is forward and backward of the float model
    in the same memory format, not compiled. `mode`: one of MODES.
    """
    x, y, plain, supernet = setting(name, size, batch, device)
    run = one_shot_run(supernet, batch, mode)
    return ratios(lambda: update(run, x, y), four_passes(plain, plain, x, y), repeats)


def plain_passes(
    name: str,
    size: int = 64,
    batch: int = 64,
    repeats: int = 9,
    mode: str = "compiled",
    device: str | torch.device = "cpu",
) -> list[float]:
    """Ratios of compiled to plain forward and backward passes of the float model, as above."""
    x, y, plain, _ = setting(name, size, batch, device)
    compiled = torch.compile(plain, mode=MODES[mode])
    both = four_passes(compiled, plain, x, y), four_passes(plain, plain, x, y)
    return ratios(*both, repeats)


def four_passes(
    run: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], None]:
    """Returns a function of four passes, forward and backward. `run`: `model`, or compiled."""

    def passes() -> None:
        for _ in range(4):
            F.cross_entropy(run(x), y).backward()
        model.zero_grad()

    return passes


def throughput(
    name: str,
    size: int = 64,
    batch: int = 64,
    repeats: int = 9,
    mode: str = "eager",
    device: str | torch.device = "cpu",
) -> list[float]:
    """Images per second of one-shot training steps, data not counted, per repeat."""
    x, y, _, supernet = setting(name, size, batch, device)
    run = one_shot_run(supernet, batch, mode)
    times = [seconds(lambda: update(run, x, y)) for _ in range(repeats + 2)]
    return [batch / each for each in times[2:]]


def quantizer_ratios(
    elements: int = 2**22, bits: int = 4, repeats: int = 9, device: str | torch.device = "cpu"
) -> dict[str, list[float]]:
    """Forward and backward of LSQ and of PyTorch's own learnable quantizer, over a plain copy.

    The copy is that of the same tensor, there and back: what memory allows at best.
    """
    x = torch.randn(elements, device=device, requires_grad=True)
    step, grad = torch.tensor(0.3, device=device, requires_grad=True), torch.randn_like(x)
    bounds = torch.tensor(integer_range(bits, True), device=device).to(x)
    zero, low, high = torch.zeros(1, device=device), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    native, compiled = torch._fake_quantize_learnable_per_tensor_affine, torch.compile(lsq)
    tasks = {
        "ours": lambda: lsq(x, step, *bounds),
        "ours, compiled": lambda: compiled(x, step, *bounds),
        "PyTorch's own": lambda: native(x, step.view(1), zero, low, high, 1.0),
        "a copy": lambda: x.clone(),
    }
    both = {n: lambda f=f: torch.autograd.grad(f(), x, grad) for n, f in tasks.items()}
    copy = both.pop("a copy")
    return {name: ratios(task, copy, repeats) for name, task in both.items()}


def turbulence_call(name: str, repeats: int = 9, device: str | torch.device = "cpu") -> list[float]:
    """Milliseconds that the turbulence of all of a model's layers takes, per repeat."""
    layers = list(setting(name, 64, 2, device)[3].layers.values())

    def call() -> list[float]:
        return [turbulence(layer, layer.weight_quantizer.bits) for layer in layers]

    return [1e3 * seconds(call) for _ in range(repeats)]


def recalibration(
    name: str, size: int = 64, batch: int = 64, repeats: int = 5, device="cpu"
) -> list[float]:
    """Ratios of recalibrating one configuration on `batch` images to one float pass."""
    x, y, plain, supernet = setting(name, size, batch, device)
    images = torch.utils.data.TensorDataset(x.cpu(), y.cpu())
    config = supernet.uniform(4)
    how = dict(images=batch, batch_size=batch, device=device)
    with torch.inference_mode():
        return ratios(
            lambda: recalibrate(supernet, images, config, **how), lambda: plain.eval()(x), repeats
        )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of `sizes` by which `values` grow: slope of a straight line through the logs."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def growth_plot(searches: pd.DataFrame) -> Figure:
    """Time of searches over the number of layers, both axes logarithmic.

    `searches`: columns `model`, `layers`, `arm` and `seconds`.
    """
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    style = dict(hue="arm", style="arm", s=60, palette="colorblind", ax=axis)
    sns.scatterplot(searches, x="layers", y="seconds", **style)
    for row in searches.itertuples():
        place = dict(textcoords="offset points", xytext=(6, 4), fontsize=8)
        axis.annotate(row.model, (row.layers, row.seconds), **place)
    axis.set(xlabel="searchable layers", ylabel="time of a search (s)")
    axis.set(xscale="log", yscale="log", xlim=(None, 1.5 * searches["layers"].max()))
    axis.set(ylim=(None, 1.6 * searches["seconds"].max()))
    axis.tick_params(axis="x", which="both", length=4, labelsize=9)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False, title="search", loc="lower right")
    return figure


def saved_bytes(model: nn.Module, *inputs) -> int:
    """Bytes that one forward pass keeps for the backward pass, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    assert output.requires_grad  # the graph, and with it every storage, is alive until here
    return sum(kept.values())


def memory(name: str, size: int = 64, batch: int = 64, device="cpu") -> float:
    """What a pass at the largest bits keeps for its backward pass, over what a plain one keeps."""
    x, _, plain, supernet = setting(name, size, batch, device)
    return saved_bytes(supernet, x, largest(supernet.candidates)) / saved_bytes(plain, x)


def formats(
    name: str, size: int = 64, batch: int = 64, repeats: int = 5, device="cpu"
) -> dict[str, list[float]]:
    """Ratios of passes, forward and backward, in other formats to float32, channels-last."""
    x, y, plain, supernet = setting(name, size, batch, device)
    other = models.create(name, 10).to(device).train()
    kind = torch.device(device).type
    configs = [TrainConfig(batch_size=batch, dtype=dtype) for dtype in ("bfloat16", "float32")]
    # Each trains its own copy: two optimizers of one network can move a step size to zero.
    half, full = (Run.start(config, deepcopy(supernet), images=batch) for config in configs)

    def run(model: nn.Module, images: torch.Tensor, half: bool = False) -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(images), y)
        loss.backward()

    base = lambda: run(plain, x)  # noqa: E731
    return {
        "channels first / channels-last": ratios(lambda: run(other, x.contiguous()), base, repeats),
        "bfloat16 / float32": ratios(lambda: run(plain, x, True), base, repeats),
        "training step, bfloat16 / float32": ratios(
            lambda: update(half, x, y), lambda: update(full, x, y), repeats
        ),
    }


STEP_PARTS = {
    "convolutions": ("mkldnn_convolution", "convolution_backward", "cudnn_convolution", "addmm"),
    "batch norms": ("native_batch_norm", "cudnn_batch_norm", "batch_norm_backward"),
    "quantizers": ("LSQ",),
    "update": ("Optimizer.step", "foreach"),
}


def parts_of_step(name: str, size: int = 64, batch: int = 64, device="cpu") -> dict[str, float]:
    """Share in % of a one-shot step's processor time that each part takes (torch.profiler)."""
    x, y, _, supernet = setting(name, size, batch, device)
    run = Run.start(TrainConfig(batch_size=batch), supernet, images=batch)
    update(run, x, y)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        update(run, x, y)
    shares, total = dict.fromkeys(STEP_PARTS, 0.0), 0.0
    for event in record.events():
        if event.cpu_parent is None:
            total += event.cpu_time_total
    for event in record.events():
        for part, names in STEP_PARTS.items():
            inside, above = any(n in event.name for n in names), event.cpu_parent
            while inside and above is not None:
                inside = not any(n in above.name for n in names)
                above = above.cpu_parent
            shares[part] += event.cpu_time_total * inside
    shares["all else"] = total - sum(shares.values())
    return {part: 100 * spent / total for part, spent in shares.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least, largest and count."""
    numbers = dict(median=statistics.median(values), least=min(values), most=max(values))
    return {name: float(number) for name, number in numbers.items()} | {"n": len(values)}


# Networks of the command: name, side of the images in pixels, images in a step.
NETWORKS = {
    "cuda": [("resnet20_cifar", 32, 512), ("resnet18", 224, 128), ("mobilenet_v2", 224, 128)],
    "cpu": [("resnet18", 64, 64), ("mobilenet_v2", 64, 64)],
    "toy": [("test_resnet", 32, 16)],
}


FILE_COLUMNS = ["measure", "of", "median", "least", "most", "n", "took", "error"]  # of its file


def peak_memory(name: str, size: int, batch: int, device: str | torch.device) -> list[float]:
    """GiB of an accelerator's memory that a one-shot step takes at its peak."""
    x, y, _, supernet = setting(name, size, batch, device)
    run = one_shot_run(supernet, batch, "eager")
    update(run, x, y)
    torch.accelerator.reset_peak_memory_stats()
    update(run, x, y)
    return [torch.accelerator.max_memory_allocated() / 2**30]


def search_seconds(
    name: str, size: int, device: str | torch.device, images: int = 64
) -> dict[str, float]:
    """Seconds of a greedy search to 4 bits, of a sensitivity table, and of 12 budgets from it."""
    x, y, _, supernet = setting(name, size, images, device)
    error = batch_error(supernet, x, y)
    budgets = [bitops_at(supernet.table, level) for level in np.linspace(2.5, 5.5, 12)]
    found = {"search": seconds(lambda: greedy(supernet, error, bitops_at(supernet.table, 4)))}
    found["sensitivity table"] = seconds(lambda: measure_sensitivity(supernet, error))
    found["front of 12 budgets"] = seconds(lambda: front(supernet, error, budgets))
    return found


def measurements(
    networks: Sequence[tuple[str, int, int]], device: torch.device, repeats: int
) -> Iterator[tuple[str, str, Callable[[], Sequence[float]]]]:
    """Yields what the command measures: measure, network and the call that measures it."""
    modes = ["eager", "compiled"] + ["captured"] * (device.type == "cuda")
    for name, size, batch in networks:
        how = dict(size=size, batch=batch, device=device)
        for mode in modes:
            label = f"one-shot step, {mode} / 4 plain passes"
            yield label, name, partial(training_step, name, mode=mode, repeats=repeats, **how)
            label = f"one-shot images/s, {mode}"
            yield label, name, partial(throughput, name, mode=mode, repeats=repeats, **how)
        for mode in modes[1:]:
            label = f"plain passes, {mode} / not compiled"
            yield label, name, partial(plain_passes, name, mode=mode, repeats=repeats, **how)
        if device.type != "cpu":
            yield "peak memory of a step (GiB)", name, partial(peak_memory, name, **how)
        yield "turbulence of all layers (ms)", name, partial(turbulence_call, name, device=device)
    name, size, _ = networks[min(1, len(networks) - 1)]
    yield "seconds", name, partial(search_seconds, name, size, device)


@contextmanager
def time_limit(minutes: float, message: str) -> Iterator[None]:
    """Raises SystemExit with `message` if the block is not left within `minutes`."""

    def stop(*_) -> None:
        raise SystemExit(message)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def take_rows(measure: str, name: str, task: Callable[[], object]) -> list[dict]:
    """Measures by `task`; returns one row, or one for each entry if it returns a dict.

    An error of any kind, such as too little memory, becomes a row without values.
    """
    started, failure = time.perf_counter(), None
    try:
        values = task()
    except Exception as error:
        values, failure = math.nan, traceback.format_exception_only(error)[0].splitlines()[0][:200]
    took = dict(took=time.perf_counter() - started, error=failure)
    rows = []
    for kind, found in (values if isinstance(values, dict) else {"": values}).items():
        numbers = found if isinstance(found, Sequence) else [found]
        rows.append(dict(measure=f"{measure} {kind}".strip(), of=name, **summary(numbers), **took))
    return rows


def run_command(
    networks: Sequence[tuple[str, int, int]],
    device: torch.device,
    *,
    repeats: int,
    minutes: float,
    output: Path,
) -> None:
    """Measures one after the other, and writes each result to the csv file `output` at once.

    Stops when `minutes` are over; the measurement in work is then lost. Replaces what an earlier
    run left in `output`. Raises ValueError, before anything is measured, if it cannot be written.
    """
    rows: list[dict] = []

    def write() -> None:
        table = pd.DataFrame(rows, columns=FILE_COLUMNS)
        save_atomically(output, lambda part: table.to_csv(part, index=False))

    write()
    with time_limit(minutes, f"{minutes} minutes are over: {output} holds what was measured"):
        for measure, name, task in measurements(networks, device, repeats):
            found = take_rows(measure, name, task)
            print(*found, sep="\n", flush=True)
            rows += found
            write()


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mpqlib.studies.benchmark",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--minutes", type=float, default=6, help="stop after so many, above 0")
    parser.add_argument("--repeats", type=int, default=9, help="of each ratio, from 1")
    output = Path("runs/benchmark/metrics.csv")
    parser.add_argument("--output", type=Path, default=output, help="csv file to write")
    networks = "which networks are measured; None: those of the device"
    parser.add_argument("--networks", choices=NETWORKS, help=networks)
    options = parser.parse_args()
    if not 0 < options.minutes < math.inf or options.repeats < 1:
        parser.error("--minutes must be a number above 0, --repeats at least 1")
    device = select_device(options.device)
    networks = NETWORKS[options.networks or ("cuda" if device.type != "cpu" else "cpu")]
    how = dict(repeats=options.repeats, minutes=options.minutes, output=options.output)
    print(runs.provenance([], 0.0), flush=True)
    run_command(networks, device, **how)


if __name__ == "__main__":
    main()
