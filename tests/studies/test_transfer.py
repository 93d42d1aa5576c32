"""Transfer of a supernet: equal passes, search without test images, and resuming."""

import ast
import inspect
import json
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from mpqlib import data
from mpqlib.models import create
from mpqlib.network.bits import BitConfig
from mpqlib.network.cost import bitops, bitops_at
from mpqlib.report import claims
from mpqlib.studies import transfer as study

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PROFILES = sorted((NOTEBOOKS / "profiles").glob("08_transfer_*.yaml"))
DATA = dict(image_size=8, train_images=120)
RECIPE = dict(
    model="resnet8_cifar",
    source={"dataset": "digits", "classes": ["0", "1", "2"]},
    target={"dataset": "digits", "classes": ["7", "8"]},
    image_size=8,
    bits=[2, 4, 6],
    level=4,
    float_epochs=1,
    epochs=1,
    target_epochs=2,
    first_epochs=1,
    search_images=16,
    training={"batch_size": 16, "lr": 0.01},
    recalibration_images=16,
)


def load(classes):
    return study.load_classes("digits", classes, **DATA)


@pytest.fixture(scope="module")
def source():
    return load(["0", "1", "2"])


@pytest.fixture(scope="module")
def target():
    return load(["7", "8"])


@pytest.fixture(scope="module")
def transfer(source, target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return study.Transfer(study.Recipe(**RECIPE), source, target, folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def rows(transfer):
    found = [row for network in study.FINE_TUNED for row in transfer.run(network, 0)]
    return pd.DataFrame(found).set_index("arm")


def test_all_networks_have_the_same_number_of_image_passes(rows, target):
    images = len(target.train) // 16 * 16
    # Two epochs with four passes; eight epochs with one; four with one, then one with four.
    assert set(rows["passes"]) == {2 * 4 * images}
    assert list(rows.index) == ["float", "searched", "uniform", "source policy", "new supernet"]


def test_policies_keep_the_budget_and_are_measured_on_all_test_images(rows, transfer, target):
    supernet = transfer.build_supernet(transfer.start_float(0), target)
    budget = bitops_at(supernet.table, 4)
    for arm, text in rows["bits"].dropna().items():
        config = BitConfig.from_json(text)
        assert bitops(supernet.table, config) <= budget, arm
        supernet.check(config)
    assert BitConfig.from_json(rows.loc["uniform", "bits"]) == supernet.uniform(4)
    hits = rows["top1"] * len(target.test) / 100
    assert (hits - hits.round()).abs().max() < 1e-6


def test_the_policy_of_the_source_is_searched_in_the_supernet_of_the_source(rows, transfer):
    config = transfer.search(transfer.train_supernet(0), transfer.source)
    assert config.to_json() == rows.loc["source policy", "bits"]


def test_test_images_choose_nothing(rows, transfer, tmp_path):
    def other(splits):  # each test image has another class
        test = splits.test
        labels = (test.labels + 1) % len(splits.classes)
        return replace(splits, test=replace(test, labels=labels))

    source, target = other(transfer.source), other(transfer.target)
    changed = replace(transfer, source=source, target=target, folder=tmp_path)
    again = pd.DataFrame(changed.run("transferred", 0)).set_index("arm")
    assert again["bits"].to_dict() == rows.loc[again.index, "bits"].to_dict()
    assert again["search_loss"].to_dict() == rows.loc[again.index, "search_loss"].to_dict()
    assert (again["top1"] + rows.loc[again.index, "top1"]).tolist() == pytest.approx([100] * 3)


def test_transfer_starts_from_the_supernet_of_the_source(transfer, monkeypatch):
    started = {}

    def keep(network, splits, config, **how):
        started[how["label"]] = {n: t.clone() for n, t in network.state_dict().items()}
        return train(network, splits, config, **how)

    train = study.train
    monkeypatch.setattr(study, "train", keep)
    transfer.fine_tune_supernet(0)
    trained = transfer.train_supernet(0).state_dict()
    for name, tensor in started["transferred-0"].items():
        if not name.startswith("model.fc."):
            assert torch.equal(tensor, trained[name]), name
    # All networks of a seed start from the same last layer.
    fresh = transfer.start_float(0)
    assert torch.equal(started["transferred-0"]["model.fc.op.weight"], fresh.fc.weight)
    assert not torch.equal(fresh.fc.weight, transfer.start_float(1).fc.weight)


def test_stored_rows_are_not_made_again(rows, transfer, monkeypatch):
    monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("trained again"))
    again = [row for network in study.FINE_TUNED for row in transfer.run(network, 0)]
    assert json.dumps(again) == json.dumps(
        [row for network in study.FINE_TUNED for row in transfer.run(network, 0)]
    )
    assert [row["top1"] for row in again] == rows["top1"].tolist()
    other = replace(transfer, recipe=study.Recipe(**RECIPE | dict(search_images=8)))
    with pytest.raises(ValueError, match="search_images: 16 there, 8 now"):
        other.run("float", 0)


def test_the_claim_of_the_paper_can_be_judged_by_the_rows(rows):
    claim = next(claim for claim in claims.PAPER if claim.notebook == "08_transfer")
    several = [rows.assign(seed=seed, top1=rows["top1"] + seed) for seed in range(5)]
    metrics = pd.concat(several).reset_index()
    found = claims.assess(metrics, claim)
    assert found.n == 5 and found.difference == pytest.approx(
        rows.loc["searched", "top1"] - rows.loc["float", "top1"]
    )
    text = study.transfer_table(metrics).data
    assert text.count("\n") == 1 + len(rows) and all(arm in text for arm in rows.index)
    one = study.transfer_table(metrics[metrics["seed"] == 0]).data
    assert "[" not in one


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(level=5), r"level=5 .* one of bits=\[2, 4, 6\]"),
        (dict(first_epochs=2), "first_epochs=2 .* less than target_epochs=2"),
        (dict(first_epochs=0), "first_epochs=0"),
        (dict(search_images=1), "search_images=1"),
        (dict(recalibration_images=0), "recalibration_images=0"),
        (dict(epochs=-1), "epochs=-1"),
        (dict(fine_tuning={"lr": -1}), "lr=-1"),
        (dict(bits=[4, 99]), "bits"),
    ],
)
def test_recipes_that_are_not_allowed_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        study.Recipe(**RECIPE | wrong)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"training: \['learning_rate'\] are not allowed here"):
        study.Recipe(**RECIPE | dict(training={"learning_rate": 1}))
    with pytest.raises(TypeError, match="colour"):
        study.load_classes("digits", ["0", "1"], colour=True)


def test_all_classes_are_the_default(target):
    everything = study.load_classes("digits", **DATA)
    assert everything.classes == tuple("0123456789") and target.classes == ("7", "8")


def notebook_parameters():
    """The names and defaults of the notebook's parameters."""
    cells = json.loads((NOTEBOOKS / "08_transfer.ipynb").read_text())["cells"]
    (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    body = ast.parse("".join(cell["source"])).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in body}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_name_parameters_data_sets_and_models_that_exist(path):
    defaults, profile = notebook_parameters(), yaml.safe_load(path.read_text())
    assert set(profile) <= set(defaults)  # papermill only warns of the others
    parameters = defaults | profile
    names = {setting.name for setting in fields(study.Recipe)}
    study.Recipe(**{name: value for name, value in parameters.items() if name in names})
    known = {**inspect.signature(data.load).parameters, **dict.fromkeys(["dataset", "classes"])}
    for part in (parameters["source"], parameters["target"]):
        assert part["dataset"] in data.DATASETS and set(part) <= set(known)
        assert part["dataset"] != "npz" or set(part["classes"]) < set(data.CIFAR10)
    create(parameters["model"], 2)
