"""Convolutions with quantized weights and a low-rank adapter beside each, and what they cost.

An adapter holds the first components of the singular value decomposition of what rounding took
away, W - Q(W). One formula serves ordinary, grouped and depth-wise convolutions. Source: CoRa
(arXiv 2408.00923), which describes ordinary ones.
"""

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..files import read_weights, save_weights, set_tensors
from ..network.bits import Bits, Candidates, check_bits
from ..network.cost import bitops, model_size
from ..network.layers import QuantLinear
from ..network.observation import check_outputs, hooked, noise_image, observe, record_outputs
from ..network.supernet import (
    LayerInfo,
    check_plain_weight,
    list_float_parts,
    warn_about_float_parts,
)

FLOAT_BITS = 32  # of activations, and of a convolution that stays in float
FILE_KIND = "an adapted network"  # of the files that `save_adapted` writes


def round_to_grid(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Rounds x to 2^bits equidistant values from about `low` to about `high`; same shape.

    Asymmetric, with zero among the values: the range is widened to hold it. `low`, `high`: of a
    shape that broadcasts to that of x. The zero point is rounded. CoRa's release truncates it, and
    so may lose almost one step at the low end instead of half a step at most.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # nothing but zeros
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(scale)


def quantize_weight(weight: Tensor, bits: int, granularity: str, deviations: float) -> Tensor:
    """Rounds a weight (out, ...) to `bits`; same shape. FLOAT_BITS leave it as it is.

    One range a "tensor", or one a "channel" of the output: mean plus and minus `deviations`
    standard deviations, but not beyond the weights themselves. Source: CoRa's release. It has one
    range a tensor, and divides by n - 1 in the standard deviation; ours divides by n. This can
    matter with one range a channel alone, where a depth-wise filter has nine weights.
    """
    if bits == FLOAT_BITS:
        return weight
    rows = weight.flatten(1) if granularity == "channel" else weight.reshape(1, -1)
    mean, spread = rows.mean(1, keepdim=True), rows.std(1, correction=0, keepdim=True)
    low = torch.maximum(rows.amin(1, keepdim=True), mean - deviations * spread)
    high = torch.minimum(rows.amax(1, keepdim=True), mean + deviations * spread)
    return round_to_grid(rows, low, high, bits).reshape(weight.shape)


def butterworth(share: Tensor, full: int, order: int) -> Tensor:
    """A soft cut after the share `share` (a scalar, 0 to 1) of `full` components, shape (full,).

    T_i = 1 / sqrt(1 + (f_i / share)^(2 order)) with f_i = i / full, for i = 0 ... full - 1. So the
    first component is kept whole, and the hard cut at large orders keeps ceil(share * full).
    Source: CoRa; its release also divides by the largest T_i, which is 1.
    """
    f = torch.arange(full, dtype=share.dtype, device=share.device) / full
    return (1 + (f / share) ** (2 * order)).rsqrt()


class AdaptedConv2d(nn.Module):
    """A convolution with the frozen weight Q(W), and an adapter for the residual R = W - Q(W).

    R is written as a matrix (out) x (in / groups * k * k). Its first r components make an adapter
    of r * (out + in / groups * k * k) weights: a k x k convolution to groups * r channels, then one
    of 1 x 1 to `out` channels, both with the groups of `conv`. All groups share the r filters of
    k x k. So in a depth-wise convolution, all channels share them. Each side carries the square
    root of the singular values.

    `conv` gets the weight Q(W). The adapter has the full rank until `set_rank`. From `cut_softly`
    until then, a Butterworth kernel of `order` cuts it after the share `share`, which gradients
    reach. Source: CoRa.
    """

    def __init__(self, conv: nn.Conv2d, bits: int, granularity: str, deviations: float):
        super().__init__()
        weight = conv.weight.detach()
        quantized = quantize_weight(weight, bits, granularity, deviations)
        u, s, vh = torch.linalg.svd((weight - quantized).flatten(1), full_matrices=False)
        conv.weight = nn.Parameter(quantized, requires_grad=False)
        self.conv, self.bits = conv, bits
        self.register_buffer("left", u * s.sqrt())  # (out, r)
        self.register_buffer("right", s.sqrt()[:, None] * vh)  # (r, in / groups * k * k)
        self.share = nn.Parameter(torch.ones_like(s[0]))
        self.order: int | None = None

    def __getattr__(self, name: str):
        """What networks read of a convolution, such as `out_channels`, is that of `conv`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A copy under construction has no `conv` yet.
            if name == "conv" or name.startswith("_") or not hasattr(self.conv, name):
                raise
            return getattr(self.conv, name)

    @property
    def weight(self) -> Tensor:
        """What the convolution and its adapter compute with together, (out, in / groups, k, k)."""
        return self.conv.weight + self.residual()

    @property
    def rank(self) -> int:
        """Components that the adapter holds."""
        return self.left.shape[1]

    @property
    def component(self) -> int:
        """Weights of one component: of an adapter of rank 1."""
        return self.left.shape[0] + self.right.shape[1]

    def residual(self) -> Tensor:
        """What the adapter adds to the weight, in the shape of the weight."""
        left, right = self.left, self.right
        if self.order is not None:
            cut = butterworth(self.share, self.rank, self.order)
            left, right = left * cut, cut[:, None] * right
        return (left @ right).reshape(self.conv.weight.shape)

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Conv2d
        # One convolution computes the same as two beside each other, in less time.
        return functional_call(self.conv, {"weight": self.weight}, (input,))

    def cut_softly(self, share: float, order: int) -> None:
        """Starts the soft cut of this order, after the share `share`, at least one component."""
        self.order = order
        self.share.data.fill_(max(share, 1 / self.rank))

    def set_rank(self, rank: int, bits: int) -> None:
        """Keeps the first `rank` components, rounded to `bits`; 0 leaves no adapter.

        Each side has one range, from its smallest to its largest value. Ends the soft cut.
        """
        sides = self.left[:, :rank], self.right[:rank]
        if rank:
            sides = [round_to_grid(side, *side.aminmax(), bits) for side in sides]
        self.left, self.right = sides
        self.order = None

    def adapter(self) -> nn.Sequential:
        """The adapter as it is stored and run, two convolutions; its rank must be at least 1.

        Its output, added to that of `conv`, is the output of this layer.
        """
        conv = self.conv
        channels = conv.groups * self.rank
        inner = copy.deepcopy(conv)
        outer = nn.Conv2d(channels, conv.out_channels, 1, groups=conv.groups, bias=False)
        filters = self.right.reshape(self.rank, *conv.weight.shape[1:])
        inner.weight = nn.Parameter(filters.repeat(conv.groups, 1, 1, 1))
        outer.weight = nn.Parameter(self.left[:, :, None, None])
        inner.out_channels, inner.bias = channels, None
        return nn.Sequential(inner, outer)


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of a float network by name, each once."""
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}


def _check_convolution(name: str, conv: nn.Conv2d) -> None:
    """Raises ValueError if `conv` computes anything else than a convolution with its weight."""
    check_plain_weight(name, conv)
    weight = conv.weight
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the weight of {name!r} is {weight.dtype}: float32 or float64 is needed")
    if not weight.isfinite().all():
        raise ValueError(f"the weight of {name!r} holds values that are not finite")
    around = 0 if isinstance(conv.padding, str) else max(conv.padding)  # reflect needs as much
    size = [2 * d * k + around for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    x = torch.ones(1, conv.in_channels, *size).cumsum(1).cumsum(3).sin().to(weight)

    def run(factor: float) -> Tensor:
        return functional_call(conv, {"weight": factor * weight}, (x,))

    with torch.no_grad():
        zero, one, three = run(0), run(1), run(3)
    if not torch.allclose(three - zero, 3 * (one - zero), rtol=1e-3, atol=1e-5):
        kind = type(conv).__name__
        raise ValueError(
            f"{name!r} ({kind}) changes its weight in each pass, so that it cannot have an adapter:"
            " use a plain Conv2d"
        )


def check_convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """`convolutions`, each checked.

    Raises ValueError if there is none, if one holds values that are not finite, changes its weight
    in each pass, or has an adapter or quantizers already, or if two share a weight.
    """
    for name, module in network.named_modules():
        if isinstance(module, (AdaptedConv2d, QuantLinear)):
            what = "has an adapter" if isinstance(module, AdaptedConv2d) else "is quantized"
            raise ValueError(f"{name!r} {what} already: pass the float network")
    convs = convolutions(network)
    if not convs:
        raise ValueError(f"{type(network).__name__} holds no Conv2d to quantize")
    owners: dict[int, str] = {}
    for name, conv in convs.items():
        _check_convolution(name, conv)
        owner = owners.setdefault(id(conv.weight), name)
        if owner != name:
            raise ValueError(f"{owner!r} and {name!r} share a weight: give each its own")
    return convs


def bits_by_name(convs: Mapping[str, nn.Conv2d], bits: int | Mapping[str, int]) -> dict[str, int]:
    """Weight bits of each convolution. `bits`: one number for all, or a mapping of all names.

    Raises ValueError for missing or unknown names, and unless all are whole numbers from 2 to 16
    or FLOAT_BITS.
    """
    named = dict(bits) if isinstance(bits, Mapping) else dict.fromkeys(convs, bits)
    if wrong := named.keys() ^ convs.keys():
        raise ValueError(
            f"bits: convolutions that are missing or unknown: {sorted(wrong, key=str)}"
        )

    def checked(name: str) -> int:
        width = named[name]
        return FLOAT_BITS if width == FLOAT_BITS else check_bits(f"bits of {name!r}", (width,))[0]

    return {name: checked(name) for name in convs}


class Adapted(nn.Module):
    """A network whose convolutions are quantized and have adapters; all else stays in float.

    `network`: the float network; it is changed in place, and so are its modes: eval, no gradients.
    `example`: an image (1, C, H, W), to count operations. `bits`: of the weights, by name of the
    convolution or one number; FLOAT_BITS leave a convolution in float. `granularity`,
    `deviations`: as in `quantize_weight`. `adapter_bits`: that adapters are stored in.

    Attribute `float_parts`: all that multiplies beside Conv2d and Linear, such as Conv1d, Conv3d,
    transposed convolutions and attention. These stay in float and have no part in `cost`; a
    UserWarning names them and their share of the MACs.
    Raises ValueError as `check_convolutions`, `bits_by_name` and `observe` do.
    """

    def __init__(
        self,
        network: nn.Module,
        example: Tensor,
        bits: int | Mapping[str, int],
        granularity: str = "channel",
        deviations: float = 3.0,
        adapter_bits: int = 8,
    ):
        super().__init__()
        convs = check_convolutions(network)
        bits = bits_by_name(convs, bits)
        seen, rest = observe(network, example[:1], convs)
        self.macs = {name: seen[name].macs for name in convs}  # of one image
        linear = {name for name, m in network.named_modules() if isinstance(m, nn.Linear)}
        parts = list_float_parts(rest, sum(self.macs.values()), images=1)
        self.float_parts = [p for p in parts if p.name.rpartition(" (")[0] not in linear]
        self.input_shape = tuple(example.shape[1:])  # (C, H, W)
        self.granularity, self.adapter_bits = granularity, adapter_bits
        self.network = network.requires_grad_(False)
        made = {
            conv: AdaptedConv2d(conv, bits[name], granularity, deviations)
            for name, conv in convs.items()
        }
        for parent in list(self.modules()):
            for name, child in parent._modules.items():  # under all its names
                parent._modules[name] = made.get(child, child)
        self.eval()
        self._check_calls(example[:1], {name: len(seen[name].inputs) for name in convs})
        if self.float_parts:
            warn_about_float_parts(self.float_parts)

    @torch.no_grad()
    def _check_calls(self, example: Tensor, expected: Mapping[str, int]) -> None:
        """Raises ValueError for a convolution that the network calls past its adapter."""
        calls = dict.fromkeys(expected, 0)

        def count(name: str, *_: object) -> None:
            calls[name] += 1

        handles = [c.register_forward_hook(partial(count, n)) for n, c in self.convs.items()]
        with hooked(handles):
            self(example)
        for name, now in calls.items():
            if now != expected[name]:
                raise ValueError(
                    f"{name!r} runs {now} times with its adapter, but {expected[name]} times in the"
                    " float network: call it as a submodule, not through a list or a function"
                )

    def forward(self, x: Tensor) -> Tensor:
        """The network's output for images (N, C, H, W)."""
        return self.network(x.clone())  # a network may normalise its images in place

    @property
    def convs(self) -> dict[str, AdaptedConv2d]:
        """The convolutions by name."""
        return {n: m for n, m in self.network.named_modules() if isinstance(m, AdaptedConv2d)}

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of the adapter of each convolution, 0 for none."""
        return {name: conv.rank for name, conv in self.convs.items()}

    @property
    def weights(self) -> int:
        """Number of weights of all convolutions, without adapters."""
        return sum(conv.conv.weight.numel() for conv in self.convs.values())

    def cost(self) -> dict[str, float]:
        """What convolutions and adapters cost together.

        `added_percent`: weights in adapters, in % of those in convolutions. `size_mb`: MB.
        `equivalent_bits`: all bits per weight of the convolutions (CoRa). `bitops_g`: G per image,
        with activations in FLOAT_BITS. Linear layers and `float_parts` are not counted. Neither are
        scales and zero points, one pair for each range.
        """
        table, bits = [], {}

        def add(name: str, macs: int, weights: int, width: int) -> None:
            table.append(LayerInfo(name, macs, weights, False, Candidates((width,), (FLOAT_BITS,))))
            bits[name] = Bits(width, FLOAT_BITS)

        for name, conv in self.convs.items():
            weights = conv.conv.weight.numel()
            add(name, self.macs[name], weights, conv.bits)
            if conv.rank:
                positions = self.macs[name] // weights  # of the output, in height and width
                outputs, inputs = len(conv.left), conv.conv.groups * conv.right.shape[1]
                macs = positions * conv.rank * (inputs + outputs)
                add(f"{name}.adapter", macs, conv.rank * conv.component, self.adapter_bits)
        size = model_size(table, bits)
        stored = sum(info.weights for info in table)
        return {
            "added_percent": 100 * (stored / self.weights - 1),
            "size_mb": size / 1e6,
            "equivalent_bits": 8 * size / self.weights,
            "bitops_g": bitops(table, bits) / 1e9,
        }


def save_adapted(path: str | Path, adapted: Adapted) -> str:
    """Writes an adapted network as a safetensors file; returns the file's SHA-256.

    Tensors are stored in float, so the file is larger than `Adapted.cost` says. It also holds the
    bits and the rank of each convolution, which `load_adapted` needs, and some outputs, by which it
    knows the network again. Raises ValueError within a search, when adapters are cut softly.
    """
    convs = adapted.convs
    if soft := [name for name, conv in convs.items() if conv.order is not None]:
        raise ValueError(f"the adapter of {soft[0]!r} is cut softly: call its set_rank first")
    about = dict(
        bits={name: conv.bits for name, conv in convs.items()},
        ranks=adapted.ranks,
        granularity=adapted.granularity,
        adapter_bits=adapted.adapter_bits,
        input_shape=adapted.input_shape,
        outputs=record_outputs(adapted, adapted.input_shape),
    )
    return save_weights(Path(path), adapted, about, FILE_KIND)


def load_adapted(path: str | Path, network: nn.Module) -> Adapted:
    """The adapted network that `save_adapted` wrote, in eval mode. Nothing in the file is executed.

    `network`: a float network of the same build, with any weights; it stays as it is. Bits and
    ranks come from the file. Raises ValueError if the file is damaged or is no adapted network, or
    if the network does not fit it: with other layers or shapes, or with other outputs, as another
    activation function, padding or epsilon would give them.
    """
    tensors, about = read_weights(Path(path), FILE_KIND)
    if "outputs" not in about:
        raise ValueError(
            f"{path} was written by an earlier version of mpqlib, which stored no outputs of the "
            "network: use the version that wrote it"
        )
    copied = copy.deepcopy(network).eval()
    example = noise_image(copied, about["input_shape"])
    how = dict(granularity=about["granularity"], adapter_bits=about["adapter_bits"])
    try:
        adapted = Adapted(copied, example, about["bits"], **how)
        for name, conv in adapted.convs.items():
            conv.set_rank(about["ranks"][name], adapted.adapter_bits)
        set_tensors(adapted, tensors, path)
        check_outputs(adapted, about["input_shape"], about["outputs"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the network does not fit {path}: {error}") from error
    return adapted
