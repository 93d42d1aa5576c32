"""The probe of latent weights against a count weight by weight."""

import math
from contextlib import suppress

import pandas as pd
import pytest
import torch
from conftest import TinyNet, images
from torch import nn

from mpqlib import data
from mpqlib.network.supernet import Supernet
from mpqlib.studies import latent_distance
from mpqlib.training.loop import TrainConfig, train


def test_a_probe_s_file_goes_on_after_an_interruption(tmp_path):
    x = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    dataset = torch.utils.data.TensorDataset(x, torch.arange(32) % 3)
    config = TrainConfig(epochs=2, batch_size=16, lr=0.5, warmup=0, step_travel=0.01)
    file = tmp_path / "latent.csv"

    def run(probe, checkpoint=None, stop=None):
        def watch(run):
            probe(run)
            if run.step == stop:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        how = dict(watch=watch, checkpoint=checkpoint)
        train(Supernet(TinyNet(), x, (2, 4)), dataset, config, **how)

    whole = latent_distance.LatentProbe(["pointwise"], [2, 4])
    run(whole)
    # Stopped after a step that no checkpoint holds: it runs twice.
    for stop in (3, None):
        probe = latent_distance.LatentProbe(["pointwise"], [2, 4], file)
        with suppress(KeyboardInterrupt):
            run(probe, tmp_path / "run.pt", stop)
    series = latent_distance.read_series(file).reset_index(drop=True)
    pd.testing.assert_frame_equal(series, pd.DataFrame(whole.rows))


def test_pointwise_names_searchable_convolutions_with_one_group(supernet):
    # neither the stem, nor the depth-wise convolution, nor the linear layer
    assert latent_distance.pointwise(supernet) == ["pointwise"]


def test_pointwise_leaves_out_grouped_and_fixed_ones():
    ops = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)]
    network = nn.Sequential(*ops, nn.Flatten(), nn.Linear(4, 2))
    supernet = Supernet(network, torch.randn(8, 3, 1, 1), (2, 4))
    assert latent_distance.pointwise(supernet) == ["2"]  # "0" is the first layer: fixed at 8 bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_grid_points_are_those_of_the_quantizer(supernet, bits):
    for name in supernet.searchable:
        layer = supernet.layers[name]
        if bits in layer.weight_quantizer.bits:
            points = latent_distance.grid_points(layer, bits)
            assert points.dtype == torch.int8 and points.shape == layer.op.weight.shape
            quantizer = layer.weight_quantizer
            used = quantizer(layer.op.weight, quantizer.position(bits))
            assert torch.equal(points * layer.weight_quantizer.step(bits), used)


def naive_points(layer, bits: int) -> list[int]:
    """Integers of a layer's weights, one at a time."""
    step = layer.weight_quantizer.step(bits).item()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [round(min(max(w / step, low), high)) for w in layer.op.weight.flatten().tolist()]


def test_probe_agrees_with_a_count_weight_by_weight(supernet, dataset):
    probe, seen = latent_distance.LatentProbe(["pointwise"], [2, 4]), []

    def watch(run):
        probe(run)
        layer = run.model.layers["pointwise"]
        weights = layer.op.weight.flatten().tolist()
        steps = {b: layer.weight_quantizer.step(b).item() for b in (2, 4)}
        seen.append((weights, {b: (steps[b], naive_points(layer, b)) for b in (2, 4)}))

    config = TrainConfig(
        epochs=2, batch_size=16, lr=0.5, warmup=0, step_travel=0.01, scheduler=False
    )
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
        known = row["step"] > 0  # the weights before the first step were not seen
        expected = flipped / len(points) if known else math.nan
        assert row["flips"] == pytest.approx(expected, nan_ok=True)
    assert any(row["flips"] > 0 for row in probe.rows)


def test_probe_does_not_change_training(dataset):
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


def test_late_half_summarises_the_last_steps_of_each_layer():
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
    late = latent_distance.late_half(pd.DataFrame(rows)).set_index("layer")  # steps 3 and 4
    assert late["flips"].tolist() == pytest.approx([0.2, 0.2])
    assert late["distance"].tolist() == [0.5, 0]
    assert late["spread"].tolist() == pytest.approx([0, 0])  # two points lie on a line


def test_plot_has_a_panel_for_each_layer():
    arms = [(arm, seed) for arm in ("with", "without") for seed in (0, 1)]
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


def test_watch_candidates_pairs_its_arms(monkeypatch):
    monkeypatch.setattr(latent_distance, "create", lambda model, classes: TinyNet())
    parts = {part: images(64) for part in ("train", "calibration", "search", "test")}
    splits = data.Splits(**parts, classes=["red", "green", "blue"])
    options = dict(epochs=1, batch_size=32, step_travel=0.01)
    configs = dict(float_config=TrainConfig(**options), config=TrainConfig(**options, lr=0.1))

    def watched(seed: int, **arms) -> dict:
        return latent_distance.watch_candidates(
            "tiny", splits, arms, [4], seed, **configs, recalibration_images=32
        )

    def of_arm(found: dict, arm: str) -> list:
        rows = [*found["series"], *found["top1"]]
        return [{**row, "arm": ""} for row in rows if row["arm"] == arm]

    found = watched(0, a=[2, 4], b=[2, 4], c=[4, 6])
    assert of_arm(found, "a") == of_arm(found, "b") != of_arm(found, "c")
    assert {row["step"] for row in found["series"]} == {0, 1}
    assert {row["bits"] for row in found["series"]} == {4}
    assert all(0 <= row["top1"] <= 100 for row in found["top1"])
    again, other = watched(0, a=[2, 4]), watched(1, a=[2, 4])
    assert of_arm(again, "a") == of_arm(found, "a")
    distances = [[row["distance"] for row in one["series"]] for one in (again, other)]
    assert distances[0] != distances[1]
