"""The comparison of a searched policy with uniform ones chooses on the search split alone."""

import json

import pytest

from mpqlib.studies.train import best_within, comparison_table, result, verdict


def test_the_best_is_chosen_on_the_search_split_within_the_budget(metrics):
    assert best_within(metrics, 3.0, "uniform") == "uniform 3"
    assert best_within(metrics, 9.0, "uniform") == "uniform 4"
    assert best_within(metrics, 0.5, "uniform") is None
    assert best_within(metrics, 3.0) == "searched"
    tie = metrics.assign(search_top1=70.0, search_loss=[0.0, 0.3, 0.1, 0.2, 0.0])
    assert best_within(tie, 3.0, "u") == "uniform 2"  # by loss


def test_verdict_says_what_the_numbers_say(metrics):
    text = verdict(metrics, 3.0)
    assert (
        "uniform 3" in text and "+10.0" in text and "+3.0" in text and "intervals overlap" in text
    )
    assert "none to compare" in verdict(metrics, 0.5)


def test_table_shows_every_row_and_marks_what_depends_on_the_processor(metrics):
    lines = comparison_table(metrics).data.splitlines()
    assert len(lines) == 2 + len(metrics)
    numbers = "\u2248 2.900 | \u2248 2.90 | \u2248 75.0 | \u2248 [73.0, 77.0] | \u2248 80.0"
    assert f"| searched | {numbers} |" in lines
    assert lines[2].startswith("| float | ") and lines[2].endswith("|  |")


def test_float_row_counts_32_bits(metrics, supernet):
    macs, weights = (sum(getattr(i, key) for i in supernet.table) for key in ("macs", "weights"))
    in_float = metrics.set_index("configuration").loc["float"]
    assert in_float["bitops_g"] == pytest.approx(macs * 1024 / 1e9)
    assert in_float["size_mb"] == pytest.approx(weights * 4 / 1e6)


def test_result_holds_the_policy_and_all_configurations(metrics):
    found = result(metrics, 3.0, seed=7, seconds=1.26)
    assert found["bitops_budget_g"] == 3.0 and found["bitops_g"] == 2.9 and found["top1"] == 75.0
    assert found["top1_float"] == 91.0 and found["seed"] == 7 and found["seconds"] == 1.3
    assert found["configuration"] == found["searched"]["configuration"] == "searched"
    assert [r["configuration"] for r in found["uniform"]] == [f"uniform {b}" for b in (2, 3, 4)]
    json.dumps(found, allow_nan=False)


def test_a_budget_below_every_configuration_is_refused(metrics):
    with pytest.raises(ValueError, match=r"budget=0\.5 G is not allowed"):
        result(metrics, 0.5, seed=0, seconds=1.0)
