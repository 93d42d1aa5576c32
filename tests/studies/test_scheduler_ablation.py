"""The arms of an ablation share all but their own options, and the command resumes."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from math import inf

import pandas as pd
import pytest
import torch
import yaml

from mpqlib.files import remembered
from mpqlib.network.cost import bitops_at
from mpqlib.studies import scheduler_ablation
from mpqlib.studies.arms import ARMS, Setting
from mpqlib.studies.command import Command
from mpqlib.studies.processes import Deadline, OutOfTime, Team

PROFILE = dict(
    model="test_byobnet",
    dataset="digits",
    train_images=64,
    search_share=0.2,
    image_size=16,
    bits=[2, 4],
    levels=[3],
    float_epochs=1,
    epochs=2,
    search_images=16,
    training={"batch_size": 32, "lr": 0.02, "step_travel": 0.02},
    primary=[2, 4],
    recalibration_images=64,
)
SETTING = Setting(**PROFILE)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits():
    return scheduler_ablation.load_splits(SETTING, "data", CPU)


def test_default_arms_are_those_of_the_paper():
    configs = {arm: SETTING.arm_config(arm, seed=3) for arm in SETTING.arms}
    switches = {arm: (config.scheduler, config.idm) for arm, config in configs.items()}
    assert switches == {
        "plain": (False, False),
        "scheduler": (True, False),
        "IDM": (False, True),
        "both": (True, True),
    }
    for config in configs.values():
        assert replace(config, scheduler=True, idm=True) == configs["both"]
        assert (config.epochs, config.seed, config.batch_size, config.lr) == (2, 3, 32, 0.02)


def test_arms_switch_any_rule(splits, tmp_path):
    arms = {
        "lsq steps": {"supernet": {"weight_steps": "lsq"}},
        "little travel": {"training": {"step_travel": 0.001}},
        "no grid term": {"training": {"grid_weight": 0}},
    }
    setting = replace(SETTING, arms=arms, float_training={"lr": 0.1})
    assert setting.arm_config("little travel", 0).step_travel == 0.001
    assert setting.arm_config("no grid term", 0).grid_weight == 0
    assert setting.float_config(0).lr == 0.1 and setting.arm_config("lsq steps", 0).lr == 0.02
    study = scheduler_ablation.Study(setting, splits, tmp_path, CPU)
    steps = {}
    for arm in ("lsq steps", "no grid term"):
        network = scheduler_ablation.create("test_byobnet", 10)
        torch.manual_seed(0)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
        layer = study.build_supernet(network.eval(), arm).layers
        name = list(layer)[1]
        steps[arm] = layer[name].weight_quantizer.step(4)
    assert steps["lsq steps"] != steps["no grid term"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(epochs=-1), ValueError, "epochs=-1 is not allowed: a whole number from 0"),
        (dict(search_share=1), ValueError, "search_share=1 is not allowed: .*between 0 and 1"),
        (dict(bits="234"), ValueError, "bits='234'"),
        (dict(levels=[]), ValueError, r"levels=\[\] is not allowed: a list of 1 or more"),
        (dict(levels=[1.5]), ValueError, r"levels=\[1\.5\] is not allowed: each at least 2"),
        (dict(levels=[3, 3]), ValueError, r"levels=\[3, 3\] is not allowed: .*none twice"),
        (dict(bits=[2, 2]), ValueError, r"bits=\[2, 2\] is not allowed"),
        (dict(model="no such"), ValueError, "model='no such' is not allowed"),
        (dict(dataset="mnist"), ValueError, "dataset='mnist' is not allowed: one of .*'digits'"),
        (dict(uniform=[2, 3]), ValueError, r"uniform=\[2, 3\] is not allowed: some of \[2, 4\]"),
        (dict(uniform=[2], primary=[4]), ValueError, r"primary=\[4\] is not allowed: .* \[2\]"),
        (dict(watched=[3]), ValueError, r"watched=\[3\] is not allowed: some of \[2, 4\]"),
        (dict(float_weights=""), ValueError, "float_weights='' is not allowed: a path; or None"),
        (dict(float_seed=-1), ValueError, "float_seed=-1 is not allowed: a whole number from 0"),
        (dict(arms={"x": {"bits": [3]}}), ValueError, r"arm 'x': bits=\[3\] is not allowed"),
        (dict(training=[]), ValueError, r"training=\[\] is not allowed: a dict"),
        (dict(training={"speed": 1}), ValueError, "training: .*speed"),
        (dict(training={"lr": -1}), ValueError, "lr=-1 is not allowed"),
        (dict(float_training={"epochs": 1}), ValueError, r"float_training: \['epochs'\] are not"),
        (dict(arms={}), ValueError, "arms={} is not allowed"),
        (dict(arms={"a/b": {}}), ValueError, "arm 'a/b' is not allowed: letters"),
        (dict(arms={"x": {"train": {}}}), ValueError, "arm 'x': .*training.*supernet"),
        (dict(arms={"x": {"training": {"seed": 1}}}), ValueError, r"arm 'x': \['seed'\] are not"),
        (dict(arms={"x": {"training": {"idn": 1}}}), ValueError, "arm 'x': .*idn"),
        (dict(arms={"x": {"training": {"idm": 1}}}), ValueError, "arm 'x': idm=1 is not allowed"),
        (dict(arms={"x": {"supernet": {"step": 1}}}), TypeError, r"arm 'x': unknown .*\['step'\]"),
        (
            dict(arms={"x": {"supernet": {"weight_steps": "no"}}}),
            ValueError,
            "arm 'x': weight_steps='no' is not allowed",
        ),
    ],
)
def test_settings_are_checked_early(changed, error, message):
    with pytest.raises(error, match=message):
        Setting(**PROFILE | changed)


def test_unknown_arm_is_refused(splits, tmp_path):
    with pytest.raises(ValueError, match="arm='neither' is not allowed: one of"):
        scheduler_ablation.Study(SETTING, splits, tmp_path, CPU).train_arm("neither", 0)


def test_arms_are_studied_once_and_keep_their_budget(splits, tmp_path):
    study, rows = scheduler_ablation.Study(SETTING, splits, tmp_path, CPU), {}
    for arm in ("plain", "both"):
        rows[arm] = study.run_arm(arm, 0)
    names = [row["configuration"] for row in rows["plain"]]
    assert names == [row["configuration"] for row in rows["both"]]
    assert names == ["uniform 2", "uniform 4", "mean of uniform 2, 4", "searched 3"]
    supernet = study.train_arm("plain", 0)  # from its checkpoint
    for arm, (two, four, mean, searched) in rows.items():
        assert {(row["arm"], row["seed"]) for row in rows[arm]} == {(arm, 0)}
        assert mean["top1"] == pytest.approx((two["top1"] + four["top1"]) / 2)
        assert searched["bitops_g"] <= bitops_at(supernet.table, 3) / 1e9
    assert rows["plain"][1]["search_loss"] != rows["both"][1]["search_loss"]
    assert rows["plain"][1]["bitops_g"] == rows["both"][1]["bitops_g"]

    file = study.rows_file("policies", "plain", 0)
    kept = json.loads(file.read_text())
    file.unlink()
    remembered(file, kept["about"], lambda: [{"top1": -1.0}])
    assert study.run("policies", "plain", 0)[0]["top1"] == -1.0


def test_training_that_runs_out_of_time_resumes(splits, tmp_path):
    whole = scheduler_ablation.Study(SETTING, splits, tmp_path / "whole", CPU)
    parts = replace(whole, folder=tmp_path / "parts")
    expected = whole.run_arm("both", 1)

    class Late(Deadline):
        """A deadline that lets each training start, and stops it within the first epoch it can."""

        def check(self, needed=0):
            pass

    late = replace(parts, deadline=Late(-inf))
    for name in ("float-1", "both-1", "both-1"):  # at steps 1 of 2, 1 of 4 and 3 of 4
        with pytest.raises(OutOfTime):
            late.train_arm("both", 1)
        assert (parts.folder / f"{name}.pt").exists()
    assert parts.run_arm("both", 1) == expected
    with pytest.raises(OutOfTime):
        replace(parts, folder=tmp_path / "new", deadline=Deadline(-inf)).train_arm("both", 1)
    assert not (tmp_path / "new").exists()


def test_plan_fills_the_time_and_keeps_the_least_epochs():
    seconds = {"float_step": 0.1, "step": 1.0, "uniform": 20.0, "policies": 30.0}
    how = dict(seeds=5, processes=2)
    setting = replace(SETTING, arms=ARMS, float_epochs=4, epochs=3)
    # 3 rounds of floats at 4 s, then 10 rounds of arms: 50 s to measure, 10 s an epoch
    needed = (3 * 4 + 10 * (50 + 3 * 10)) / 0.9
    epochs, found = scheduler_ablation.plan_epochs(setting, 10, seconds, left=2000, **how)
    assert epochs == (0.9 * 2000 - 12 - 500) // 100 and found == pytest.approx(needed)
    epochs, found = scheduler_ablation.plan_epochs(setting, 10, seconds, left=500, **how)
    assert epochs == 3 and found == pytest.approx(needed) and found > 500


def command_line(folder, *arguments, **changed):
    """Writes a profile of two arms; returns the arguments of the command."""
    arms = {"plain": ARMS["plain"], "scaled": {"supernet": {"scale_step_gradient": True}}}
    profile = PROFILE | dict(seeds=[0], arms=arms, train_images=40, epochs=1, data_root="data")
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile | changed))
    own = [str(folder / "profile.yaml"), "--output", str(folder / "out"), "--device", "cpu"]
    return own + list(arguments)


def test_command_stores_whole_seeds_and_resumes(tmp_path, capfd):
    with_plan = command_line(tmp_path, "--minutes", "5", most_epochs=2)
    # In this process, because a new one takes seconds to start
    scheduler_ablation.work(0, Team(1), Command.parse(Setting, "", with_plan))
    out = tmp_path / "out"
    metrics = pd.read_csv(out / "metrics.csv")
    assert list(metrics["arm"].unique()) == ["plain", "scaled"]
    assert (metrics["configuration"] == "mean of uniform 2, 4").sum() == 2
    parameters = yaml.safe_load((out / "parameters.yaml").read_text())
    assert parameters["epochs"] == 2 and parameters["seeds"] == [0]
    training = json.loads((out / "training.json").read_text())
    assert len(training["supernet"]) == 2 and training["supernet"][0]["steps_moved"] > 0
    assert "4 of 4 runs are done" in capfd.readouterr().out

    # As if killed in the last arm; without a limit of time the planned epochs stay
    for file in (out / "runs").glob("scaled*"):
        file.unlink()
    (out / "metrics.csv").unlink()
    scheduler_ablation.main(command_line(tmp_path, "--processes", "2"))
    pd.testing.assert_frame_equal(pd.read_csv(out / "metrics.csv"), metrics)
    assert "4 of 4 runs are done" in capfd.readouterr().out


def test_command_without_enough_time_says_so(tmp_path, capfd):
    command = Command.parse(
        Setting, "", command_line(tmp_path, "--minutes", "5", epochs=1000, most_epochs=1)
    )
    late = replace(command, deadline=Deadline(time.time() + 1))
    scheduler_ablation.work(0, Team(1), late)
    printed = capfd.readouterr().out
    assert "The time does not suffice for 1000 epochs: about" in printed
    assert "time is used up" in printed and "No seed is whole yet" in printed
    assert not (tmp_path / "out" / "metrics.csv").exists()


def test_command_needs_no_notebook_packages():
    missing = ["IPython", "papermill", "jupyter", "jupyter_core", "nbformat", "ipywidgets"]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    code += "import mpqlib.studies.scheduler_ablation"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({"freezing": {}}, [], "freezing"),
        ({"seeds": 3}, [], "seeds=3 is not allowed: a list of 1 or more"),
        ({"seeds": [0, 1, 0]}, [], "none twice"),
        ({"seeds": []}, [], r"seeds=\[\] is not allowed: a list of 1 or more"),
        ({"seeds": ["a"]}, [], r"seeds=\['a'\] is not allowed: a list of 1 or more"),
        ({}, ["--device", "abacus"], "device='abacus' is not available"),
    ],
)
def test_command_refuses_what_it_does_not_know(changed, arguments, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        Command.parse(Setting, "", command_line(tmp_path, *arguments, **changed))


def test_command_needs_a_folder_to_write_to(tmp_path, capsys):
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE | {"seeds": [0]}))
    with pytest.raises(SystemExit):
        Command.parse(Setting, "", [str(tmp_path / "profile.yaml")])
    assert "--output is missing" in capsys.readouterr().err
