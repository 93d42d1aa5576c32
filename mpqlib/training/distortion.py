"""Information distortion mitigation (IDM): low-bit outputs are drawn to the high-bit ones."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.linalg import vector_norm
from torch.utils.hooks import RemovableHandle

from ..network.bits import Bits, Candidates
from ..network.layers import QuantLinear
from ..network.quantizer import integer_range


def lowest_layers(config: Mapping[str, Bits], candidates: Mapping[str, Candidates]) -> list[str]:
    """Layers that run at the smallest of their several current weight bit-widths (RFQuant)."""
    return [
        name
        for name, bits in config.items()
        if bits.weight == min(candidates[name].weight) < max(candidates[name].weight)
    ]


@contextmanager
def reading(
    layers: Mapping[str, nn.Module],
    names: Iterable[str],
    read: Callable[[str, int, Tensor], Tensor],
) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block, collects `read(name, call, output)` of the named layers.

    Yields layer name -> one value per call, in order; `call` counts a layer's calls from 0, as it
    may run several times in a pass. Outputs are those after the batch norm. They are read at once,
    because later operations may overwrite them (an in-place ReLU, `+=`).
    """
    found: dict[str, list[Tensor]] = {}

    def hook(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        calls = found.setdefault(name, [])
        calls.append(read(name, len(calls), output))

    chosen = {name: layers[name] for name in names}  # an unknown name fails before any hook is set
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in chosen.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def uncounted() -> AbstractContextManager:
    """Within the block, gradient checkpointing does not count what is saved for the backward pass.

    It compares this with a second pass of the layer, which has no hooks. Compiled programs have no
    checkpointing of this kind.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@dataclass
class OutputHook:
    """Forward hook of a layer: keeps its outputs at the largest bits, and compares later ones.

    A layer may run several times in a pass: each call is compared with the same call. Outputs are
    those after the batch norm. They are read at once, because later operations may overwrite them.
    Raises ValueError to compare without gradients.
    """

    mode: str = "off"  # off, keep or compare
    # One for each call: its output, detached, and the sum of the squared differences to it.
    targets: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: nn.Module, args: tuple, output: Tensor) -> None:
        if self.mode == "keep":
            self.targets.append(output.detach().clone())
        elif self.mode == "compare":
            if not torch.is_grad_enabled():
                raise ValueError(
                    "a layer runs without gradients, so IDM would not train it: gradient "
                    "checkpointing needs use_reentrant=False"
                )
            with uncounted():
                difference = output - self.targets[len(self.squares)]
                # mse_loss would give gradients that are not channels-last, which slows layers
                # below.
                self.squares.append(vector_norm(difference).square())


class Distortions:
    """Mean squared distances of layers' outputs to those at the largest bits (RFQuant's IDM).

    Which of the `layers` count may change from pass to pass. `static`: for a compiled network,
    which must run one program. Hooks then stay on all layers until `remove`, and all outputs are
    kept and compared; only the layers that are asked for count in the loss.
    """

    def __init__(self, layers: Mapping[str, nn.Module], static: bool = False):
        self.layers, self.static = layers, static
        self.hooks = {name: OutputHook() for name in layers}
        self.handles = self._register(layers) if static else []

    def _register(self, names: Iterable[str]) -> list[RemovableHandle]:
        pairs = [(self.layers[name], self.hooks[name]) for name in names]  # or no hook at all
        return [layer.register_forward_hook(hook) for layer, hook in pairs]

    def remove(self) -> None:
        """Takes the hooks off the layers."""
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def _in_mode(self, mode: str, names: Iterable[str]) -> Iterator[None]:
        names = list(self.hooks if self.static else names)
        handles = [] if self.static else self._register(names)
        try:
            for name in names:
                self.hooks[name].mode = mode
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in names:
                self.hooks[name].mode = "off"

    @contextmanager
    def keep(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block, the outputs of these layers become the targets."""
        for hook in self.hooks.values():
            hook.targets.clear()
        with self._in_mode("keep", names):
            yield
        for hook in self.hooks.values() if self.static else ():
            # The next replay of a captured CUDA graph writes over what this one returned.
            hook.targets = [t.clone() if t.is_cuda else t for t in hook.targets]

    def compare(self, names: Iterable[str]):
        """Within the block, the outputs of these layers are compared with the targets."""
        for hook in self.hooks.values():
            hook.squares.clear()
        return self._in_mode("compare", names)

    def loss(self, names: Iterable[str]) -> Tensor:
        """Sum over these layers of their mean squared distortion, a scalar (RFQuant's IDM).

        The mean runs over the values of all calls. RFQuant's release, as it runs, compares many
        outputs after the ReLU, because operations in place overwrite what its hooks hold. Raises
        ValueError without a layer.
        """
        hooks = [self.hooks[name] for name in names]
        if not hooks:
            raise ValueError("names is empty: IDM needs at least one layer")
        return sum(sum(h.squares) / sum(t.numel() for t in h.targets) for h in hooks)


def grid_loss(
    layers: Mapping[str, QuantLinear],
    config: Mapping[str, Bits],
    candidates: Mapping[str, Candidates],
) -> Tensor:
    """Squared distance of latent weights to grid points shared with the smallest bits, a scalar.

    A weight counts if the integer that it rounds to is a multiple of 2^(bits - smallest), so that
    nested grids share the point, and if it is not clipped. So all of them count in a layer at its
    smallest current weight candidate. A layer's squares are added up over the first dimension
    (output channels) and averaged over the others; layers are added up. Layers with one weight
    candidate are left out. Source: RFQuant's release.
    """
    total = torch.zeros(())
    for name, layer in layers.items():
        offered = candidates[name].weight
        if len(offered) == 1:
            continue
        weight, bits = layer.op.weight, config[name].weight
        with torch.no_grad():
            step = layer.weight_quantizer.step(bits)
            q_min, q_max = integer_range(bits, signed=True)
            v = weight / step
            integers = v.round()
            counts = (integers % 2 ** (bits - min(offered)) == 0) & (q_min < v) & (v < q_max)
            x_hat = integers * step
        squares = ((weight - x_hat) * counts).square()
        total = total.to(weight) + squares.sum(0).mean()
    return total
