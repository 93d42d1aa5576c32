"""Exact costs, the published table, and calibration alone on made-up images."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import TinyNet, images
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import TensorDataset

from mpqlib import models
from mpqlib.files import save_weights
from mpqlib.network.bits import BitConfig
from mpqlib.network.cost import bitops, bitops_at
from mpqlib.network.supernet import Supernet
from mpqlib.studies import imagenet as study

SETTINGS = [["channel", how] for how in study.NORMS] + [["tensor", "measured again"]]


def subject(folder, checkpoint=None, seed=0, bits=(3, 4, 6)):
    torch.manual_seed(0)
    halves = study.Halves(images(32), images(24, seed=1))
    about = dict(seed=seed)
    return study.Calibrated(TinyNet().eval(), halves, bits, "cpu", checkpoint, folder, about)


def test_costs_are_those_that_the_release_counts():
    rows = pd.DataFrame(study.measure_costs("tf_efficientnet_lite0", [2, 3, 4]))
    assert rows["bitops_g"].round(3).tolist() == [2.268, 4.133, 6.745]
    weights = sum(
        m.weight.numel()
        for m in models.create("tf_efficientnet_lite0", 1000).modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    )
    edges = 32 * 3 * 9 + 1280 * 1000
    sizes = [((weights - edges) * b + 8 * edges) / 8e6 for b in (2, 3, 4)]
    assert rows["size_mb"].tolist() == pytest.approx(sizes)


def test_levels_are_uniform_bits_of_equal_cost(supernet):
    points = [(b, bitops(supernet.table, supernet.uniform(b))) for b in (3, 4)]
    for level in (3, 3.3, 4, 5.5):
        budget = bitops_at(supernet.table, level)
        assert study.level_of(budget, *points) == pytest.approx(level)


def test_published_rows_stand_beside_our_counts():
    names = {row.model for row in study.PUBLISHED}
    costs = pd.DataFrame(
        {"model": n, "bits": b, "bitops_g": float(b * b), "size_mb": b / 4}
        for n in names
        for b in (3, 4)
    )
    text = study.published_table(costs).data
    lines = text.splitlines()[2:]
    assert len(lines) == len(study.PUBLISHED)
    for row, line in zip(study.PUBLISHED, lines, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row.model and float(cells[-1]) == row.top1
        assert float(cells[5]) == row.bits**2
        if row.bitops_g is not None:
            assert float(cells[4].split()[1]) ** 2 == pytest.approx(row.bitops_g, rel=0.01)


def test_all_arms_choose_within_their_budgets(tmp_path):
    told = subject(tmp_path)
    supernet = told.prepare("channel")
    x, y = told.halves.calibration.tensors
    levels = [3, 4, 6]
    budgets = [bitops_at(supernet.table, level) for level in levels]
    for arm in study.WAYS:
        configs = study.choose_bits(supernet, x, y, budgets, arm, probes=64)
        assert len(configs) == 3
        if arm in ("SQNR list", "Hessian trace", "orthogonality"):  # more bits are never worse
            assert len(set(configs)) == 3
        for config, budget in zip(configs, budgets, strict=True):
            supernet.check(config)
            assert bitops(supernet.table, config) <= budget
    with pytest.raises(ValueError, match="arm='best' is not allowed: one of"):
        study.choose_bits(supernet, x, y, budgets, "best")


class NormFirst(TinyNet):
    """Begins with a batch norm that follows no convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)

    def forward(self, x):
        return super().forward(self.first(x))


def test_arms_do_not_disturb_each_other(tmp_path):
    arms = ["assignment", "Hessian trace", "orthogonality"]
    told = replace(subject(tmp_path), network=NormFirst())
    how = dict(granularity="channel", search_images=16, probes=2)
    assert len(study.measure_policies(told, [4, 5], arms, **how)) == 6


def test_rows_are_measured_kept_and_compared_by_image(tmp_path, monkeypatch):
    told = subject(tmp_path)
    levels, arms = [4, 5], ["assignment", "orthogonality"]
    how = dict(granularity="channel", search_images=16, probes=2)

    def measure():
        rows = study.measure_settings(told, SETTINGS)
        return pd.DataFrame(rows + study.measure_policies(told, levels, arms, **how))

    measured = measure()
    assert measured["study"].value_counts().to_dict() == {"uniform": 12, "policies": 4, "float": 1}
    assert (measured["correct"].str.len() == 24).all()
    share = measured["correct"].map(lambda digits: 100 * digits.count("1") / 24)
    assert measured["top1"].tolist() == pytest.approx(share.tolist())
    uniform = measured[measured["study"] == "uniform"]
    assert uniform.groupby("level")["bitops_g"].nunique().eq(1).all()
    assert uniform.groupby("level")["loss"].nunique().gt(2).any()  # settings matter
    policies = measured[measured["study"] == "policies"]
    assert (policies["bitops_g"] <= policies["budget_g"]).all()
    monkeypatch.setattr(study, "choose_bits", None)
    monkeypatch.setattr(study, "evaluate", None)
    pd.testing.assert_frame_equal(measure(), measured)  # from the files

    rows = pd.DataFrame(study.image_comparisons(measured, "channel", [4, 5, 6]))
    for name, arm in [("policies", "assignment"), ("granularity", "tensor")]:
        part = rows[(rows["study"] == name) & (rows["arm"] == arm)]
        assert sorted(part["image"]) == list(range(24))
    mean = rows[(rows["study"] == "policies") & (rows["arm"] == "assignment")]["percent_correct"]
    expected = policies[policies["arm"] == "assignment"]["top1"].mean()
    assert mean.mean() == pytest.approx(expected)
    both = rows[(rows["study"] == "uniform")]  # at 4 bits, the only level of both
    assert set(both["percent_correct"]) <= {0.0, 100.0}
    stated = study.comparisons(rows)
    assert [claim.base for claim in stated] == [
        "uniform", "orthogonality", "of the float network", "means corrected", "tensor"
    ]  # fmt: skip
    for claim in stated:
        units = rows[rows["study"] == claim.where["study"]]
        assert {claim.arm, claim.base} <= set(units["arm"])
    assert set(study.top1_plots(measured, "channel")) == {"policies", "uniform"}
    table = study.top1_table(measured, "uniform", ["granularity", "norms"]).data
    assert table.count("\n") == 1 + 4 and "6 bits" in table


def test_a_checkpoint_replaces_weights_and_steps(tmp_path):
    torch.manual_seed(5)
    trained = Supernet(TinyNet(), images(16).tensors[0], (3, 4, 6))
    save_weights(tmp_path / "supernet.safetensors", trained, {})
    told = subject(tmp_path, tmp_path / "supernet.safetensors")
    found = told.prepare("tensor").state_dict()
    assert all(torch.equal(found[n], value) for n, value in trained.named_parameters())
    settings = [["tensor", how] for how in study.NORMS]
    rows = study.measure_settings(told, settings)
    assert rows[0]["arm"] == "float" and len(rows) == 10
    for file in tmp_path.glob("uniform*.json"):  # as if killed before
        file.unlink()
    assert study.measure_settings(told, settings) == rows
    with pytest.raises(ValueError, match="not allowed with a checkpoint: 'tensor' alone"):
        study.check_checkpoint("a.safetensors", "channel", settings)
    with pytest.raises(ValueError, match="of another shape"):
        told.prepare("channel")


def test_norms_are_named(tmp_path):
    told = subject(tmp_path)
    supernet = told.prepare("tensor")
    with pytest.raises(ValueError, match=r"settings=\[\['tensor', 'best'\]\] is not allowed"):
        study.measure_settings(told, [["tensor", "best"]])
    with pytest.raises(ValueError, match="norms='means corrected' is not allowed at config=None"):
        study.set_norms(supernet, None, told.halves.calibration, "means corrected")


def test_other_images_or_weights_are_refused(tmp_path):
    study.measure_settings(subject(tmp_path), [["tensor", "measured again"]])
    told = subject(tmp_path)
    other = replace(told, halves=study.Halves(images(32, seed=5), images(24, seed=1)))
    with pytest.raises(ValueError, match=r"float.json holds .*images"):
        study.measure_settings(other, [["tensor", "measured again"]])


def test_ways_without_a_level_of_uniform_bits_are_not_compared(tmp_path):
    told = subject(tmp_path)
    rows = study.measure_settings(told, [["tensor", "measured again"]])
    rows += study.measure_policies(told, [4.5], ["assignment"], "tensor", 16, 1)
    compared = pd.DataFrame(study.image_comparisons(pd.DataFrame(rows), "tensor", [4]))
    assert study.comparisons(compared) == []


def test_halves_share_no_image(tmp_path):
    for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names()[:7]):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (300, 280), (36 * i, 0, 0)).save(tmp_path / "val" / name / "a.png")
    halves, again, other = (
        study.load_halves("tf_efficientnet_lite0", tmp_path, seed) for seed in (0, 0, 1)
    )
    assert isinstance(halves.test, TensorDataset) and halves.test.tensors[0].shape[1:] == (
        3,
        224,
        224,
    )
    labels = [half.tensors[1].tolist() for half in (halves.calibration, halves.test)]
    assert sorted(labels[0] + labels[1]) == list(range(7)) and len(labels[0]) == 4
    assert torch.equal(again.test.tensors[0], halves.test.tensors[0])
    assert other.test.tensors[1].tolist() != labels[1]


def test_chosen_bits_are_stored_as_policies_are(tmp_path):
    told = subject(tmp_path)
    study.measure_policies(told, [4], ["orthogonality"], "tensor", 8, 1)
    stored = json.loads((tmp_path / "chosen-orthogonality.json").read_text())["value"]
    told.prepare("tensor").check(BitConfig.from_json(stored["configs"][0]))
    with pytest.raises(ValueError, match=r"chosen-orthogonality.json .* other"):
        study.measure_policies(told, [4], ["orthogonality"], "tensor", 16, 1)
