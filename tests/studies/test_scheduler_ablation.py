"""The ablation's arms share all but their switches, and go on where they stopped."""

import json

import pytest
import torch

from mpqlib import data
from mpqlib.files import remembered
from mpqlib.network.cost import bitops_at
from mpqlib.studies import scheduler_ablation

SETTING = scheduler_ablation.Setting(
    model="test_byobnet",
    dataset="digits",
    train_images=64,
    search_share=0.2,
    image_size=16,
    bits=[2, 4],
    levels=[3],
    float_epochs=1,
    epochs=1,
    freeze_start=0,
    freeze_every=1,
    batch_size=32,
    lr=0.02,
    search_images=16,
    search={"weights_first": False},
)


@pytest.fixture(scope="module")
def splits():
    return scheduler_ablation.load_into_memory(data.load("digits", image_size=16, train_images=64))


def test_images_in_memory_are_those_of_the_splits(splits):
    own = data.load("digits", image_size=16, train_images=64)
    for part in ("search", "test"):
        kept = getattr(splits, part)
        assert len(kept) == len(getattr(own, part))
        assert torch.equal(kept[3][0], getattr(own, part)[3][0])


def test_arms_are_studied_once_and_keep_their_budget(splits, tmp_path):
    cpu, rows = torch.device("cpu"), {}
    for arm in ("plain", "both"):
        rows[arm] = scheduler_ablation.run_arm(SETTING, splits, arm, 0, tmp_path, cpu)
    names = [row["configuration"] for row in rows["plain"]]
    assert names == [row["configuration"] for row in rows["both"]]
    assert names == ["searched 3", "uniform 2", "uniform 4"]
    supernet = scheduler_ablation.train_arm(
        SETTING, splits, "plain", 0, tmp_path, cpu
    )  # from its checkpoint
    for arm, found in rows.items():
        assert {(row["arm"], row["seed"]) for row in found} == {(arm, 0)}
        assert found[0]["bitops_g"] <= bitops_at(supernet.table, 3) / 1e9
    assert rows["plain"][1]["search_loss"] != rows["both"][1]["search_loss"]
    assert rows["plain"][1]["bitops_g"] == rows["both"][1]["bitops_g"]

    file = tmp_path / "plain-0.json"
    kept = json.loads(file.read_text())
    file.unlink()
    remembered(file, kept["about"], lambda: [{"top1": -1.0}])
    assert scheduler_ablation.run_arm(SETTING, splits, "plain", 0, tmp_path, cpu)[0]["top1"] == -1.0
