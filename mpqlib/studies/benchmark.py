"""What one-shot quantization costs, side by side: `python -m mpqlib.studies.benchmark`."""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence

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
from ..network.bits import largest
from ..network.quantizer import integer_range, lsq
from ..network.supernet import Supernet
from ..training.evaluation import recalibrate
from ..training.loop import Run, TrainConfig, update
from ..training.scheduler import turbulence
from ..training.speed import seconds


def compare(
    tasks: Mapping[str, Callable[[], object]], base: Callable[[], object], repeats: int
) -> dict[str, list[float]]:
    """Times of each task over those of `base`, called in turn; each twice before, to warm up."""
    for each in (base, *tasks.values()) * 2:
        each()
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        least = seconds(base)
        for name, task in tasks.items():
            found[name].append(seconds(task) / least)
    return found


def ratios(task: Callable[[], object], base: Callable[[], object], repeats: int) -> list[float]:
    """Times of `task` over those of `base`, as in `compare`."""
    return compare({"task": task}, base, repeats)["task"]


def setting(
    name: str, size: int, batch: int, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor, nn.Module, Supernet]:
    """Random images and labels, a plain network and a supernet of the same kind, to train."""
    layout = dict(memory_format=torch.channels_last)
    x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    supernet = Supernet(models.create(name, 10), x).to(device, **layout).train()
    plain = models.create(name, 10).to(device, **layout).train()
    return x.to(device, **layout), y.to(device), plain, supernet


def training_step(
    name: str,
    size: int = 64,
    batch: int = 64,
    repeats: int = 9,
    device: str | torch.device = "cpu",
    compiled: bool = True,
) -> dict[str, list[float]]:
    """Ratios of a one-shot step (1 largest + 3 random passes, IDM, update) to four plain passes.

    One ratio per repeat; all are timed in turn. `size` in pixels. A plain pass is forward and
    backward of the float model in the same memory format. `compiled`: both by torch.compile, too.
    """
    x, y, plain, _ = setting(name, size, batch, device)

    def step(compile: str) -> Callable[[], object]:
        supernet = setting(name, size, batch, device)[3]
        run = Run.start(TrainConfig(batch_size=batch, compile=compile), supernet, images=batch)
        return lambda: update(run, x, y)

    def passes(model: Callable) -> Callable[[], object]:
        def run() -> None:
            for _ in range(4):
                F.cross_entropy(model(x), y).backward()
            plain.zero_grad()

        return run

    tasks = {"step": step("never")}
    if compiled:
        tasks |= {"step, compiled": step("always"), "plain, compiled": passes(torch.compile(plain))}
    return compare(tasks, passes(plain), repeats)


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
    half, full = (Run.start(config, supernet, images=batch) for config in configs)

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
