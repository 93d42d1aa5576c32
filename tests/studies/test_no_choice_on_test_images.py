"""Test images choose nothing: each study chooses alike if its test images are noise."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TinyNet, images
from torch.utils.data import TensorDataset

import mpqlib.studies
from mpqlib.data import Splits
from mpqlib.network.supernet import Supernet
from mpqlib.report.runs import measure
from mpqlib.studies import cora, imagenet, one_bitwidth, retraining, scheduler_ablation, transfer
from mpqlib.studies.arms import Setting
from mpqlib.studies.search import measure_front
from mpqlib.studies.train import result
from mpqlib.training.loop import TrainConfig

CPU = torch.device("cpu")
# Modules that measure but choose nothing, or that only help the others
NO_CHOICE = {
    *("adapters", "arms", "benchmark", "command", "idm_density", "interference"),
    *("latent_distance", "parameters", "processes", "ranks"),
}
# What rows say of test images, and how long they took; all else is chosen, or follows from it
OF_TEST = {"top1", "top1_low", "top1_high", "correct", "loss", "seconds"}


def noise(like: TensorDataset) -> TensorDataset:
    """As many images, of large noise, with random labels."""
    generator = torch.Generator().manual_seed(99)
    x, y = like.tensors
    labels = torch.randint(int(y.max()) + 1, y.shape, generator=generator)
    return TensorDataset(5 * torch.randn(x.shape, generator=generator), labels)


def splits_with(test: TensorDataset) -> Splits:
    """Small splits of three classes; all but the test images are always the same."""
    train, search = images(48), images(32, seed=1)
    return Splits(train, train, search, test, ("a", "b", "c"))


def tiny() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet().eval()


def small_supernet() -> Supernet:
    return Supernet(tiny(), images(16).tensors[0], (2, 3, 4))


def without_test(rows: list[dict]) -> list[dict]:
    """The rows without what they say of test images."""
    return [{name: v for name, v in row.items() if name not in OF_TEST} for row in rows]


def choose_in_train(test: TensorDataset, folder: Path) -> object:
    """03: the policy is the best of searched and uniform bits."""
    supernet, splits = small_supernet(), splits_with(test)
    rows = [{"configuration": "float", "bitops_g": 9.0, "top1": 99.0}]
    for bits in (2, 3, 4):
        name = "searched" if bits == 3 else f"uniform {bits}"
        found = measure(supernet, supernet.uniform(bits), splits, images=48)
        rows.append({"configuration": name} | found)
    chosen = result(pd.DataFrame(rows), rows[-1]["bitops_g"], 0, 0.0)
    return chosen["configuration"], without_test(rows)


def choose_in_search(test: TensorDataset, folder: Path) -> object:
    """04: what each search finds."""
    x, y = images(32, seed=1).tensors
    how = dict(device=CPU, recalibration_images=48)
    rows = measure_front(small_supernet(), x, y, 16, [3], splits_with(test), {}, 0, **how)
    return without_test(rows)


def choose_in_scheduler_ablation(test: TensorDataset, folder: Path) -> object:
    """05: searched policies."""
    given = dict(model="test_byobnet", dataset="digits", train_images=None, search_share=0.2)
    given |= dict(image_size=8, bits=[2, 3, 4], float_epochs=0, epochs=0, search_images=16)
    setting = Setting(levels=[2.5, 3], recalibration_images=48, **given)
    study = scheduler_ablation.Study(setting, splits_with(test), folder, CPU)
    return [row["policy"] for row in study.measure_policies(small_supernet(), "plain", 0)]


def choose_in_retraining(test: TensorDataset, folder: Path) -> object:
    """13: the policies, and the bits of the networks that are trained alone."""
    given = dict(model="resnet8_cifar", dataset="digits", train_images=None, search_share=0.2)
    given |= dict(image_size=8, bits=[2, 3, 4], float_epochs=0, epochs=0, search_images=16)
    given |= dict(levels=[2.5], training={"batch_size": 16}, recalibration_images=48)
    setting = retraining.RetrainingSetting(given, levels=[2.5], long_levels=[2.5])
    study = retraining.Retraining.of(setting, splits_with(test), folder, CPU)
    bits = [study.policy(way, b, 0).to_json() for way, b in setting.networks()]
    return bits, without_test(study.run(0))


def choose_in_imagenet(test: TensorDataset, folder: Path) -> object:
    """07: bits of each way to choose them."""
    halves = imagenet.Halves(images(32), test)
    subject = imagenet.Calibrated(tiny(), halves, (3, 4, 6), "cpu", None, folder, {})
    ways = [way for way in imagenet.WAYS if way != "greedy"]
    return without_test(imagenet.measure_policies(subject, [4], ways, "channel", 16, 2))


def choose_in_transfer(test: TensorDataset, folder: Path) -> object:
    """08: policies of the source and of the target."""
    data = {"dataset": "digits"}
    recipe = transfer.Recipe(
        *("resnet8_cifar", data, data, 8, [2, 4, 6], 4, 1, 1, 2, 1, 16), recalibration_images=48
    )
    study = transfer.Transfer(recipe, splits_with(test), splits_with(test), folder, CPU)
    return without_test(study.run("transferred", 0))


def choose_in_one_bitwidth(test: TensorDataset, folder: Path) -> object:
    """09: mixed bits, and which single and which mixed arm stand for their kind."""
    setting = one_bitwidth.SizeSetting(
        *({"resnet8_cifar": [24]}, "digits", None, 0.2, 8, [2, 8], [2, 8], 0, 0, 16),
        recalibration_images=48,
    )
    study = one_bitwidth.SizeStudy(setting, splits_with(test), folder, CPU)
    supernet = study.train_supernet("resnet8_cifar", 0)
    policies = one_bitwidth.find_policies(study.search_path(supernet), supernet.table, [24])
    arms = [supernet.uniform(2), supernet.uniform(8), *policies.values()]
    rows = [
        {"family": "resnet8_cifar", "size_kb": 24, "arm": arm} | study.measure(supernet, config)
        for arm, config in zip(setting.arms, arms, strict=True)
    ]
    chosen = one_bitwidth.choose_arms(pd.DataFrame(rows))
    return list(chosen["of"]), policies, without_test(rows)


def choose_in_cora(test: TensorDataset, folder: Path) -> object:
    """10: ranks, and mixed bits."""
    subject = cora.Subject(tiny(), images(32), test)
    arms = cora.mixed_arms(subject, 5, 0.25, [3, 4, 5, 6], images=16)
    trials = cora.trials_of_ranks([3], 0.5, dict(recalibrate=True, iterations=3, batch_size=16))
    return arms, without_test([cora.measure_trial(subject, trial, 0, "cpu") for trial in trials])


CHOOSE: dict[str, Callable[[TensorDataset, Path], object]] = {
    "train": choose_in_train,
    "search": choose_in_search,
    "scheduler_ablation": choose_in_scheduler_ablation,
    "retraining": choose_in_retraining,
    "imagenet": choose_in_imagenet,
    "transfer": choose_in_transfer,
    "one_bitwidth": choose_in_one_bitwidth,
    "cora": choose_in_cora,
}


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Networks are not trained: it would take long, and no study trains on test images."""
    for study in (transfer, one_bitwidth):
        monkeypatch.setattr(study, "train", lambda network, *_, **__: (network.eval(), []))


@pytest.mark.parametrize("study", CHOOSE)
def test_choices_do_not_depend_on_test_images(study, tmp_path):
    test, choose = images(24, seed=2), CHOOSE[study]
    chosen = choose(test, tmp_path / "whole")
    assert chosen == choose(noise(test), tmp_path / "noise")


def test_every_study_is_listed():
    modules = {path.stem for path in Path(mpqlib.studies.__file__).parent.glob("[!_]*.py")}
    assert modules == NO_CHOICE | set(CHOOSE)


def test_cora_calibrates_without_test_images(monkeypatch):
    """10: images to train and calibrate on."""

    def seen(test: TensorDataset) -> list[torch.Tensor]:
        trained = []
        monkeypatch.setattr(cora, "load", lambda *_, **__: splits_with(test))
        monkeypatch.setattr(cora, "create", lambda *_: tiny())
        monkeypatch.setattr(cora, "train", lambda net, data, *_, **__: (net, trained.append(data)))
        found = cora.load_subject("x", "digits", "", 0, config=TrainConfig(epochs=0))
        return [*trained[0].tensors, *found.calibration.tensors]

    test = images(24, seed=2)
    for one, other in zip(seen(test), seen(noise(test)), strict=True):
        assert torch.equal(one, other)
