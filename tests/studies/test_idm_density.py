"""Distances between outputs and their plots, against naive references."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TinyNet, images
from scipy.stats import wasserstein_distance
from torch import nn

from mpqlib import data
from mpqlib.network.supernet import Supernet
from mpqlib.studies import idm_density
from mpqlib.training.evaluation import recalibrate
from mpqlib.training.loop import TrainConfig


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
    # Neither the unit matters nor one outlier, which would squeeze all other values into one bin
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


def test_output_distances_are_in_standard_deviations_of_the_high_bits():
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
    assert y["rms"] == pytest.approx(math.sqrt(2), rel=0.05)  # ... at other positions
    for one, ten in zip(*rows.values(), strict=True):
        assert [ten[k] for k in ("js", "wasserstein", "rms")] == pytest.approx(
            [one[k] for k in ("js", "wasserstein", "rms")], rel=1e-4
        )


def test_sampled_copies_values_at_the_same_positions():
    values = torch.arange(1000.0)
    assert torch.equal(idm_density.sampled(values), values)
    few = idm_density.sampled(values, 100)
    assert few.shape == (100,) and set(few.tolist()) <= set(values.tolist())
    assert torch.equal(idm_density.sampled(-values, 100), -few)
    whole = idm_density.sampled(values)
    values += 1
    assert whole[0] == 0  # later in-place operations do not change the copy


def test_outputs_at_reads_before_in_place_operations(supernet, dataset):
    x = dataset.tensors[0]
    with torch.no_grad():
        stem = supernet.eval()
        supernet.set_bits(supernet.uniform(4))
        y = stem.model.depthwise(stem.model.stem(x))  # the network then adds to it in place
    outputs = idm_density.outputs_at(supernet, x, 4)
    assert list(outputs) == ["depthwise", "pointwise"]
    assert torch.allclose(outputs["depthwise"], y.flatten(), atol=1e-6)


def test_compare_outputs_finds_no_distance_between_equal_bits(supernet, dataset):
    x = dataset.tensors[0]
    rows, outputs = idm_density.compare_outputs(supernet, x, dataset, 4, 4)
    assert [row["layer"] for row in rows] == ["depthwise", "pointwise"]
    assert all(row["js"] == row["wasserstein"] == row["rms"] == 0 for row in rows)
    rows, outputs = idm_density.compare_outputs(supernet, x, dataset, 2, 4)
    assert list(outputs) == [2, 4] and all(row["rms"] > 0 for row in rows)


def test_outputs_alone_quantizes_one_layer_of_the_float_network(supernet, dataset):
    x, read = dataset.tensors[0], {}
    layer = supernet.layers["pointwise"]
    handle = layer.register_forward_pre_hook(lambda module, args: read.update(x=args[0].clone()))
    found = idm_density.outputs_alone(supernet, x, 2)
    handle.remove()
    two = layer.weight_quantizer.position(2)
    quantized = nn.functional.conv2d(
        layer.act_quantizer(read["x"], two),
        layer.weight_quantizer(layer.op.weight, two),
        layer.op.bias,
    )  # no norm follows this one
    assert torch.allclose(found["pointwise"], quantized.flatten(), atol=1e-6)
    by_channel = found["depthwise"].view(len(x), 8, -1).transpose(0, 1).flatten(1)
    assert torch.allclose(by_channel.mean(1), torch.zeros(8), atol=1e-4)  # this batch's statistics
    assert not any(layer._forward_hooks for layer in supernet.layers.values())


def test_photographs_are_crops_inside_the_originals():
    crops = idm_density.photographs(64, (0.0,) * 3, (1.0,) * 3, across=3, down=2)
    assert crops.shape == (12, 3, 64, 64) and crops.min() >= 0 and crops.max() <= 1
    assert not torch.equal(crops[0], crops[1])
    normalised = idm_density.photographs(64, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), across=3, down=2)
    again = normalised * torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    again += torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    assert torch.allclose(again, crops, atol=1e-6)


def test_plots_show_every_layer_arm_and_bit_width():
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


def test_outputs_alone_leaves_no_trace(supernet, dataset):
    supernet.eval()
    before = copy.deepcopy(supernet.state_dict())
    idm_density.outputs_alone(supernet, dataset.tensors[0], 2)
    assert all(torch.equal(before[k], v) for k, v in supernet.state_dict().items())
    assert not any(module.training for module in supernet.modules())


def test_outputs_alone_includes_searchable_linear_layers(dataset):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 6), nn.Linear(6, 3))
    supernet = Supernet(network, dataset.tensors[0], (2, 4))
    found = idm_density.outputs_alone(supernet, dataset.tensors[0], 2)
    assert {name: len(y) for name, y in found.items()} == {"2": 6 * len(dataset)}


def test_compare_outputs_recalibrates_on_as_many_images_as_asked(supernet, dataset):
    supernet.eval()
    x, own = dataset.tensors[0], copy.deepcopy(supernet)
    outputs = idm_density.compare_outputs(supernet, x, dataset, 2, 4, images=16)[1]
    recalibrate(own, dataset, own.uniform(2), images=16)
    expected = idm_density.outputs_at(own, x, 2)
    for name, y in outputs[2].items():
        assert torch.equal(y, expected[name])
    with pytest.raises(ValueError, match="images=0 is not allowed"):
        idm_density.compare_outputs(supernet, x, dataset, images=0)


@pytest.mark.parametrize("size", [0, -1, 428])
def test_photographs_refuses_sizes_beyond_the_originals(size):
    with pytest.raises(ValueError, match=f"image_size={size} is not allowed: from 1 to 427"):
        idm_density.photographs(size, (0.0,) * 3, (1.0,) * 3)


def test_compare_weights_pairs_its_arms(monkeypatch):
    monkeypatch.setattr(idm_density, "create", lambda model, classes: TinyNet())
    parts = {part: images(64) for part in ("train", "calibration", "search", "test")}
    splits = data.Splits(**parts, classes=["red", "green", "blue"])
    config = TrainConfig(epochs=1, batch_size=32, step_travel=0.01, scheduler=False)
    configs = dict(float_config=config, config=config)

    def compared(seed: int, **arms) -> dict:
        options = dict(probe_images=16, recalibration_images=32)
        return idm_density.compare_weights(
            "tiny", splits, arms, [2, 4, 6], layer, seed, **configs, **options
        )

    def of_arm(found: dict, arm: str) -> list:
        return [{**row, "arm": ""} for row in found["rows"] if row["arm"] == arm]

    layer = "pointwise"
    found = compared(0, none=0.0, again=0.0, strong=100.0)
    assert of_arm(found, "none") == of_arm(found, "again") != of_arm(found, "strong")
    assert found["drawn"]["none"] == found["drawn"]["again"]
    assert {bits for by_bits in found["drawn"].values() for bits in by_bits} == {2, 6}
    assert len({row["layer"] for row in found["rows"]}) > 1
    assert all(0 <= row["top1"] <= 100 for row in found["rows"])
    assert of_arm(compared(0, none=0.0), "none") == of_arm(found, "none")
    assert of_arm(compared(1, none=0.0), "none") != of_arm(found, "none")
