"""One bit-width against mixed ones: equal sizes, fair choices, and a study that resumes."""

import json
import random
from dataclasses import replace
from math import inf

import pandas as pd
import pytest
import torch
import yaml
from stand import OFFERS, Stand, made_up_error

from mpqlib.network.cost import model_size
from mpqlib.search.moves import Step
from mpqlib.studies import command, one_bitwidth
from mpqlib.studies.command import Command, load_splits
from mpqlib.studies.one_bitwidth import (
    FEWEST,
    MIXED,
    SEARCHED,
    SHARED,
    SizeSetting,
    SizeStudy,
    choose_arms,
    find_policies,
    places,
    work_on_sizes,
)
from mpqlib.studies.parameters import check_parameters
from mpqlib.studies.processes import Deadline, OutOfTime, Team

PROFILE = dict(
    families={"resnet8_cifar": [24]},
    dataset="digits",
    train_images=40,
    search_share=0.1,
    image_size=8,
    single=[1],
    candidates=[2, 8],
    float_epochs=1,
    epochs=1,
    search_images=16,
    training={"batch_size": 20},
    recalibration_images=40,
    test_images=50,
)
SETTING = SizeSetting(**PROFILE)


@pytest.fixture(scope="module")
def splits():
    return load_splits(SETTING, "data", "cpu")


@pytest.fixture(scope="module")
def study(splits, tmp_path_factory):
    """A finished study of one seed."""
    study = SizeStudy(SETTING, splits, tmp_path_factory.mktemp("whole"), torch.device("cpu"))
    study.rows(0)
    return study


def test_trained_networks_have_the_size(study):
    sizes = {"resnet8_cifar": [24], "mobilenetv2_small_cifar": [20]}
    setting = replace(SETTING, families=sizes, single=[1, 1.6, 8], float_epochs=0)
    other = replace(study, setting=setting, folder=study.folder / "others")
    places = [("resnet8_cifar", 24, "1 bit"), ("mobilenetv2_small_cifar", 20, "ternary")]
    for family, size, arm in [*places, ("mobilenetv2_small_cifar", 20, "8 bits")]:
        row = other.run(family, size, arm, 0)
        assert row["size_mb"] == pytest.approx(size / 1000, rel=0.01)
        assert (row["family"], row["size_kb"], row["arm"]) == (family, size, arm)


def test_an_interrupted_study_resumes_to_the_same_rows(study, tmp_path):
    checks = iter(range(9))  # until the second network

    class Late(Deadline):
        def check(self, needed=0):
            if next(checks, None) is None:
                raise OutOfTime

    parts = replace(study, folder=tmp_path, deadline=Late())
    with pytest.raises(OutOfTime):
        parts.rows(0)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    expected = study.rows(0)
    assert 0 < len(kept) < len(list(study.folder.glob("*.json")))
    assert replace(parts, deadline=Deadline(inf)).rows(0) == expected
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert [row["arm"] for row in expected] == ["1 bit", *MIXED, SHARED]


def test_command_plans_and_writes_the_chosen_arms(tmp_path, capfd, monkeypatch):
    for module in (command, one_bitwidth):
        monkeypatch.setattr(module, "TIMED_STEPS", 1)
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE | {"seeds": [3]}))
    own = [str(tmp_path / "profile.yaml"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    given = Command.parse(SizeSetting, "", [*own, "--minutes", "9"])
    work_on_sizes(0, Team(1), replace(given, most_epochs=1))
    assert "1 of 1 seeds are whole" in capfd.readouterr().out
    metrics = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert list(metrics["arm"]) == ["1 bit", *MIXED, SHARED, "one", "mixed"]
    assert set(metrics["seed"]) == {3} and metrics["of"].iloc[-2] == "1 bit"
    (claim,) = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert (claim["arm"], claim["base"], claim["unit"]) == ("one", "mixed", "seed")


@pytest.mark.parametrize("seed", range(20))
def test_policies_against_a_naive_reference(seed):
    rng = random.Random(seed)
    offered = [rng.choice(OFFERS) for _ in range(3)]
    stand = Stand([rng.randint(1, 50) for _ in offered], offered)
    configs = stand.every()
    configs = rng.sample(configs, min(12, len(configs)))
    error = made_up_error(seed)
    path = [Step(c, error(c) if rng.random() < 0.7 else 0.5, 0) for c in configs]
    sizes = [max(model_size(stand.table, c) for c in configs[:k]) / 1000 for k in (1, 4)]

    expected = {}
    for size in sizes:
        for step in reversed(path):
            if model_size(stand.table, step.config) <= 1000 * size:
                expected[f"{SEARCHED} {size}"] = step.config
    fewest = None
    for step in path:
        if step.error <= path[0].error:
            bytes_now = model_size(stand.table, step.config)
            if fewest is None or bytes_now < fewest[0]:
                fewest = bytes_now, step.config
    assert find_policies(path, stand.table, sizes) == expected | {FEWEST: fewest[1]}


def test_a_size_below_all_policies_is_refused():
    stand = Stand([8], [((2, 4), (8,))])
    path = [Step(config, 1.0, 0) for config in stand.every()]
    with pytest.raises(ValueError, match=r"size=0.001 kB is not allowed: the fewest bits need 0.0"):
        find_policies(path, stand.table, [0.001])


def made_up_rows(seed):
    """Rows of two families, two sizes, five arms and three seeds."""
    rng = random.Random(seed)
    setting = replace(SETTING, families={"resnet8_cifar": [1, 2], "resnet20_cifar": [3]})
    setting = replace(setting, single=[1, 2, 8])
    rows = [(*p, s, rng.randint(0, 99), rng.random()) for p in places(setting) for s in "abc"]
    return pd.DataFrame(rows, columns=["family", "size_kb", "arm", "seed", "search_top1", "top1"])


@pytest.mark.parametrize("seed", range(5))
def test_arms_are_chosen_on_the_search_split_alone(seed):
    rows = made_up_rows(seed)
    expected = {}
    for family, size in (("resnet8_cifar", 1), ("resnet8_cifar", 2), ("resnet20_cifar", 3)):
        for kind, arms in (("one", ["1 bit", "2 bits", "8 bits"]), ("mixed", MIXED)):
            sums = dict.fromkeys(arms, 0)
            for row in rows.itertuples():
                if (row.family, row.size_kb) == (family, size) and row.arm in sums:
                    sums[row.arm] += row.search_top1
            expected[family, size, kind] = max(sums, key=sums.get)
    shared = rows[rows["arm"] == SEARCHED].assign(arm=SHARED, search_top1=100.0)
    found = choose_arms(pd.concat([rows, shared]))
    chosen = found.groupby(["family", "size_kb", "arm"])["of"].unique()
    assert {place: arms.item() for place, arms in chosen.items()} == expected
    assert len(found) == 3 * len(expected)  # all seeds
    merged = found.merge(rows, left_on=["family", "size_kb", "of", "seed"], right_on=list(rows)[:4])
    assert (merged["top1_x"] == merged["top1_y"]).all() and len(merged) == len(found)
    other = choose_arms(rows.assign(top1=-rows["top1"]))
    assert list(other["of"]) == list(found["of"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(families={}), "families={} is not allowed: a dict"),
        (dict(families={"resnet18": [24]}), "families=.*'resnet18' is not allowed: one of"),
        (dict(families={"resnet8_cifar": []}), r"families\['resnet8_cifar'\]=\[\] is not allowed"),
        (dict(families={"resnet8_cifar": [0]}), r"families\['resnet8_cifar'\]=\[0\] is not"),
        (dict(families={"resnet8_cifar": [inf]}), r"\[inf\] is not allowed: a list of sizes in kB"),
        (dict(families={"resnet8_cifar": [24, 24.0]}), "none may stand twice"),
        (dict(families={"resnet8_cifar": [True]}), r"\[True\] is not allowed: a list of sizes"),
        (dict(training=None), "training=None is not allowed: a dict of options"),
        (dict(single=[]), r"single=\[\] is not allowed"),
        (dict(single=[1.5]), r"single=\[1.5\] is not allowed"),
        (dict(single=[2, 2]), r"single=\[2, 2\] is not allowed: no bits may stand twice"),
        (dict(candidates=[1, 2]), r"candidates=\[1, 2\] is not allowed"),
        (dict(act_bits=1), r"act_bits=\[1\] is not allowed"),
        (dict(edge_bits=99), r"edge_bits=\[99\] is not allowed"),
        (dict(epochs=-1), "epochs=-1 is not allowed: a whole number from 0"),
        (dict(float_epochs=True), "float_epochs=True is not allowed"),
        (dict(search_images=0), "search_images=0 is not allowed: a whole number from 1"),
        (dict(test_images=0), "test_images=0 is not allowed: a whole number from 1"),
        (dict(recalibration_images=1), "recalibration_images=1 is not allowed: .* from 2"),
        (dict(training={"lr": -1}), "lr=-1 is not allowed"),
        (
            dict(training={"epochs": 3}),
            r"training: \['epochs'\] are not allowed here: options are",
        ),
        (dict(float_training={"seed": 3}), r"float_training: \['seed'\] are not allowed here"),
        (dict(training={"rate": 3}), r"training: \['rate'\] are not allowed here"),
        (dict(training={3: 3}), "training={3: 3} is not allowed: a dict of options"),
        (dict(families={"resnet8_cifar": [10**400]}), "00] is not allowed: a list of sizes in kB"),
        (dict(single=[1.0]), r"single=\[1.0\] is not allowed"),
        (dict(single=[2, 1.0]), r"single=\[1.0\] is not allowed"),
    ],
)
def test_settings_are_checked_early(changed, message):
    with pytest.raises(ValueError, match=message):
        SizeSetting(**PROFILE | changed)


def test_test_images_are_of_all_classes_wherever_they_stand(study, monkeypatch):
    test = study.splits.test
    order = test.labels.argsort(stable=True)  # as in the folders of classes
    test = replace(test, images=test.images[order], labels=test.labels[order])
    splits = replace(study.splits, test=test)
    monkeypatch.setattr(one_bitwidth, "measure", lambda supernet, config, splits, **_: splits.test)
    chosen = replace(study, splits=splits).measure(None, None)
    assert len(chosen) == 50
    assert len({label for _, label in chosen}) == 10


@pytest.mark.parametrize("seeds", [0, [], "01", [0.0], ["0"], [-1], [True], [None], [2**63]])
def test_seeds_that_are_no_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match=r"seeds=.* not allowed: a list .* a whole number from 0"):
        check_parameters(seeds=seeds)
    check_parameters(seeds=[0, 2**63 - 1])


@pytest.mark.parametrize("name", [None, ["digits"], {}])
def test_a_data_set_without_a_name_is_refused(name):
    with pytest.raises(ValueError, match="is not a data set: one of"):
        load_splits(replace(SETTING, dataset=name), "data", "cpu")
