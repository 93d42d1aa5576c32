"""What a run stores: measurements, policy, provenance and figures."""

import copy
import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import yaml
from conftest import images

from mpqlib import data
from mpqlib.files import save_weights
from mpqlib.network.bits import largest
from mpqlib.report import plots, runs
from mpqlib.report.policy import describe_policy
from mpqlib.training.evaluation import evaluate, recalibrate
from mpqlib.training.loop import TrainConfig, train


def test_measure_recalibrates_unless_told_not_to(supernet):
    part = images(32)
    splits = data.Splits(part, part, images(20, 1), images(24, 2), ("a", "b", "c"))
    config = supernet.uniform(3)
    before = supernet.state_dict()["model.stem.0.bank.running_mean"].clone()
    without = runs.measure(supernet, config, splits, images=None)
    key = "model.stem.0.bank.running_mean"
    assert torch.equal(before, supernet.state_dict()[key])
    found = runs.measure(supernet, config, splits)
    assert not torch.equal(before, supernet.state_dict()[key])
    assert found.keys() == without.keys() and found["search_loss"] != without["search_loss"]
    assert found["top1_low"] <= found["top1"] <= found["top1_high"]


def test_measure_takes_each_number_from_its_own_images(supernet):
    parts = [images(count, seed) for seed, count in enumerate((40, 32, 20, 24))]
    train_part, calibration, search, test = parts
    splits = data.Splits(train_part, calibration, search, test, ("a", "b", "c"))
    config, twin = supernet.uniform(3), copy.deepcopy(supernet)
    found = runs.measure(supernet, config, splits)
    recalibrate(twin, train_part, config)
    expected = [evaluate(twin, part, config) for part in (search, test)]
    assert found["search_loss"] == expected[0].loss != expected[1].loss
    assert found["search_top1"] == 100 * expected[0].top1
    assert found["top1"] == pytest.approx(100 * expected[1].top1)


def test_a_run_is_stored_whole(supernet, metrics, dataset, tmp_path):
    config = TrainConfig(epochs=2, batch_size=16, step_travel=0.01)
    supernet, history = train(supernet, dataset, config)
    found = largest(supernet.candidates)
    sha256 = save_weights(tmp_path / "supernet.safetensors", supernet, {"model": "tiny"})
    drawn = {
        "training": plots.training_curves({"supernet": history}),
        "turbulence": plots.turbulence_map(history),
        "policy": plots.policy_bits(supernet.table, found),
        "comparison": plots.accuracy_over_cost(metrics, 3.0),
    }
    for figure in drawn.values():
        for axis in figure.axes:
            assert axis.get_ylabel() or axis.get_xlabel()
    runs.save_run(
        tmp_path,
        parameters={"bits": [2, 3]},
        metrics=metrics,
        source=runs.provenance([0], 75.04),
        figures=drawn,
        policy=describe_policy(supernet, found, sha256, {"model": "tiny"}),
    )
    plt.close("all")
    policy = json.loads((tmp_path / "policy.json").read_text())
    assert policy["layers"] == {name: list(bits) for name, bits in found.items()}
    assert policy["checkpoint_sha256"] == sha256 and policy["model"] == "tiny"
    assert policy["first"].keys() == {"stem.0"} and policy["last"] == ["last"]
    assert yaml.safe_load((tmp_path / "parameters.yaml").read_text()) == {"bits": [2, 3]}
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == len(metrics)
    source = json.loads((tmp_path / "provenance.json").read_text())
    assert torch.__version__.startswith(source["versions"]["torch"]) and source["seeds"] == [0]
    assert source["seconds"] == 75.0 and source["figures"] == list(drawn)
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"{name}.png" for name in drawn} < names and not any(n.startswith(".") for n in names)


def test_measure_refuses_an_unfit_number_of_images(supernet):
    part = images(8)
    splits = data.Splits(part, part, part, part, ("a", "b", "c"))
    with pytest.raises(ValueError, match="images=0 is not allowed"):
        runs.measure(supernet, supernet.uniform(3), splits, images=0)


def test_figures_of_an_earlier_run_do_not_remain(metrics, tmp_path):
    def save(*names):
        drawn = {name: plt.figure() for name in names}
        source = runs.provenance([0], 1.0)
        runs.save_run(tmp_path, parameters={}, metrics=metrics, source=source, figures=drawn)
        plt.close("all")

    (tmp_path / "mine.png").write_bytes(b"not of a run")
    save("a", "b")
    save("b", "c")
    assert {path.name for path in tmp_path.glob("*.png")} == {"b.png", "c.png", "mine.png"}


def test_a_figure_outside_the_folder_is_never_removed(metrics, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "provenance.json").write_text(json.dumps({"figures": ["../outside"]}))
    runs.save_run(folder, parameters={}, metrics=metrics, source={}, figures={})
    assert outside.exists()


def test_a_stopwatch_adds_the_time_of_earlier_processes(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    first = runs.Stopwatch(tmp_path / "seconds.json")
    now[0] += 5
    assert first.seconds() == 5
    now[0] += 2
    assert first.seconds() == 7
    now[0] += 90  # lost: killed before the next stage ended
    second = runs.Stopwatch(tmp_path / "seconds.json")
    now[0] += 3
    assert second.seconds() == 10
