"""LSQ quantizers against an elementwise reference written from the equations of the LSQ paper."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naive import naive_gradients, naive_quantize, naive_range
from torch import Tensor, nn

from mpqlib.network.quantizer import LSQ, Quantizer, integer_range, nested_step
from mpqlib.network.quantizer import lsq as lsq_between

BITS = range(2, 9)


def lsq(x: Tensor, step: Tensor, bits: int, signed: bool, scaled: bool = False) -> Tensor:
    """The library's `lsq` to the integers of `bits`."""
    bounds = torch.tensor(integer_range(bits, signed)).to(step)
    return lsq_between(x, step, *bounds, scaled)


def quantize(quantizer: Quantizer, x: Tensor, bits: int) -> Tensor:
    return quantizer(x, quantizer.position(bits))


def run_lsq(x: Tensor, s: float, bits: int, signed: bool, upstream: Tensor, scaled: bool):
    """x_hat and the gradients of sum(upstream * x_hat) that the library gives."""
    x = x.detach().requires_grad_()
    step = torch.tensor(s, dtype=x.dtype, requires_grad=True)
    x_hat = lsq(x, step, bits, signed, scaled)
    return x_hat.detach(), *torch.autograd.grad(x_hat, (x, step), upstream)


def close_sums(measured: Tensor, expected: float, upstream: Tensor, bits: int) -> bool:
    """Whether two sums over a tensor agree up to float64 rounding of their terms."""
    largest_term = float(upstream.abs().sum()) * 2**bits
    return abs(float(measured) - expected) <= 1e-14 * largest_term


@st.composite
def cases(draw):
    """x of any shape (bounds, grid points and ties among its values), s, bits, signed, upstream."""
    bits, signed = draw(st.sampled_from(BITS)), draw(st.booleans())
    dyadic = st.integers(-8, 8).map(lambda power: 2.0**power)
    s = draw(st.one_of(dyadic, st.floats(1e-3, 1e3)))
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    low, high = naive_range(bits, signed)
    places = st.one_of(
        st.sampled_from([low, high, low - 0.5, high + 0.5, low + 0.5, high - 0.5, 0]),
        st.integers(2 * low - 2, 2 * high).map(lambda k: k / 2),
        st.floats(2.0 * low - 2, 2.0 * high),
    )
    count = math.prod(shape)
    v = draw(st.lists(places, min_size=count, max_size=count))
    upstream = st.floats(-4, 4).map(lambda g: round(g, 9))  # far from underflow
    g = draw(st.lists(upstream, min_size=count, max_size=count))
    x = torch.tensor([place * s for place in v], dtype=torch.float64).reshape(shape)
    return x, s, bits, signed, torch.tensor(g, dtype=torch.float64).reshape(shape)


@settings(deadline=None)
@given(cases())
def test_values_and_gradients_are_those_of_the_equations(case):
    x, s, bits, signed, upstream = case
    x_hat, grad_x, grad_s = run_lsq(x, s, bits, signed, upstream, scaled=False)
    expected_x, expected_s = naive_gradients(x, s, bits, signed, upstream)
    assert torch.equal(x_hat, naive_quantize(x, s, bits, signed))
    assert torch.equal(grad_x, expected_x)
    assert close_sums(grad_s, expected_s, upstream, bits)


def at_the_bound():
    """x / s just under q_max while x is not under q_max * s, in floating point."""
    one = torch.tensor(1.0, dtype=torch.float64)
    s = 1.2562465382029542
    return torch.tensor(7 * s, dtype=torch.float64), s, 3, False, one


@settings(deadline=None)
@given(cases())
@example(at_the_bound())
def test_scaled_step_gradient_is_divided_by_root_of_count_times_largest_integer(case):
    x, s, bits, signed, upstream = case
    _, grad_x, grad_s = run_lsq(x, s, bits, signed, upstream, scaled=True)
    expected_x, expected_s = naive_gradients(x, s, bits, signed, upstream)
    divisor = math.sqrt(x.numel() * naive_range(bits, signed)[1])
    assert torch.equal(grad_x, expected_x)
    assert close_sums(grad_s * divisor, expected_s, upstream, bits)


@pytest.mark.parametrize(
    ("signed", "x", "x_hat", "grad_x", "grad_s"),
    [  # 2 bits, s = 0.5: the grid is -1, -0.5, 0, 0.5 (signed) or 0, 0.5, 1, 1.5 (unsigned)
        (True, -3.0, -1.0, 0, -2),
        (True, -1.0, -1.0, 0, -2),  # v = -Q_N
        (True, -0.875, -1.0, 1, -0.25),  # v = -1.75
        (True, 0.125, 0.0, 1, -0.25),
        (True, 0.375, 0.5, 1, 0.25),
        (True, 0.5, 0.5, 0, 1),  # v = Q_P
        (True, 9.0, 0.5, 0, 1),
        (False, -0.125, 0.0, 0, 0),
        (False, 0.0, 0.0, 0, 0),  # v = -Q_N = 0
        (False, 0.125, 0.0, 1, -0.25),
        (False, 1.375, 1.5, 1, 0.25),
        (False, 1.5, 1.5, 0, 3),  # v = Q_P
    ],
)
def test_worked_examples(signed, x, x_hat, grad_x, grad_s):
    got = run_lsq(torch.tensor([x]), 0.5, 2, signed, torch.ones(1), scaled=False)
    assert [float(t) for t in got] == [x_hat, grad_x, grad_s]


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "strided": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
}
UPSTREAMS = LAYOUTS | {
    "expanded": lambda t: t.new_tensor(0.75).expand_as(t),
    "broadcast": lambda t: t[:, :, :1, :1].expand_as(t),
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_changes_nothing(layout, upstream):
    generator = torch.Generator().manual_seed(0)
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64))
    g = UPSTREAMS[upstream](torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64))
    x_hat, grad_x, grad_s = run_lsq(x, 0.3, 3, True, g, scaled=False)
    expected_x, expected_s = naive_gradients(x, 0.3, 3, True, g)
    assert torch.equal(x_hat, naive_quantize(x, 0.3, 3, True))
    assert torch.equal(grad_x, expected_x)
    assert close_sums(grad_s, expected_s, g, 3)


def off_the_ties(count: int, bits: int, signed: bool) -> Tensor:
    """Values of v, (count,), at least 0.05 away from every rounding and clipping bound."""
    generator = torch.Generator().manual_seed(bits)
    low, high = naive_range(bits, signed)
    whole = torch.randint(low - 4, high + 5, (count,), generator=generator)
    return whole + 0.4 * (2 * torch.rand(count, generator=generator) - 1) + 0.05


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_forward_agrees_with_the_fake_quantization_torch_has(bits, signed):
    step = torch.tensor([0.037])
    x = off_the_ties(1000, bits, signed) * step
    native = torch._fake_quantize_learnable_per_tensor_affine(
        x, step, torch.zeros(1), *naive_range(bits, signed), 1.0
    )
    torch.testing.assert_close(lsq(x, step[0], bits, signed), native)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_single_precision_gradients_are_close_to_double_precision(bits, signed):
    v = off_the_ties(20_000, bits, signed)
    upstream = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    x_hat, grad_x, grad_s = run_lsq(v * 0.037, 0.037, bits, signed, upstream, scaled=True)
    exact = run_lsq((v * 0.037).double(), 0.037, bits, signed, upstream.double(), scaled=True)
    torch.testing.assert_close(x_hat.double(), exact[0], rtol=1e-6, atol=0)
    assert torch.equal(grad_x.double(), exact[1])
    torch.testing.assert_close(grad_s.double(), exact[2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bits", [2, 6])
def test_compiled_arithmetic_is_the_same(bits, channels_last):
    x = off_the_ties(2 * 4 * 5 * 3, bits, signed=True).view(2, 4, 5, 3)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for apply in (LSQ.apply, torch.compile(LSQ.apply, fullgraph=True)):
        v, step = x.clone().requires_grad_(), torch.tensor(0.7, requires_grad=True)
        x_hat = apply(v, step, *torch.tensor(integer_range(bits, True)).to(step), False)
        x_hat.backward(upstream)
        assert x_hat.stride() == v.grad.stride() == x.stride()
        results.append((x_hat.detach(), v.grad, step.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@settings(deadline=None)
@given(cases())
def test_result_is_on_the_grid_and_stays_there(case):
    x, s, bits, signed, _ = case
    step = torch.tensor(s, dtype=x.dtype)
    x_hat = lsq(x, step, bits, signed)
    whole = x_hat / step
    low, high = naive_range(bits, signed)
    assert bool(((whole - whole.round()).abs() < 1e-9).all())
    assert low <= float(whole.min().round()) and float(whole.max().round()) <= high
    assert torch.equal(lsq(x_hat, step, bits, signed), x_hat)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_as_many_values_as_the_bits_can_tell_apart(bits, signed):
    x = torch.linspace(-1, 1, 10_001)
    assert len(lsq(x, torch.tensor(1e-3), bits, signed).unique()) == 2**bits


def test_quantizer_takes_its_steps_and_its_sign_from_the_example():
    example = torch.tensor([[0.5, -1.5], [2.0, 0.0]])  # mean|x| = 1
    for signed, x in ((True, example), (False, example.abs())):
        quantizer = Quantizer(BITS, x)
        assert quantizer.signed is signed
        for bits in BITS:
            expected = 2 * 1.0 / math.sqrt(naive_range(bits, signed)[1])
            assert quantizer.step(bits).item() == pytest.approx(expected, rel=1e-6)
            quantized = naive_quantize(x, quantizer.step(bits).item(), bits, signed)
            torch.testing.assert_close(quantize(quantizer, x, bits), quantized)


@pytest.mark.parametrize("signed", [True, False])
def test_sign_can_be_given_instead(signed):
    for first in (torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.0])):
        quantizer = Quantizer([3], first, signed=signed)
        lowest = quantize(quantizer, torch.tensor([-100.0]), 3).item()
        assert (lowest < 0) is signed


@pytest.mark.parametrize("scaled", [True, False])
def test_only_the_step_in_use_gets_a_gradient(scaled):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    quantizer = Quantizer((2, 4, 6), x, scale_step_gradient=scaled)
    quantize(quantizer, x, 4).sum().backward()
    _, expected = naive_gradients(x, quantizer.step(4).item(), 4, True, torch.ones_like(x))
    two, four, six = quantizer.steps.grad.tolist()
    divisor = math.sqrt(50 * 7) if scaled else 1
    assert two == six == 0 and four * divisor == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("mean", [0.0, 0.4, -2.0])
def test_nested_grids_are_parts_of_each_other(mean):
    x = mean + torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = x.flatten().tolist()
    middle = sum(values) / 30
    std = math.sqrt(sum((v - middle) ** 2 for v in values) / 29)
    reach = max(abs(middle - 3 * std), abs(middle + 3 * std))
    steps = {bits: nested_step(x, bits).item() for bits in (2, 3, 6)}
    assert steps == {bits: pytest.approx(reach / 2 ** (bits - 1)) for bits in steps}
    grids = {b: {round(k * s, 9) for k in range(*integer_range(b, True))} for b, s in steps.items()}
    assert grids[2] < grids[3] < grids[6]


def test_nested_steps_of_a_single_weight_of_zeros_and_of_an_unsigned_range():
    assert nested_step(torch.tensor([-0.5]), 2).item() == 0.25
    assert nested_step(torch.zeros(7), 3).item() == 1.0
    with pytest.raises(ValueError, match="signed=False is not allowed"):
        nested_step(torch.ones(3), 4, signed=False)


def test_a_step_that_training_pushed_below_zero_still_quantizes():
    x = torch.linspace(-1, 1, 21)
    quantizer = Quantizer([3], x)
    before = quantize(quantizer, x, 3).detach()
    with torch.no_grad():
        quantizer.steps.neg_()
    assert quantizer.step(3).item() > 0
    assert torch.equal(quantize(quantizer, x, 3), before)


@pytest.mark.parametrize("signed", [True, False, None])
def test_a_tensor_of_zeros_is_quantized_exactly(signed):
    zeros = torch.zeros(4, 3)
    quantizer = Quantizer((2, 8), zeros, signed=signed)
    for bits in (2, 8):
        x = zeros.clone().requires_grad_()
        y = quantize(quantizer, x, bits)
        y.sum().backward()
        assert torch.equal(y, zeros)
        assert quantizer.step(bits).item() > 0
        assert bool(x.grad.isfinite().all()) and bool(quantizer.steps.grad.isfinite().all())


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 2.5])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        Quantizer([4, bits], torch.ones(1))
    with pytest.raises(ValueError, match=f"bits={bits}"):
        lsq(torch.ones(1), torch.tensor(1.0), bits, True)


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_bits_that_a_type_cannot_hold_are_refused(dtype, most):
    quantizer = Quantizer([2, most], torch.ones(4, dtype=dtype), signed=False)
    assert quantizer.ranges[1].tolist() == [3, 2**most - 1]
    with pytest.raises(ValueError, match=f"bits={most + 1} is not allowed for {dtype}"):
        Quantizer([2, most + 1], torch.ones(4, dtype=dtype))


CASTS = [(torch.bfloat16, 8), (torch.float16, 11)]


@pytest.mark.parametrize("dtype, most", CASTS)
def test_a_cast_to_a_type_that_cannot_hold_the_bits_is_refused(dtype, most):
    quantizer = Quantizer([2, most + 1], torch.ones(4), signed=False)
    for cast in (quantizer, nn.Sequential(quantizer)):
        with pytest.raises(ValueError, match=f"bits={most + 1} is not allowed for {dtype}"):
            cast.to(dtype)
    assert quantizer.steps.dtype == quantizer.ranges.dtype == torch.float32
    state = {n: t.to(dtype) if n == "steps" else t for n, t in quantizer.state_dict().items()}
    with pytest.raises(ValueError, match=f"bits={most + 1} is not allowed for {dtype}"):
        quantizer.load_state_dict(state, assign=True)


@pytest.mark.parametrize("dtype, most", CASTS)
def test_a_cast_there_and_back_keeps_the_range(dtype, most):
    quantizer = Quantizer([2, most], torch.ones(4), signed=False)
    assert quantizer.to(dtype).double().ranges[1].tolist() == [3, 2**most - 1]


def test_a_quantizer_needs_a_bit_width():
    with pytest.raises(ValueError, match="empty"):
        Quantizer([], torch.ones(1))


@pytest.mark.parametrize("bits", [3, 8])
def test_bits_that_are_not_offered_are_refused(bits):
    quantizer = Quantizer((2, 4), torch.ones(1))
    with pytest.raises(ValueError, match=rf"bits={bits}.*\(2, 4\)"):
        quantize(quantizer, torch.ones(1), bits)


@pytest.mark.parametrize("signed", [True, False])
def test_state_dict_carries_steps_and_sign(signed):
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    trained = Quantizer((2, 5), x, signed=signed)
    fresh = Quantizer((2, 5), 3 * x, signed=not signed)
    assert not torch.equal(quantize(fresh, x, 5), quantize(trained, x, 5))
    fresh.load_state_dict(trained.state_dict())
    for bits in (2, 5):
        assert torch.equal(quantize(fresh, x, bits), quantize(trained, x, bits))


def test_step_gradient_is_exact_for_a_bfloat16_tensor():
    generator = torch.Generator().manual_seed(0)
    images, grad = torch.randn(2, 32, 16, 8, 8, generator=generator).bfloat16()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, step = images.to(dtype).requires_grad_(), torch.tensor(0.7, requires_grad=True)
        x_hat = lsq(x, step, 2, False)
        x_hat.backward(grad.to(dtype))
        assert x_hat.dtype == x.grad.dtype == dtype
        found[dtype] = x_hat.bfloat16(), step.grad, x.grad.float()
    for exact, half in zip(*found.values(), strict=True):
        torch.testing.assert_close(half, exact)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (6, 7)])
def test_the_steps_of_channels_broadcast_and_can_be_channels_last(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer((2, 4), weight, True, per_channel=True)
    before = quantize(quantizer, weight, 2)
    assert quantizer.steps.shape == (2, shape[0])
    assert quantizer.step(2).shape == (shape[0], *[1] * (len(shape) - 1))
    assert torch.equal(quantize(quantizer.to(memory_format=torch.channels_last), weight, 2), before)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 1, 3, 3), (6, 7)])
def test_each_channel_is_quantized_by_its_own_step(shape, scaled):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64) * torch.rand(shape[0]).double().reshape(
        -1, *[1] * (len(shape) - 1)
    )
    quantizer = Quantizer((2, 4), weight, True, nested_step, scaled, per_channel=True)
    for bits in (2, 4):
        latent, upstream = weight.clone().requires_grad_(), torch.randn_like(weight)
        x_hat = quantize(quantizer, latent, bits)
        grad_x, grad_steps = torch.autograd.grad(x_hat, (latent, quantizer.steps), upstream)
        for i, row in enumerate(weight):
            step = float(nested_step(row, bits))
            assert quantizer.step(bits)[i].item() == pytest.approx(step, rel=1e-12)
            expected = run_lsq(row, step, bits, True, upstream[i], scaled)
            own = x_hat[i], grad_x[i], grad_steps[(2, 4).index(bits), i].squeeze()
            for found, wanted in zip(own, expected, strict=True):
                assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_second_derivatives_are_those_of_the_first():
    """f = sum(x_hat^2 * w): df/dx = 2 x_hat w inside, and d/dw of its sum is 2 x_hat inside."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    w = torch.linspace(1, 2, 9, dtype=torch.float64, requires_grad=True)
    x_hat = lsq(x, torch.tensor(0.5, dtype=torch.float64), 2, True)
    (slope,) = torch.autograd.grad((x_hat.square() * w).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), w)
    inside = (x > -1) & (x < 0.5)
    torch.testing.assert_close(second, torch.where(inside, 2 * x_hat, 0).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_few_digits_give_the_same_numbers_without_a_compiler(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 1000, generator=generator).to(dtype)
    step, found = torch.full((4, 1), 0.3, dtype=dtype), []
    for compiles in (True, False):
        monkeypatch.setattr(
            "mpqlib.network.compilation.can_compile", lambda device, yes=compiles: yes
        )
        v, s = x.clone().requires_grad_(), step.clone().requires_grad_()
        x_hat = lsq(v, s, 4, True)
        x_hat.backward(torch.ones_like(x_hat))
        found.append((x_hat.detach(), v.grad, s.grad))
    torch.testing.assert_close(*found)
