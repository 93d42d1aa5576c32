"""Probes against naive references, number by number."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TinyNet, images
from scipy.stats import wasserstein_distance
from torch import nn

from mpqlib.network.supernet import Supernet
from mpqlib.studies import idm_density, latent_distance
from mpqlib.training.loop import TrainConfig, train


def test_pointwise_names_convolutions_of_one_group_that_choose(supernet):
    assert latent_distance.pointwise(supernet) == [
        "pointwise"
    ]  # no stem, no depth-wise one, no linear


def test_pointwise_leaves_out_grouped_and_fixed_ones():
    ops = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)]
    network = nn.Sequential(*ops, nn.Flatten(), nn.Linear(4, 2))
    supernet = Supernet(network, torch.randn(8, 3, 1, 1), (2, 4))
    assert latent_distance.pointwise(supernet) == ["2"]  # "0" reads the image: 8 bits, no choice


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grid_points_are_what_the_quantizer_uses(supernet, bits):
    for name in supernet.searchable:
        layer = supernet.layers[name]
        if bits in layer.weight_quantizer.bits:
            points = latent_distance.grid_points(layer, bits)
            assert points.dtype == torch.int8 and points.shape == layer.op.weight.shape
            used = layer.weight_quantizer(layer.op.weight, bits)
            assert torch.equal(points * layer.weight_quantizer.step(bits), used)


def naive_points(layer, bits: int) -> list[int]:
    """Integers of a layer's weights, one at a time."""
    step = layer.weight_quantizer.step(bits).item()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [round(min(max(w / step, low), high)) for w in layer.op.weight.flatten().tolist()]


def test_probe_follows_a_training_weight_by_weight(supernet, dataset):
    probe, seen = latent_distance.LatentProbe(["pointwise"], [2, 4]), []

    def watch(run):
        probe(run)
        layer = run.model.layers["pointwise"]
        weights = layer.op.weight.flatten().tolist()
        steps = {b: layer.weight_quantizer.step(b).item() for b in (2, 4)}
        seen.append((weights, {b: (steps[b], naive_points(layer, b)) for b in (2, 4)}))

    config = TrainConfig(epochs=2, batch_size=16, lr=0.5, warmup_epochs=0, scheduler=False)
    train(supernet, dataset, config, watch=watch)
    assert [row["step"] for row in probe.rows] == [i for i in range(6) for _ in range(2)]
    for row in probe.rows:
        weights, grid = seen[row["step"]]
        step, points = grid[row["bits"]]
        apart = sum((w - step * q) ** 2 for w, q in zip(weights, points, strict=True))
        assert row["distance"] == pytest.approx(
            math.sqrt(apart / sum(w * w for w in weights)), rel=1e-4
        )
        before = seen[max(row["step"] - 1, 0)][1][row["bits"]][1]
        flipped = sum(q != p for q, p in zip(points, before, strict=True))
        assert row["flips"] == pytest.approx(flipped / len(points))
    assert any(row["flips"] > 0 for row in probe.rows)


def test_probe_changes_no_training(dataset):
    def trained(watch):
        torch.manual_seed(0)
        supernet = Supernet(TinyNet(), images(16, seed=1).tensors[0], (2, 3, 4))
        return train(supernet, dataset, TrainConfig(epochs=1, batch_size=16), watch=watch)[0]

    probed, plain = trained(latent_distance.LatentProbe(["pointwise"], [2])), trained(None)
    for a, b in zip(probed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_roughness_ignores_a_drift():
    line = [0.5 - 0.1 * i for i in range(10)]
    assert latent_distance.roughness(line) == pytest.approx(0, abs=1e-12)
    wobble = [(-1) ** i for i in range(1000)]
    drifting = [w + 3 * i for i, w in enumerate(wobble)]
    assert latent_distance.roughness(drifting) == pytest.approx(latent_distance.roughness(wobble))
    assert latent_distance.roughness(wobble) == pytest.approx(1, abs=1e-3)


def test_late_half_sees_the_last_steps_of_each_layer_apart():
    rows = [
        {
            "step": step,
            "layer": layer,
            "bits": 4,
            "distance": (step % 2) * (layer == "a"),
            "flips": f,
        }
        for layer in "ab"
        for step, f in enumerate([0, 9, 9, 0.1, 0.3])
    ]
    late = latent_distance.late_half(pd.DataFrame(rows)).set_index(
        "layer"
    )  # steps 3 and 4 of 0 to 4
    assert late["flips"].tolist() == pytest.approx([0.2, 0.2])
    assert late["distance"].tolist() == [0.5, 0]
    assert late["spread"].tolist() == pytest.approx([0, 0])  # two points lie on a line


def naive_jensen_shannon(p: list[float], q: list[float]) -> float:
    """Square root of the Jensen-Shannon divergence of two distributions, in bits."""

    def divergence(a, b):
        return sum(x * math.log2(x / y) for x, y in zip(a, b, strict=True) if x)

    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return math.sqrt((divergence(p, m) + divergence(q, m)) / 2)


def test_jensen_shannon_by_hand():
    a, b = torch.tensor([0.0, 0, 0, 1]), torch.tensor([0.0, 1, 1, 1])
    expected = naive_jensen_shannon([3 / 4, 1 / 4], [1 / 4, 3 / 4])
    assert idm_density.jensen_shannon(a, b, bins=2) == pytest.approx(expected)


def test_jensen_shannon_is_a_distance_between_0_and_1():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5000, generator=generator)
    near, far = idm_density.jensen_shannon(a, b + 0.1), idm_density.jensen_shannon(a, b + 1)
    assert 0 < near < far < 1
    assert idm_density.jensen_shannon(a, a) == 0
    assert idm_density.jensen_shannon(a, b) == pytest.approx(idm_density.jensen_shannon(b, a))
    assert idm_density.jensen_shannon(a, a + 100) == pytest.approx(1)
    # Units do not matter, nor does one value far out (which would leave all others one bin)
    assert idm_density.jensen_shannon(8 * a, 8 * b) == pytest.approx(
        idm_density.jensen_shannon(a, b)
    )
    outlier = torch.cat([b + 1, torch.tensor([1e6])])
    assert idm_density.jensen_shannon(a, outlier) == pytest.approx(far, abs=0.01)


def test_wasserstein_agrees_with_scipy():
    a, b = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    expected = wasserstein_distance(a.flatten().numpy(), 2 * b.flatten().numpy())
    assert idm_density.wasserstein(a, 2 * b) == pytest.approx(expected, rel=1e-6)
    assert idm_density.wasserstein(a, a + 3) == pytest.approx(3, rel=1e-6)
    assert idm_density.wasserstein(a, a.flip(1)) == 0


def test_output_distances_count_in_standard_deviations_of_the_high_bits():
    b = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    rows = {}
    for unit in (1, 10):
        low, high = {"x": unit * (b + 0.5), "y": unit * b.flip(0)}, {"x": unit * b, "y": unit * b}
        rows[unit] = idm_density.output_distances(low, high)
    x, y = rows[1]
    assert (x["layer"], y["layer"]) == ("x", "y")
    assert x["wasserstein"] == pytest.approx(0.5 / float(b.std()), rel=1e-4)
    assert x["rms"] == pytest.approx(0.5 / float(b.std()), rel=1e-4)
    assert y["js"] == 0 and y["wasserstein"] == 0  # the same values ...
    assert y["rms"] == pytest.approx(math.sqrt(2), rel=0.05)  # ... in other places
    for one, ten in zip(*rows.values(), strict=True):
        assert [ten[k] for k in ("js", "wasserstein", "rms")] == pytest.approx(
            [one[k] for k in ("js", "wasserstein", "rms")], rel=1e-4
        )


def test_sampled_copies_and_keeps_to_the_same_places():
    values = torch.arange(1000.0)
    assert torch.equal(idm_density.sampled(values), values)
    few = idm_density.sampled(values, 100)
    assert few.shape == (100,) and set(few.tolist()) <= set(values.tolist())
    assert torch.equal(idm_density.sampled(-values, 100), -few)
    whole = idm_density.sampled(values)
    values += 1
    assert whole[0] == 0  # what a network then does in place stays out


def test_outputs_at_are_those_before_anything_in_place(supernet, dataset):
    x = dataset.tensors[0]
    with torch.no_grad():
        stem = supernet.eval()
        supernet.set_bits(supernet.uniform(4))
        y = stem.model.depthwise(stem.model.stem(x))  # the network then adds to it in place
    outputs = idm_density.outputs_at(supernet, x, 4)
    assert list(outputs) == ["depthwise", "pointwise"]
    assert torch.allclose(outputs["depthwise"], y.flatten(), atol=1e-6)


def test_compare_outputs_finds_none_between_equal_bits(supernet, dataset):
    x = dataset.tensors[0]
    rows, outputs = idm_density.compare_outputs(supernet, x, dataset, 4, 4)
    assert [row["layer"] for row in rows] == ["depthwise", "pointwise"]
    assert all(row["js"] == row["wasserstein"] == row["rms"] == 0 for row in rows)
    rows, outputs = idm_density.compare_outputs(supernet, x, dataset, 2, 4)
    assert list(outputs) == [2, 4] and all(row["rms"] > 0 for row in rows)


def test_outputs_alone_read_what_the_float_network_gives(supernet, dataset):
    x, read = dataset.tensors[0], {}
    layer = supernet.layers["pointwise"]
    handle = layer.register_forward_pre_hook(lambda module, args: read.update(x=args[0].clone()))
    found = idm_density.outputs_alone(supernet, x, 2)
    handle.remove()
    quantized = nn.functional.conv2d(
        layer.act_quantizer(read["x"], 2), layer.weight_quantizer(layer.op.weight, 2), layer.op.bias
    )  # no norm follows this one
    assert torch.allclose(found["pointwise"], quantized.flatten(), atol=1e-6)
    by_channel = found["depthwise"].view(len(x), 8, -1).transpose(0, 1).flatten(1)
    assert torch.allclose(by_channel.mean(1), torch.zeros(8), atol=1e-4)  # this batch's statistics
    assert not any(layer._forward_hooks for layer in supernet.layers.values())


def test_photographs_are_crops_within_the_pictures():
    crops = idm_density.photographs(64, (0.0,) * 3, (1.0,) * 3, across=3, down=2)
    assert crops.shape == (12, 3, 64, 64) and crops.min() >= 0 and crops.max() <= 1
    assert not torch.equal(crops[0], crops[1])
    normalised = idm_density.photographs(64, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), across=3, down=2)
    again = normalised * torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    again += torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    assert torch.allclose(again, crops, atol=1e-6)


def test_pictures_hold_every_layer_arm_and_bit_width():
    arms = [(arm, seed) for arm in ("with", "without") for seed in (0, 1)]
    rows = [
        {"arm": arm, "seed": seed, "layer": name, "js": 0.1, "wasserstein": 0.2}
        for arm, seed in arms
        for name in ("x", "y")
    ]
    figure = idm_density.distances_by_layer(pd.DataFrame(rows))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["x", "y"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["with", "without"]
    panels = {"a": {2: np.arange(9), 6: np.arange(9) ** 2}, "b": {2: np.arange(9)}}
    assert [axis.get_title() for axis in idm_density.densities(panels).axes] == ["a", "b"]
    steps = [
        {"arm": arm, "seed": seed, "layer": name, "step": step, "bits": bits, "flips": 0.1}
        for arm, seed in arms
        for name in ("x", "y")
        for step in range(3)
        for bits in (4, 6)
    ]
    figure = latent_distance.over_steps(pd.DataFrame(steps), "flips", "share")
    assert [axis.get_title() for axis in figure.axes] == ["x", "y"]
    assert {axis.get_xlabel() for axis in figure.axes} == {"training step"}
