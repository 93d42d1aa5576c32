"""Every rule refuses what it does not allow, and each message names the parameter."""

import math
import re

import pytest

from mpqlib.studies import parameters
from mpqlib.studies.parameters import check_layers, check_parameters, check_subset, open_folder

ALLOWED = {
    "model": ["resnet18", "resnet8_cifar", "test_resnet"],
    "dataset": ["digits", "npz"],
    "data_root": ["data"],
    "download": [True, False],
    "train_images": [1, None],
    "search_share": [0.2],
    "image_size": [1, 224],
    "bits": [[2, 4], (16,)],
    "levels": [[2.5, 3]],
    "uniform": [None, [2]],
    "float_epochs": [0, 4],
    "batch_size": [1],
    "bitops": [0, 3.0],
    "recalibration_images": [2],
    "training": [{}, {"lr": 0.02}],
    "judged": ["top1", "search_top1"],
    "seed": [0, 2**63 - 1],
    "seeds": [[0], [3, 1]],
}
REFUSED = {
    "model": [None, 3, ["resnet18"], "no such", "", True],
    "dataset": [None, 3, ["digits"], "mnist", "", True],
    "data_root": [None, 3, ["data"], "", True],
    "download": [None, "true", 1, 0, []],
    "train_images": ["8", -1, 0, math.nan, math.inf, True, 2.5, [], 10**30],
    "search_share": [None, "x", -1, 0, 1, math.nan, math.inf, True, []],
    "image_size": [None, "32", -1, 0, math.nan, True, 2.5, 10**9],
    "bits": [None, [], "[2, 4]", 4, [2, 2], [1], [17], [2, "4"], [True], [2.5], [[2]], {}],
    "levels": [None, [], "3", 3, [3, 3], [3, math.nan], [math.inf], [0.5], [None], [True]],
    "uniform": [[], 3, [2, 2], [2.5]],
    "float_epochs": [None, "4", -1, 1.5, math.nan, True, 10**30],
    "batch_size": [None, "8", 0, -1, 2.5, True],
    "bitops": [None, "3.0", -1, math.nan, math.inf, True, 1e300],
    "recalibration_images": [None, 1, "512", True],
    "training": [None, [], "{'lr': 0.02}", 3, {1: 2}, {"epochs": 3}, {"lr": "x"}, {"lr": math.nan}],
    "judged": [None, "top5", ["top1"]],
    "seed": [None, "0", -1, 2**63, 0.0, True],
    "seeds": [None, [], 0, "0", [0, 0], [-1], [None], [0.0], [True], {}],
}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(ALLOWED))
def test_allowed_values_pass(name, value):
    check_parameters(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_other_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}[=:].* not allowed"):
        check_parameters(**ALLOWED_ONCE | {name: value})


ALLOWED_ONCE = {name: values[0] for name, values in ALLOWED.items()}


@pytest.mark.parametrize(
    "parameters",
    [dict(float_lr="2e-3"), dict(levels=["2e-3", 4]), dict(training={"lr": "2e-3"})],
    ids=repr,
)
def test_a_number_that_yaml_reads_as_text_is_explained(parameters):
    (name,) = parameters
    with pytest.raises(
        ValueError, match=rf"^{name}.*'2e-3' is text in YAML: write 2\.0e-3 or 0\.002"
    ):
        check_parameters(**parameters)


@pytest.mark.parametrize("value", ["x", "8", "high", "1e", None, True])
def test_other_text_gets_no_such_explanation(value):
    with pytest.raises(ValueError, match=r"float_lr=.* to 1000000000$"):
        check_parameters(float_lr=value)


def test_an_unknown_option_of_training_is_named():
    with pytest.raises(ValueError, match=r"training: \['speed'\] are not allowed here"):
        check_parameters(training={"speed": 1})


@pytest.mark.parametrize(
    "value", [None, {}, {"a": 1}, {"a": 1, "b": [], "c": 1}, {"a": 0, "b": []}]
)
def test_entries_are_exactly_those_of_the_rule(value):
    rule = parameters.entries(a=parameters.whole(1), b=parameters.items(parameters.NAME, 0))
    check_parameters({"few": rule}, few={"a": 1, "b": ["x"]})
    with pytest.raises(ValueError, match=re.escape(f"few={value!r} is not allowed: a dict of 'a'")):
        check_parameters({"few": rule}, few=value)


def test_a_layer_must_be_a_convolution_of_the_model():
    check_layers("layer", ["conv1.3"], "test_resnet")
    for layer in ("conv1", "fc", "no such"):
        with pytest.raises(
            ValueError, match=f"layer=.'{layer}'. is not allowed: some of .*conv1.3"
        ):
            check_layers("layer", [layer], "test_resnet")
    with pytest.raises(ValueError, match=r"layer=\['conv1\.3'\] is not allowed"):
        check_layers("layer", ["conv1.3"], "test_resnet", kernel=1)


def test_a_subset_is_one():
    check_subset("top1_levels", [3], [3, 4])
    with pytest.raises(ValueError, match=r"top1_levels=\[5\] is not allowed: some of \[3, 4\]"):
        check_subset("top1_levels", [5], [3, 4])


def test_a_folder_that_cannot_be_written_to_is_named_and_another_one_made(tmp_path):
    assert open_folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").write_text("")
    for wrong in (None, 3, "", str(tmp_path / "file")):
        with pytest.raises(ValueError, match=re.escape(f"output_dir={wrong!r} is not allowed")):
            open_folder(wrong)
