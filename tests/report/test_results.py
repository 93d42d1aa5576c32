"""The table of results on the first page."""

import json

import pandas as pd
import pytest
import yaml
from textbook import textbook_t_interval

from mpqlib.report import results
from mpqlib.report.results import searched_beside_uniform
from mpqlib.training.loop import TRAINING_RULES


def front(seed, greedy, uniform):
    """Made-up rows: a search with the budget of level 3, and uniform bits by cost and top-1."""
    rows = [
        dict(arm="greedy", level=3, budget_g=2.0, bitops_g=1.9, search_top1=0, top1=greedy),
        dict(arm="greedy", level=4, budget_g=4.0, bitops_g=3.9, search_top1=0, top1=0),
    ]
    for cost, search_top1, top1 in uniform:
        rows.append(
            dict(arm="uniform", level=cost, budget_g=cost, bitops_g=cost)
            | dict(search_top1=search_top1, top1=top1)
        )
    return pd.DataFrame(rows).assign(seed=seed)


def test_uniform_bits_are_chosen_on_the_search_split_within_the_budget():
    # On the test split the second one is better, on the search split the first; the third costs
    # more than the budget.
    uniform = [(1.0, 60, 50.0), (2.0, 55, 70.0), (3.0, 99, 99.0)]
    rows = pd.concat([front(0, 52.0, uniform), front(1, 54.0, uniform)])
    found = searched_beside_uniform(rows, 3)
    assert found["searched"].tolist() == [52.0, 54.0]
    assert found["uniform"].tolist() == [50.0, 50.0]
    assert found["budget_g"].tolist() == [2.0, 2.0]


def test_a_budget_below_all_uniform_bits_has_no_comparison():
    with pytest.raises(ValueError):
        searched_beside_uniform(front(0, 52.0, [(3.0, 60, 50.0)]), 3)


def store(folder, searched, uniform, rules):
    """A run of 03_train: `uniform` has (BitOPs, search top-1, test top-1) of uniform bits."""
    folder.mkdir(parents=True)
    found = {
        "bitops_budget_g": 3.0,
        "searched": {"top1": searched},
        "uniform": [dict(bitops_g=c, search_top1=s, top1=t) for c, s, t in uniform],
        "top1_float": 99.0,
    }
    (folder / "result.json").write_text(json.dumps(found))
    (folder / "provenance.json").write_text(json.dumps({"training_rules": rules}))
    about = dict(model="resnet18", dataset="digits", image_size=80)
    (folder / "parameters.yaml").write_text(yaml.safe_dump(about))


def test_runs_of_several_seeds_are_one_row_with_an_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "SHOWN", {})
    # Within the budget, the second one is best on the search split; the third costs too much.
    uniform = [(1.0, 60, 99.0), (2.0, 65, 90.0), (3.5, 70, 99.0)]
    searched = [94.0, 95.0, 97.0]
    for name, top1 in zip(("digits", "digits_seed1", "digits_seed2"), searched, strict=True):
        store(tmp_path / "03_train" / name, top1, uniform, TRAINING_RULES)
    row = results.results_table(tmp_path).splitlines()[-1].strip("| ").split(" | ")
    mean, low, high = textbook_t_interval([top1 - 90.0 for top1 in searched])
    assert row == [
        "resnet18, digits (scikit-learn), 80 px",
        "3",
        f"{sum(searched) / 3:.1f} ({mean:+.1f} [{low:+.1f}, {high:+.1f}])",
        "90.0 (at 2 G)",
        "99.0",
        "3 seeds",
    ]


def test_a_single_run_has_no_interval_and_earlier_rules_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "SHOWN", {})
    store(tmp_path / "03_train" / "digits", 94.0, [(2.0, 65, 90.0)], TRAINING_RULES - 1)
    row = results.results_table(tmp_path).splitlines()[-1].strip("| ").split(" | ")
    assert row[2:6] == ["94.0", "90.0 (at 2 G)", "99.0", "1 seed, earlier rules"]


def test_one_run_of_earlier_rules_marks_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "SHOWN", {})
    for name, rules in {"digits": TRAINING_RULES, "digits_seed1": TRAINING_RULES - 1}.items():
        store(tmp_path / "03_train" / name, 94.0, [(2.0, 65, 90.0)], rules)
    assert "| 2 seeds, earlier rules |" in results.results_table(tmp_path)
