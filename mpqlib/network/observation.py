"""What passes of a network on an example show: inputs of layers, counts of operations, weights."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .layers import QuantLinear

OUTPUTS = 16  # stored outputs of a network, at most
UNCOUNTED = (nn.RNNBase, nn.Bilinear)  # torch.utils.flop_counter finds no operation in these


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is in eval mode; then each module returns to its own mode."""
    before = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def hooked(handles: list) -> Iterator[None]:
    """Removes hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def no_fast_attention() -> Iterator[None]:
    """Within the block, attention runs as operations that torch.utils.flop_counter knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def counted_macs(model: nn.Module) -> Iterator[dict[str, Counter]]:
    """Within the block, MACs of each module without its submodules: {module: {operation: MACs}}.

    They are counted by torch.utils.flop_counter, so independently of the layer table.
    """
    own: dict[str, Counter] = {}
    running, last = [""], Counter()  # "": the model itself

    def settle(*_) -> None:
        """Books what was counted since the last call on the innermost running module."""
        nonlocal last
        total = Counter({str(op): n for op, n in counter.flop_counts["Global"].items()})
        own.setdefault(running[-1], Counter()).update(total - last)
        last = total

    def enter(name: str, *_) -> None:
        settle()
        running.append(name)

    def leave(*_) -> None:
        settle()
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name)))
        handles.append(module.register_forward_hook(leave))
    with no_fast_attention(), hooked(handles), FlopCounterMode(display=False) as counter:
        yield own
        settle()
    for counts in own.values():
        for operation in counts:
            counts[operation] //= 2  # a MAC is two floating-point operations


@dataclass
class Observation:
    """What a pass of the float model shows of one layer, over all its calls and all images."""

    inputs: list[Tensor] = field(default_factory=list)  # copies, one a call
    macs: int = 0

    @property
    def values(self) -> Tensor:
        """All values that the layer read, as a vector."""
        return torch.cat([x.flatten() for x in self.inputs])


def _record(seen: Observation, op: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
    x, *_ = (*args, *kwargs.values())
    seen.inputs.append(x.clone())  # what follows may write over it
    # One MAC per output value and weight of the filter that makes it.
    seen.macs += y.numel() * op.weight[0].numel()


def noise_image(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """An image (1, C, H, W) of fixed noise, for a pass whose values do not matter.

    `shape`: (C, H, W). Type and device are those of the model's parameters.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, *shape, generator=generator).to(next(model.parameters()))


@torch.no_grad()
def _outputs(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Some outputs of the model, with its tensors on the CPU in `dtype`, for one image of noise."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)

    own = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: moved(tensor) for name, tensor in own.items()}
    # Of more spread than images have, so that values pass the limit of an activation such as ReLU6.
    noise = 4 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with eval_mode(model), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of dropout that does not ask for the mode
        outputs = functional_call(model, tensors, (noise.to(dtype),)).flatten()
    return outputs[:: -(-len(outputs) // OUTPUTS)].double()


@torch.inference_mode(False)  # some of its operations are not allowed in inference mode
def record_outputs(model: nn.Module, shape: Sequence[int]) -> dict:
    """Some outputs of `model`, by which `check_outputs` knows the network again; for JSON.

    `shape`: of an image (C, H, W). The model runs in eval mode and as `model(images)`: a supernet
    in float mode.
    """
    # In float mode and in float64, because processors round differently. In a low-bit network, one
    # value that is rounded to the other side spreads, and small differences between networks are
    # rounded away. A network that computes in a type of its own runs in that type.
    own = next(model.parameters()).dtype
    for dtype in (torch.float64, own):
        try:
            values = _outputs(model, shape, dtype).tolist()
            return {"dtype": str(dtype).removeprefix("torch."), "values": values}
        except RuntimeError:
            if dtype == own:
                raise


@torch.inference_mode(False)
def check_outputs(model: nn.Module, shape: Sequence[int], recorded: Mapping) -> None:
    """Raises ValueError if `model` does not give the outputs that `record_outputs` returned.

    So a network of another build is found even if all its tensors have the same shapes: one with
    another activation, padding or epsilon. Outputs may differ by 1e-5 of the largest one, and by
    more if they were recorded in a type of few digits: other processors add in another order.
    """
    dtype = getattr(torch, recorded["dtype"])
    expected = torch.tensor(recorded["values"], dtype=torch.float64)
    found = _outputs(model, shape, dtype)
    tolerance = max(1e-5, torch.finfo(dtype).eps ** 0.5)
    within = tolerance * float(expected.nan_to_num(0, 0, 0).abs().max())
    same = found.shape == expected.shape
    if not same or not torch.allclose(found, expected, rtol=0, atol=within, equal_nan=True):
        raise ValueError(
            "it computes something else with the same weights: its outputs for an image of fixed "
            f"noise begin with {_listed(found)}, those of the stored network with "
            f"{_listed(expected)}. Is it of the same build (activations, padding, eps of norms)?"
        )


def _listed(values: Tensor) -> str:
    return ", ".join(f"{value:.7g}" for value in values[:3].tolist())


def observe(
    model: nn.Module, example: Tensor, names: Iterable[str]
) -> tuple[dict[str, Observation], dict[str, int]]:
    """One float pass over `example` (N, C, H, W): what the layers `names` read, and all MACs.

    Returns the layers' observations by name, and the MACs (over all images) of everything else by
    module and operations. Raises ValueError for outputs that are no tensor, for a layer that does
    not run, that reads values which are not finite, or whose MACs torch.utils.flop_counter counts
    differently, and for modules that it cannot count.
    """
    seen = {name: Observation() for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            partial(_record, seen[name]), with_kwargs=True
        )
        for name in seen
    ]
    with eval_mode(model), torch.no_grad(), hooked(handles), counted_macs(model) as counted:
        outputs = model(example.clone())  # a network may normalise its images in place
    if not isinstance(outputs, Tensor):
        # Other tensors than logits, such as feature maps, are for an error function of one's own.
        raise ValueError(
            f"{type(model).__name__} returns a {type(outputs).__name__}: it must return a tensor; "
            "training and evaluation need logits (N, classes)"
        )
    for name in counted:
        module = model.get_submodule(name)
        if isinstance(module, UNCOUNTED):
            raise ValueError(f"MACs of {type(module).__name__} {name!r} cannot be counted")
    for name, layer in seen.items():
        if not layer.inputs:
            raise ValueError(f"layer {name!r} does not run on the example")
        if not all(bool(x.isfinite().all()) for x in layer.inputs):
            raise ValueError(f"layer {name!r} reads values that are not finite: check the example")
        if (macs := counted[name].total()) != layer.macs:
            raise ValueError(
                f"layer {name!r}: {layer.macs} MACs by its shape, but torch counts {macs}. Its "
                f"class {type(model.get_submodule(name)).__name__} computes something else"
            )
    rest = {}
    for name, counts in counted.items():
        if name not in seen and counts.total():
            operations = ", ".join(sorted(op.removeprefix("aten.") for op in counts))
            part = name or f"{type(model).__name__}.forward"
            rest[f"{part} ({operations})"] = counts.total()
    return seen, rest


class _Operands(TorchDispatchMode):
    """Within the block, collects where the operands of convolutions and products lie in memory."""

    def __init__(self):
        super().__init__()
        self.read: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in flop_registry:
            tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
            self.read |= {_place(tensor) for tensor in tensors}
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_quantized(
    model: nn.Module,
    example: Tensor,
    layers: Mapping[str, QuantLinear],
    seen: Mapping[str, Observation],
) -> None:
    """One pass of the converted `model`: every layer must compute with its quantized weights.

    `layers`: by name, each at the bits to check. `seen`: what the float pass showed of them. Raises
    ValueError if the pass fails, or names the layer that runs more or less often than in the float
    pass or computes with other weights.
    """
    used: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, op: nn.Module, args: tuple, y: Tensor) -> None:
        used[name].append(op.weight)  # kept, so that no other tensor takes its place in memory

    handles = [
        layer.op.register_forward_hook(partial(keep, name)) for name, layer in layers.items()
    ]
    with eval_mode(model), torch.no_grad(), hooked(handles), _Operands() as operands:
        try:
            model(example.clone())
        except Exception as error:
            name = type(model).__name__
            raise ValueError(f"{name} fails once its layers are quantized: {error}") from error
    for name, layer in layers.items():
        calls, expected = len(used[name]), len(seen[name].inputs)
        if calls != expected:
            raise ValueError(
                f"layer {name!r} runs {calls} times once it is quantized, but {expected} times in "
                f"the float model"
            )
        with torch.no_grad():
            quantized = layer.weight_quantizer(layer.op.weight, layer.position[0:1])
        if not all(_place(w) in operands.read and torch.equal(w, quantized) for w in used[name]):
            raise ValueError(
                f"layer {name!r} of class {type(layer.op).__name__} computes with other weights "
                f"than its quantized ones: use a plain Conv2d or Linear, and let the model call "
                f"it as a submodule, not through a list or a function"
            )
