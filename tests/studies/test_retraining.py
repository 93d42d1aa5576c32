"""Networks trained alone have the bits of a policy, the passes of their way, and resume."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from mpqlib.network.bits import BitConfig
from mpqlib.network.cost import bitops_at
from mpqlib.report.claims import assess, stored
from mpqlib.search.assignment import front
from mpqlib.studies import retraining, scheduler_ablation
from mpqlib.studies.arms import Setting
from mpqlib.studies.retraining import Retraining, RetrainingSetting
from mpqlib.training.loop import TrainConfig

CPU = torch.device("cpu")
SUPERNET = dict(
    model="resnet8_cifar",
    dataset="digits",
    train_images=48,
    search_share=0.2,
    image_size=8,
    bits=[2, 3, 4],
    levels=[2.25, 2.5, 3],
    float_epochs=1,
    epochs=1,
    search_images=16,
    training={"batch_size": 16, "lr": 0.02, "random_paths": 2},
    recalibration_images=32,
)
PROFILE = dict(setting=SUPERNET, levels=[2.5, 3], long_levels=[3])
SETTING = RetrainingSetting(**PROFILE)


@pytest.fixture(scope="module")
def splits():
    return retraining.load_splits(SETTING.setting, "data", CPU)


@pytest.fixture(scope="module")
def study(splits, tmp_path_factory):
    """A study whose first seed is done."""
    found = Retraining.of(SETTING, splits, tmp_path_factory.mktemp("runs"), CPU)
    found.run(0)
    return found


def test_a_network_alone_has_exactly_the_bits_of_its_policy(study):
    network = study.study.train_float(0)
    supernet = study.study.build_supernet(network, "both")
    policy = study.policy("retrained", 2.5, 0)
    assert set(policy.values()) > {supernet.uniform(3)["conv1"]}  # bits differ between layers
    setting = SETTING.setting_alone("retrained", policy)
    alone = replace(study.study, setting=setting)
    built = alone.build_supernet(study.study.train_float(0), "retrained")
    only = {name: ((bits.weight,), (bits.act,)) for name, bits in policy.items()}
    assert built.candidates == only and built.searchable == []
    uniform = study.policy("uniform retrained", 2, 0)
    assert uniform == supernet.uniform(2)


def test_training_alone_changes_passes_and_the_coupling_of_bits_alone():
    config = SETTING.config(3)
    for way, epochs in {"retrained": 1, "uniform retrained": 1, "retrained as long": 3}.items():
        alone = SETTING.setting_alone(way, BitConfig.of({})).arm_config(way, 3)
        options = dict(random_paths=0, scheduler=False, idm=False, epochs=epochs)
        assert alone == replace(config, **options)


def test_options_of_the_arm_stay():
    options = {"supernet": {"weight_steps": "lsq"}, "training": {"clip_value": 2.0}, "bits": [2, 3]}
    setting = RetrainingSetting(**PROFILE | {"setting": SUPERNET | {"arms": {"both": options}}})
    alone = setting.setting_alone("retrained", BitConfig.of({"conv1": (8, 8)}))
    kept = alone.arms["retrained"]
    assert kept["supernet"]["weight_steps"] == "lsq" and kept["bits"] == [2, 3]
    assert kept["supernet"]["overrides"] == {"conv1": ((8,), (8,))}
    assert alone.arm_config("retrained", 0).clip_value == 2.0


@pytest.mark.parametrize(
    ("levels", "bits", "expected"), [([2.5, 3], [2, 3, 4], [2, 3]), ([2.5, 2, 3.9], [2, 4], [2])]
)
def test_uniform_bits_are_the_next_at_or_below_a_level(levels, bits, expected):
    setting = SUPERNET | {"bits": bits, "levels": levels}
    assert RetrainingSetting(setting, levels, []).uniform_bits == expected


def test_image_passes_are_counted():
    config = TrainConfig(epochs=5, batch_size=16, random_paths=3)
    assert retraining.image_passes(config, 50) == 5 * 3 * 16 * 4  # 3 whole batches, 4 passes
    assert retraining.image_passes(replace(config, random_paths=0), 50) == 5 * 3 * 16


def test_rows_name_passes_and_arms(study):
    rows = pd.DataFrame(study.run(0))
    trained = rows.dropna(subset="image_passes")
    found = {(row.arm, row.configuration): row.image_passes for row in trained.itertuples()}
    shared, alone = 3 * 16 * 3, 3 * 16
    assert found == {
        ("uniform", "2 bits"): shared,
        ("uniform", "3 bits"): shared,
        ("uniform", "4 bits"): shared,
        ("searched", "2.5 bits"): shared,
        ("searched", "3 bits"): shared,
        ("retrained", "2.5 bits"): alone,
        ("retrained", "3 bits"): alone,
        ("uniform retrained", "2 bits"): alone,
        ("uniform retrained", "3 bits"): alone,
        ("retrained as long", "3 bits"): shared,
    }
    assert trained["correct"].str.len().nunique() == 1 and (trained["seconds"] > 0).all()
    cost = rows.dropna(subset="bitops_g").set_index(["arm", "configuration"])["bitops_g"]
    assert cost["retrained", "2.5 bits"] == cost["searched", "2.5 bits"]
    assert cost["uniform retrained", "3 bits"] == cost["uniform", "3 bits"]


def test_search_passes_bound_the_passes_of_the_search(study):
    supernet, configs = study.sketch, []

    def error(config):
        configs.append(config)
        return 1 / sum(bits.weight + bits.act for bits in config.values())

    front(supernet, error, [bitops_at(supernet.table, level) for level in (2.25, 2.5, 3)])
    bound = retraining.search_passes(supernet, 16, 3)
    assert 0.8 * bound <= 16 * len(configs) <= bound


def test_a_stopped_run_resumes_with_the_same_rows(study):
    rows = study.run(0)
    (file,) = study.folder.glob("retrained 2_5*.json")
    file.unlink()  # killed before the row was stored: training is not repeated
    assert study.run(0) == rows
    for file in study.folder.glob("retrained 2_5*"):  # killed before the first checkpoint
        file.unlink()
    assert without_seconds(study.run(0)) == without_seconds(rows)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_stored_supernets_are_used(study, splits, tmp_path, monkeypatch):
    (tmp_path / "runs").symlink_to(study.folder)
    other = Retraining.of(replace(SETTING, supernets=tmp_path), splits, tmp_path / "own", CPU)
    monkeypatch.setattr(scheduler_ablation.Study, "train_arm", lambda *_: pytest.fail("trained"))
    assert other.run_supernet(0) == study.run_supernet(0)
    fresh = replace(other, study=replace(other.study, folder=tmp_path / "empty"))
    with pytest.raises(pytest.fail.Exception, match="trained"):
        fresh.run_supernet(0)


METRICS = pd.DataFrame(
    [
        ("searched", 0, "2.5 bits", 2.0, 80.0, 400, 7200, 20),
        ("searched", 0, "3 bits", 3.0, 82.0, 400, 7200, 20),
        ("uniform", 0, "3 bits", 3.1, 81.0, 400, 7200, None),
        ("retrained", 0, "2.5 bits", 2.0, 81.0, 100, 1700, None),
        ("retrained", 0, "3 bits", 3.0, 82.5, 100, 1900, None),
        ("retrained as long", 0, "3 bits", 3.0, 84.0, 400, 7200, None),
        ("uniform retrained", 0, "3 bits", 3.1, 81.5, 100, 1800, None),
        ("float", 0, None, None, 90.0, None, None, None),
    ],
    columns=[
        *("arm", "seed", "configuration", "bitops_g", "top1"),
        *("image_passes", "seconds", "search_passes"),
    ],
)


def test_costs_are_those_of_a_hand_computed_table():
    found = retraining.costs(METRICS)
    passes = found[["passes for 1", "passes for 3", "passes for 12"]]
    assert passes.loc["searched"].tolist() == [420, 420, 420]
    assert passes.loc["retrained"].tolist() == [100, 300, 1200]
    assert passes.loc["retrained as long"].tolist() == [400, 1200, 4800]
    hours = found[["hours for 1", "hours for 12"]]
    assert hours.loc["searched"].tolist() == pytest.approx([2.1, 2.1])  # 7200 s for 400 passes
    assert hours.loc["retrained"].tolist() == pytest.approx([0.5, 6])
    # 420 passes are fewer than 5 x 100 and 2 x 400, but more than 4 x 100 and 400
    wins = found["sharing wins from"]
    assert wins["retrained"] == 5 and wins["retrained as long"] == 2


def test_equal_passes_do_not_win():
    even = METRICS.assign(search_passes=0)
    assert retraining.costs(even)["sharing wins from"]["retrained"] == 5  # above 4


def test_figure_and_finding_need_no_second_way():
    few = METRICS[METRICS["arm"] != "retrained as long"]
    (axis,) = retraining.top1_over_bitops(few).axes
    assert "BitOPs (G per image" in axis.get_xlabel() and "(%)" in axis.get_ylabel()
    text = retraining.finding(few).data
    assert "retrained minus searched: 2.5 bits \u2248 +1" in text
    assert "as long minus searched: not trained" in text


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(arm="none"), ValueError, r"arm=\['none'\] is not allowed: some of \['plain'"),
        (dict(levels=[2.5, 4]), ValueError, r"levels=\[2.5, 4\] is not allowed: some of"),
        (dict(long_levels=[2.25]), ValueError, r"long_levels=\[2.25\] is not allowed: some of"),
        (dict(supernets=""), ValueError, "supernets='' is not allowed: a path; or None"),
        (dict(setting=3), ValueError, "setting=3 is not allowed: a Setting, or a dict"),
        (dict(setting=SUPERNET | {"epochs": -1}), ValueError, "epochs=-1 is not allowed"),
        (dict(setting=SUPERNET | {"epoch": 1}), TypeError, "epoch"),
    ],
)
def test_settings_are_checked_early(changed, error, message):
    with pytest.raises(error, match=message):
        RetrainingSetting(**PROFILE | changed)


def command_line(folder, *arguments, **changed):
    profile = dict(setting=SUPERNET, levels=[3], long_levels=[], seeds=[0], data_root="data")
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile | changed))
    own = [str(folder / "profile.yaml"), "--output", str(folder / "out"), "--device", "cpu"]
    return own + list(arguments)


def test_command_stores_a_run_that_the_title_claim_can_judge(tmp_path, capsys):
    retraining.main(command_line(tmp_path))
    out = tmp_path / "out"
    metrics, (claim,) = stored("out", "", tmp_path)
    found = assess(metrics, claim)
    assert (found.n, found.status) == (1, "not tested")
    assert set(metrics["arm"]) == {"searched", "uniform", "retrained", "uniform retrained", "float"}
    assert json.loads((out / "policies.json").read_text())[0]["policy"]
    parameters = yaml.safe_load((out / "parameters.yaml").read_text())
    assert parameters["setting"]["model"] == "resnet8_cifar" and parameters["seeds"] == [0]
    assert (out / "top1.png").exists() and "retrained 3 bits" in capsys.readouterr().out
    retraining.main(command_line(tmp_path))  # nothing is left to do
    pd.testing.assert_frame_equal(pd.read_csv(out / "metrics.csv"), metrics)


def test_command_without_enough_time_says_so(tmp_path, capsys):
    retraining.main(command_line(tmp_path, "--minutes", "1e-9"))
    assert "No seed is whole yet" in capsys.readouterr().out
    assert not (tmp_path / "out" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("changed", "arguments"), [({}, ["--processes", "2"]), ({"most_epochs": 3}, [])]
)
def test_command_refuses_what_it_does_not_use(changed, arguments, tmp_path):
    with pytest.raises(ValueError, match="--processes and most_epochs are not allowed here"):
        retraining.main(command_line(tmp_path, *arguments, **changed))


def test_profile_has_the_supernets_of_the_ablation():
    folder = Path(__file__).parents[2] / "notebooks" / "profiles"
    own, other = (
        yaml.safe_load((folder / f"{name}_resnet20.yaml").read_text())
        for name in ("13_retraining", "05_scheduler_ablation")
    )
    assert own["seeds"] == other.pop("seeds") and own["supernets"] == other.pop("output_dir")
    assert Setting(**own["setting"]) == Setting(**other)
