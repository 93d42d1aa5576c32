"""The comparison of adapters: its trials, its rows and its pictures."""

import copy
import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import TinyNet, images
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from mpqlib import models
from mpqlib.network.bits import Candidates
from mpqlib.network.supernet import Supernet
from mpqlib.report import claims
from mpqlib.report.paper import Claim
from mpqlib.search.assignment import assignment
from mpqlib.search.error import batch_error
from mpqlib.studies import cora as study
from mpqlib.studies import imagenet
from mpqlib.training.loop import TrainConfig

PROFILE = dict(
    model="test_resnet",
    dataset="digits",
    image_size=32,
    train_images=512,
    calibration_images=256,
    training={"epochs": 6},
    bits=[4, 3],
    budget=0.05,
    recovery={"granularity": ["tensor", "channel"], "recalibrate": [False, True]},
    options={"granularity": "channel", "recalibrate": True},
    search={"iterations": 20, "batch_size": 64},
    equal_bits={"depth-wise": 5.5, "mixed": 4},
    candidates=[2, 3, 4, 5, 6],
    policy_images=64,
    seeds=[0],
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(calibration_images="256"), "calibration_images='256' is not allowed: a whole number"),
        (dict(calibration_images=0), "calibration_images=0 is not allowed"),
        (dict(policy_images=None), "policy_images=None is not allowed"),
        (dict(policy_images=True), "policy_images=True is not allowed"),
        (dict(training="long"), "training='long' is not allowed: a dict of options"),
        (dict(training={"seed": 3}), r"training: \['seed'\] are not allowed here"),
        (dict(training={"epoch": 3}), r"training: \['epoch'\] are not allowed here"),
        (dict(training={"lr": "fast"}), "lr='fast' is not allowed"),
        (dict(bits=4), "bits=4 is not allowed"),
        (dict(bits="4"), "bits='4' is a string"),
        (dict(bits=[4, 4]), r"bits=\[4, 4\] is not allowed: a list, none may stand twice"),
        (dict(bits=[1]), r"bits=\[1\] is not allowed"),
        (dict(bits={4: 3}), "bits={4: 3} is not allowed: a list"),
        (dict(candidates=[4.5]), r"candidates=\[4.5\] is not allowed"),
        (dict(candidates=None), "candidates=None is not allowed"),
        (dict(budget="5%"), "budget='5%' is not allowed: a number from 0 to 1"),
        (dict(budget=5), "budget=5 is not allowed: .* 0.05 means 5%"),
        (dict(budget=math.nan), "budget=nan is not allowed"),
        (dict(recovery=["tensor"]), r"recovery=\['tensor'\] is not allowed: a dict with keys"),
        (dict(recovery={"range": ["tensor"]}), "recovery={'range'.* keys of .*'granularity'"),
        (dict(recovery={"granularity": "tensor"}), r"recovery\['granularity'\]='tensor' is not"),
        (dict(recovery={"granularity": []}), r"recovery\['granularity'\]=\[\] is not"),
        (dict(recovery={"granularity": ["layer"]}), "granularity='layer' is not allowed"),
        (dict(recovery={"recalibrate": ["no"]}), "recalibrate='no' is not allowed: True or False"),
        (dict(options=None), "options=None is not allowed: a dict"),
        (dict(options={"adapter_bits": 4}), "options={'adapter_bits': 4} is not allowed"),
        (dict(options={"granularity": ["tensor"]}), r"granularity=\['tensor'\] is not allowed"),
        (dict(search=20), "search=20 is not allowed: a dict with keys"),
        (dict(search={"batch_size": 64}), r"search\['iterations'\]=None is not allowed"),
        (dict(search={"iterations": 0}), r"search\['iterations'\]=0 is not allowed"),
        (dict(search={"iterations": 1, "teacher": True}), "search={.* keys of .*'iterations'"),
        (dict(search={"iterations": 1, "lr": -1}), "lr=-1 is not allowed"),
        (dict(equal_bits=4), "equal_bits=4 is not allowed: a dict"),
        (dict(equal_bits={"depthwise": 6}), "equal_bits={'depthwise': 6} is not allowed"),
        (dict(equal_bits={"depth-wise": "6"}), r"equal_bits\['depth-wise'\]='6' is not allowed"),
        (dict(equal_bits={"depth-wise": math.inf}), r"equal_bits\['depth-wise'\]=inf"),
        (dict(equal_bits={"mixed": 4.0}), r"equal_bits\['mixed'\]=4.0 is not allowed: a whole"),
        (dict(equal_bits={"mixed": 2}), r"equal_bits\['mixed'\]=2 is not allowed"),
        (dict(candidates=[4, 6]), r"equal_bits\['mixed'\]=4 is not allowed: .* at least 4.4,"),
        (dict(seeds=0), "seeds=0 is not allowed: a list"),
        (dict(seeds=[]), r"seeds=\[\] is not allowed"),
        (dict(seeds=["0"]), r"seeds=\['0'\] is not allowed"),
        (dict(seeds=[True]), r"seeds=\[True\] is not allowed"),
        (dict(seeds=[2**63]), r"seeds=\[9\d+\] is not allowed"),
        (dict(seeds=[1, 1]), r"seeds=\[1, 1\] is not allowed: a list of 1 or more, none twice"),
    ],
)
def test_settings_of_adapters_are_checked_early(changed, message):
    with pytest.raises(ValueError, match=message):
        study.AdapterSetting(**PROFILE | changed)


def test_settings_of_adapters_that_apply_are_stored():
    assert study.AdapterSetting(**PROFILE).applied == PROFILE
    pretrained = PROFILE | dict(dataset=study.PRETRAINED)
    applied = study.AdapterSetting(**pretrained).applied
    unused = {"image_size", "train_images", "calibration_images", "training"}
    assert applied == {name: value for name, value in pretrained.items() if name not in unused}


@pytest.fixture
def subject() -> study.Subject:
    torch.manual_seed(0)
    return study.Subject(TinyNet().eval(), images(32), images(24, seed=1))


def measured(subject: study.Subject, trials: list, seeds=(0, 1)) -> pd.DataFrame:
    rows = [study.measure_trial(subject, trial, seed, "cpu") for seed in seeds for trial in trials]
    return pd.DataFrame(rows)


def test_recovery_pairs_adapters_with_the_same_network_without_them(subject):
    first, *rest = study.trials_of_recovery([4, 3], 0.5, dict(deviations=5, granularity="tensor"))
    assert first.options["bits"] == 32 and len(rest) == 2 * 2 * 2 * 2
    for without, adapters in zip(rest[::2], rest[1::2], strict=True):
        assert (without.arm, adapters.arm) == ("quantized", "adapters")
        assert without.options | dict(budget=0.5) == adapters.options
        assert without.options["deviations"] == 5
    assert len({json.dumps(trial.options, sort_keys=True) for trial in rest}) == len(rest)


def test_rows_say_what_was_measured(subject):
    options = dict(granularity="tensor", recalibrate=True, iterations=2, batch_size=16)
    trials = study.trials_of_ranks([3], 0.5, options)
    rows = measured(subject, trials).set_index(["arm", "seed"])
    assert rows.index.unique(0).tolist() == ["uniform", "searched", "searched, teacher"]
    row = rows.loc[("searched", 0)]
    assert (row["bits"], row["granularity"], row["norms"]) == (3, "tensor", "recalibrated")
    assert row["iterations"] == 2 and rows.loc[("uniform", 0), "iterations"] == 0
    assert set(json.loads(row["ranks"])) == {"stem.0", "depthwise", "pointwise"}
    assert (rows["added_percent"] <= 50).all() and rows["top1"].between(0, 100).all()
    again = study.measure_trial(subject, trials[1], 0, "cpu")
    assert again["ranks"] == row["ranks"] and again["top1"] == row["top1"]


def test_rows_hold_the_answers_to_each_image_at_its_place(subject):
    (trial, *_) = study.trials_of_recovery([], 0.5, {})  # the float network
    with torch.no_grad():
        x, y = subject.test.tensors
        right = (subject.network(x).argmax(1) == y).tolist()
    text = study.measure_trial(subject, trial, 0, "cpu")["correct"]
    assert [character == "1" for character in text] == right and 0 < text.count("1") < len(right)
    placed = replace(subject, places=torch.arange(24).flip(0) * 2)
    row = study.measure_trial(placed, trial, 0, "cpu")
    assert row["correct"][::-2] == text and set(row["correct"][1::2]) == {"-"}


def test_claims_are_judged_over_seeds_and_images(subject):
    metrics = measured(subject, study.trials_of_recovery([2], 0.5, {}, ["tensor"], [False]))
    claim = Claim("", "top1", "adapters", "quantized", +1, where={"study": "recovery"})
    assert claims.assess(metrics, claim).shared == "resampled"


def test_depthwise_arms_have_the_same_size(subject):
    arms = study.depthwise_arms(subject.network, 3, 10.0)
    bits = {arm: (own["bits"]["depthwise"], own["bits"]["pointwise"]) for arm, own in arms.items()}
    assert bits == {
        "shared filters": (3, 3),
        "no adapters": (3, 3),
        "8 bits": (8, 3),
        "float weights": (32, 3),
        "one bit more": (4, 4),
        "bits alone": (10, 10),
    }
    trials = study.trials_at_size(subject.network, "depth-wise", 10.0, arms, {})
    rows = measured(subject, trials, seeds=[0]).set_index("arm")
    sizes = rows["equivalent_bits"]
    one = 8 * 35 / 384  # the largest component, in bits per weight
    assert (sizes <= 10).all() and (sizes > 10 - one).all()
    ranks = rows["ranks"].map(json.loads)
    assert ranks["shared filters"]["depthwise"] >= 1
    assert all(ranks[arm]["depthwise"] == 0 for arm in ("no adapters", "8 bits", "float weights"))
    with pytest.raises(ValueError, match=r"weights of 'float weights' take 8\.4"):
        study.trials_at_size(subject.network, "depth-wise", 5.0, arms, {})
    with pytest.raises(ValueError, match=r"equal_bits=12 .* leaves 9.000 bits beside the weights"):
        study.trials_at_size(subject.network, "depth-wise", 12, arms, {})
    for channels in (1, 3):
        assert study.depthwise_arms(nn.Sequential(nn.Conv2d(channels, 3, 1)), 4, 6) == {}


def test_mixed_bits_keep_their_mean_and_the_network(subject):
    network, (x, y) = subject.network, subject.calibration.tensors
    before = {name: value.clone() for name, value in network.state_dict().items()}
    (bits,) = study.assign_bits(network, x, y, [4.0], [2, 3, 4, 5, 6])
    assert set(bits) == {"stem.0", "depthwise", "pointwise"}
    assert study.mean_bits(network, bits) <= 4 and len(set(bits.values())) > 1
    assert all(torch.equal(before[n], value) for n, value in network.state_dict().items())


def test_one_table_serves_all_means_as_one_assignment_each(subject, monkeypatch):
    network, (x, y) = subject.network, subject.calibration.tensors
    means, offered, asked = [4.5, 4.0, 3.2, 2.5], [2, 3, 4, 5, 6], []

    def counted(*arguments):
        error = batch_error(*arguments)
        return lambda config: asked.append(config) or error(config)

    monkeypatch.setattr(study, "batch_error", counted)
    found = study.assign_bits(network, x, y, means, offered)
    together = len(asked)
    study.assign_bits(network, x, y, means[:1], offered)
    assert 0 < together == len(asked) - together
    for mean, bits in zip(means, found, strict=True):
        wide = Candidates((16,), (16,))
        own = {name: Candidates(tuple(offered), (16,)) for name in bits} | {"last": wide}
        supernet = Supernet(copy.deepcopy(network), x, offered, edge_bits=None, overrides=own)
        table = {info.name: info.weights for info in supernet.table}
        size = (mean * sum(table[n] for n in bits) + 16 * table["last"]) / 8
        expected = assignment(supernet, batch_error(supernet, x, y), size=size)[-1].config
        assert bits == {name: expected[name].weight for name in bits}


def test_mixed_arms_have_at_most_the_same_size(subject):
    arms = study.mixed_arms(subject, 5, 0.25, [2, 3, 4, 5, 6, 7], images=16)
    trials = study.trials_at_size(subject.network, "mixed", 5, arms, dict(exempt=["stem.0"]))
    rows = measured(subject, trials, seeds=[0]).set_index("arm")
    assert (rows["equivalent_bits"] <= 5 + 1e-9).all()
    assert rows.loc["equal bits", "equivalent_bits"] == 5
    assert rows["bits"].notna()["equal bits"] and rows["bits"].isna()["mixed bits"]
    assert rows.loc["mixed bits, adapters", "added_percent"] > 0


def test_mixed_arms_are_chosen_on_the_first_calibration_images_alone(subject, monkeypatch):
    how = dict(equal_bits=5, budget=0.25, bits=[2, 3, 4, 5, 6, 7], images=16)
    chosen = study.mixed_arms(subject, **how)
    x, y = (t.clone() for t in subject.calibration.tensors)
    x[16:] = torch.randn_like(x[16:]) * 9
    late = replace(subject, calibration=TensorDataset(x, y), test=images(24, seed=5))
    assert study.mixed_arms(late, **how) == chosen
    flat = {name: value.roll(1, 0) for name, value in zip("xy", (x, y), strict=True)}
    early = replace(subject, calibration=TensorDataset(flat["x"], y), test=subject.test)
    assert study.mixed_arms(early, **how) != chosen
    seen = []
    monkeypatch.setattr(study, "assign_bits", lambda *given: seen.extend(given) or ({}, {}))
    study.mixed_arms(subject, **how)
    expected = [t[:16] for t in subject.calibration.tensors]
    assert seen[0] is subject.network and all(map(torch.equal, seen[1:3], expected))


def test_pictures_and_table_show_every_arm(subject):
    trials = study.trials_of_recovery([3], 0.5, {}) + study.trials_of_ranks([4, 3], 0.5, {})
    metrics = measured(subject, trials)
    text = study.metrics_table(metrics).data
    assert text.count("\n") == 1 + len(trials)
    assert all(arm in text for arm in metrics["arm"])
    (axis,) = study.equivalent_bits_plot(metrics).axes
    labels = [label.get_text() for label in axis.get_legend().get_texts()]
    assert "searched, 3 bits" in labels and len(labels) == 6
    (axis,) = study.ranks_plot(metrics, 4).axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["stem.0", "depthwise", "pointwise"]


def test_a_trained_subject_depends_on_its_seed():
    config = TrainConfig(epochs=1, batch_size=32, lr=0.01)
    how = dict(config=config, image_size=8, train_images=64, calibration_images=20)
    one, same, other = (
        study.load_subject("resnet20_cifar", "digits", "data", seed, **how) for seed in (0, 0, 1)
    )
    assert len(one.calibration) == 20 and len(one.test) == 359
    assert torch.equal(one.calibration.tensors[0], same.calibration.tensors[0])
    assert not torch.equal(one.calibration.tensors[1], other.calibration.tensors[1])
    states = [tuple(s.network.parameters()) for s in (one, same, other)]
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))


def test_a_pretrained_subject_halves_the_validation_images(tmp_path, monkeypatch):
    for i, wnid in enumerate(["n01440764", "n01484850", "n01494475", "n01498041"]):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(tmp_path / "val" / wnid / "x.png")
    view = models.preprocessing("resnet20_cifar")
    monkeypatch.setattr(imagenet, "preprocessing", lambda name: view)
    monkeypatch.setattr(study, "create", lambda name, classes, pretrained: TinyNet())
    config = TrainConfig(epochs=0)
    found = study.load_subject("x", study.PRETRAINED, tmp_path, 0, config=config)
    labels = [part.tensors[1].tolist() for part in (found.calibration, found.test)]
    assert sorted(labels[0] + labels[1]) == [0, 2, 4, 6]  # of all 1000 classes
    assert [len(part) for part in labels] == [2, 2]
    assert found.test.tensors[0].shape == (2, 3, 32, 32)
    # A place is the same image for all seeds
    by_place = {}
    for seed in range(4):
        other = study.load_subject("x", study.PRETRAINED, tmp_path, seed, config=config)
        for place, label in zip(other.places.tolist(), other.test.tensors[1], strict=True):
            assert by_place.setdefault(place, int(label)) == int(label)
    assert by_place == {0: 0, 1: 2, 2: 4, 3: 6}
