"""Step sizes with the least rounding error, and corrected means, against naive computations."""

import copy

import pytest
import torch
from conftest import Normalised, TinyNet, images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpqlib.network.supernet import Supernet
from mpqlib.search.proxies import hessian_traces, similarities
from mpqlib.training.calibration import fit_steps, least_squares_step
from mpqlib.training.evaluation import (
    batch_norms,
    copy_statistics,
    correct_means,
    evaluate,
    recalibrate,
)
from mpqlib.training.loop import TrainConfig, train


def rounding_error(row, step, low, high):
    return float((step * (row / step).round().clamp(low, high) - row).square().sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans(), st.floats(1e-3, 1e3))
def test_no_step_on_a_finer_grid_is_much_better(seed, bits, signed, scale):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, 1000, generator=generator, dtype=torch.float64) * scale
    rows = rows if signed else rows.abs()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    total = best = 0.0
    for row, step in zip(rows, least_squares_step(rows, bits, signed), strict=True):
        no_clip = max(float(row.max()) / high, float(row.min()) / low if low else 0.0)
        assert 0 < step <= no_clip * (1 + 1e-12)
        total += rounding_error(row, float(step), low, high)
        finer = [no_clip * i / 200 for i in range(1, 201)]
        best += min(rounding_error(row, s, low, high) for s in finer)
    assert total <= 1.05 * best


def test_a_row_of_zeros_gets_the_step_one():
    rows = torch.stack([torch.zeros(4), torch.ones(4)])
    assert least_squares_step(rows, 4, True)[0] == 1


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_fitted_steps_round_weights_and_activations_better(granularity):
    torch.manual_seed(0)
    x = images(32).tensors[0]
    supernet = Supernet(TinyNet(), x, (2, 3, 4), granularity=granularity, weight_steps="lsq")
    before = copy.deepcopy(supernet.state_dict())
    read = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, n=name: read.update({n: args[0].clone()}))
        for name, layer in supernet.layers.items()
    ]
    supernet.eval()(x)
    for handle in handles:
        handle.remove()

    def error():
        total = []
        with torch.no_grad():
            for name, layer in supernet.layers.items():
                weights = layer.weight_quantizer
                for b in weights.bits:
                    w = layer.op.weight
                    total.append((weights(w, weights.position(b)) - w).square().sum())
                if layer.act_quantizer is not None:
                    for b in layer.act_quantizer.bits:
                        q = layer.act_quantizer
                        v = read[name]
                        total.append((q(v, q.position(b)) - v).square().sum())
        return torch.stack(total)

    first = error()
    fit_steps(supernet, x)
    assert (error() <= 1.02 * first).all() and error().sum() < 0.9 * first.sum()
    changed = [n for n, v in supernet.state_dict().items() if not torch.equal(v, before[n])]
    assert changed and all(n.endswith("quantizer.steps") for n in changed)
    again = copy.deepcopy(supernet.state_dict())
    fit_steps(supernet, x)
    assert all(torch.equal(v, again[n]) for n, v in supernet.state_dict().items())


def test_values_that_are_not_finite_are_named():
    supernet = Supernet(TinyNet(), images(8).tensors[0], (2, 4))
    x = images(8).tensors[0].clone()
    x[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer '.*' reads values that are not finite"):
        fit_steps(supernet, x)
    supernet.layers["pointwise"].op.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="weight of 'pointwise' holds values that are not finite"):
        fit_steps(supernet, images(8).tensors[0])


def test_statistics_that_training_left_behind_are_refused(dataset):
    torch.manual_seed(0)
    supernet = Supernet(TinyNet(), dataset.tensors[0][:16], (2, 3, 4))
    config = TrainConfig(epochs=1, batch_size=16, lr=0.1)
    supernet, _ = train(supernet, dataset, config)
    x, y = dataset.tensors
    calls = [
        lambda: copy_statistics(supernet, supernet.uniform(2)),
        lambda: correct_means(supernet, x, supernet.uniform(2)),
        lambda: fit_steps(supernet, x),
        lambda: hessian_traces(supernet, x, y, 1),
        lambda: similarities(supernet, x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="float mode after one-shot training"):
            call()
    recalibrate(supernet, dataset, None)
    for call in calls:
        call()


def test_statistics_measured_with_other_steps_are_refused(dataset):
    torch.manual_seed(0)
    supernet = Supernet(TinyNet(), dataset.tensors[0][:16], (2, 3, 4))
    config = supernet.uniform(3)
    evaluate(supernet, dataset, config)  # as in the float network: allowed
    recalibrate(supernet, dataset, None)
    recalibrate(supernet, dataset, config)
    fit_steps(supernet, dataset.tensors[0])
    evaluate(supernet, dataset)  # float mode has no steps
    with pytest.raises(ValueError, match="or of other step sizes: pass calibration="):
        evaluate(supernet, dataset, config)
    with pytest.raises(ValueError, match="or of other step sizes"):  # nor was it measured
        evaluate(supernet, dataset, supernet.uniform(4))
    evaluate(supernet, dataset, config, calibration=dataset)
    evaluate(supernet, dataset, config)
    copy_statistics(supernet, supernet.uniform(4))
    evaluate(supernet, dataset, supernet.uniform(4))


def test_a_network_that_normalises_in_place_is_calibrated_like_its_twin():
    found = []
    for in_place in (True, False):
        dataset = images(24)
        x, y = dataset.tensors
        supernet = Supernet(Normalised(in_place), x, (2, 3, 4))
        for _ in range(2):
            fit_steps(supernet, x)
        config = supernet.uniform(4)
        correct_means(supernet, x, config)
        traces = [hessian_traces(supernet, x, y, 2) for _ in range(2)]
        assert traces[0] == traces[1]
        found.append(
            {**supernet.state_dict(), **{n: torch.tensor(t) for n, t in traces[0].items()}}
        )
    for name, tensor in found[0].items():
        assert torch.allclose(tensor.double(), found[1][name].double(), rtol=1e-3, atol=1e-5), name


class NormFirst(nn.Module):
    """A batch norm that follows no convolution, before one."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.conv(self.norm(x).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    "how", [copy_statistics, lambda s, c: correct_means(s, images(24)[:][0], c)]
)
def test_norms_that_follow_no_convolution_keep_statistics_of_float_mode(how, dataset):
    supernet = Supernet(NormFirst(), dataset.tensors[0][:16], (2, 3, 4))
    recalibrate(supernet, dataset, None)
    config = supernet.uniform(3)
    with pytest.raises(ValueError, match="hold statistics of another configuration"):
        evaluate(supernet, dataset, config)
    how(supernet, config)
    how(supernet, supernet.uniform(4))
    evaluate(supernet, dataset, config)
    evaluate(supernet, dataset)


def test_steps_need_images_and_a_supernet():
    with pytest.raises(ValueError, match="supernet is a TinyNet"):
        fit_steps(TinyNet(), images(4).tensors[0])
    with pytest.raises(ValueError, match="images is a TensorDataset: a tensor"):
        fit_steps(Supernet(TinyNet(), images(8).tensors[0], (2, 4)), images(8))
    supernet = Supernet(TinyNet(), images(8).tensors[0], (2, 4))
    with pytest.raises(ValueError, match="images is a TensorDataset: a tensor"):
        correct_means(supernet, images(8), supernet.uniform(2))
    with pytest.raises(ValueError, match="images is empty"):
        fit_steps(supernet, images(8).tensors[0][:0])


def means_of_outputs(supernet, x, config):
    """Mean of each channel of each convolution's output."""
    found = {}
    handles = [
        layer.op.register_forward_hook(
            lambda m, a, y, n=name: found.update({n: y.mean((0, 2, 3))}) if y.dim() == 4 else None
        )
        for name, layer in supernet.layers.items()
    ]
    with torch.no_grad():
        supernet(x, config)
    for handle in handles:
        handle.remove()
    return found


def test_corrected_means_give_each_norm_the_mean_output_of_float_mode():
    torch.manual_seed(0)
    dataset = images(64)
    network = TinyNet().eval()
    for module in network.modules():  # statistics that are those of no batch
        if hasattr(module, "running_mean") and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = dataset.tensors[0]
    supernet = Supernet(network, x, (2, 3, 4)).eval()
    config = supernet.uniform(2)
    in_float = means_of_outputs(supernet, x, None)
    correct_means(supernet, x, config)
    quantized = means_of_outputs(supernet, x, config)
    moved = 0
    for name, layer in supernet.layers.items():
        if getattr(layer, "bank", None) is None:
            continue
        row = layer.row(config[name])
        after = quantized[name] - layer.bank.running_mean[row]  # what the norm scales
        before = in_float[name] - layer.norm.running_mean
        assert torch.allclose(after, before, atol=1e-5)
        assert torch.equal(layer.bank.running_var[row], layer.norm.running_var)
        moved += float((layer.bank.running_mean[row] - layer.norm.running_mean).abs().sum())
    assert moved > 0.1
    evaluate(supernet, dataset, config)  # the statistics belong to `config`
    other = config.replace("pointwise", (3, 2))
    supernet(x, other)
    evaluate(supernet, dataset, supernet.uniform(3), calibration=dataset)
    with pytest.raises(ValueError, match="hold statistics of another configuration"):
        evaluate(supernet, dataset, config)


def test_statistics_of_float_mode_can_be_taken_back():
    torch.manual_seed(0)
    dataset = images(64)
    supernet = Supernet(TinyNet().eval(), dataset.tensors[0], (2, 4)).eval()
    config = supernet.uniform(2)
    first = evaluate(supernet, dataset, config)
    recalibrate(supernet, dataset, config)
    assert evaluate(supernet, dataset, config).loss != first.loss
    copy_statistics(supernet, config)
    assert evaluate(supernet, dataset, config).loss == first.loss
    assert batch_norms(supernet)


def test_means_of_outputs_that_are_not_finite_are_named():
    supernet = Supernet(TinyNet().eval(), images(8).tensors[0], (2, 4)).eval()
    x = images(8).tensors[0].clone()
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"outputs of .* are not finite"):
        correct_means(supernet, x, supernet.uniform(2))


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "8", None])
def test_a_batch_size_that_is_no_whole_number_is_named(supernet, wrong):
    with pytest.raises(ValueError, match=f"batch_size={wrong!r} is not allowed: a whole number"):
        fit_steps(supernet, images(4).tensors[0], batch_size=wrong)


WRONG_IMAGES = {
    "float64": (lambda x: x.double(), "images in torch.float64: the model reads torch.float32"),
    "uint8": (lambda x: x.byte(), "images in torch.uint8: the model reads torch.float32"),
    "one": (lambda x: x[0], r"images is of shape \(3, 8, 8\): \(N, C, H, W\) is needed"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_images_that_the_network_cannot_read_are_named(supernet, change, message):
    x, before = change(images(4).tensors[0]), copy.deepcopy(supernet.state_dict())
    with pytest.raises(ValueError, match=message):
        fit_steps(supernet, x)
    with pytest.raises(ValueError, match=message):
        correct_means(supernet, x, supernet.uniform(2))
    assert all(torch.equal(before[k], v) for k, v in supernet.state_dict().items())


def test_a_float64_network_is_calibrated_on_float64_images():
    torch.manual_seed(0)
    x = images(16).tensors[0].double()
    supernet = Supernet(TinyNet().double(), x, (2, 4))
    fit_steps(supernet, x)
    correct_means(supernet, x, supernet.uniform(2))
    assert supernet(x, supernet.uniform(2)).isfinite().all()
