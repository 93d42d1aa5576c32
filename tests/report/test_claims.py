"""Claims against a paired t-interval by hand, and every stored figure derived anew."""

import json
import math
import re

import pandas as pd
import pytest
from textbook import textbook_t_interval

from mpqlib.report import claims
from mpqlib.report.claims import Claim

ROWS = [  # seed, plain, better
    (0, 70.0, 71.0),
    (1, 60.0, 60.5),
    (2, 65.0, 66.5),
    (3, 80.0, 80.8),
    (4, 75.0, 76.2),
]
CLAIM = Claim("better is better", "top1", "better", "plain", +1, paper="+1.0")


@pytest.fixture
def metrics():
    arms = enumerate(("plain", "better"), 1)
    return pd.DataFrame(
        {"seed": row[0], "arm": arm, "top1": row[i], "data": "a"} for i, arm in arms for row in ROWS
    )


def test_assessment_is_the_paired_t_interval(metrics):
    found = claims.assess(metrics.sample(frac=1, random_state=0), CLAIM)
    expected = textbook_t_interval([better - plain for _, plain, better in ROWS])
    assert (found.difference, found.low, found.high) == pytest.approx(expected)
    assert (found.arm, found.base, found.n) == (pytest.approx(71.0), pytest.approx(70.0), 5)
    assert found.status == "reproduced"


def test_what_rounding_leaves_of_a_zero_is_no_direction(metrics):
    even = metrics.assign(top1=[0.1 + 0.2] * 5 + [0.3] * 5)
    assert claims.assess(even, CLAIM).status == "not reproduced"
    assert claims.assess(even, Claim("", "top1", "better", "plain", -1)).status == "not reproduced"


def test_rows_of_one_unit_are_averaged_before_they_are_paired(metrics):
    twice = pd.concat([metrics.assign(top1=metrics["top1"] + d) for d in (-3, 3)])
    assert claims.assess(twice, CLAIM) == pytest.approx(claims.assess(metrics, CLAIM), nan_ok=True)


def test_only_rows_that_count_are_read(metrics):
    other = metrics.assign(data="b", top1=-metrics["top1"])
    both = pd.concat([metrics, other])
    for name, sign in (("a", 1), ("b", -1)):
        claim = Claim("", "top1", "better", "plain", +1, where={"data": name})
        assert claims.assess(both, claim).difference == pytest.approx(sign * 1.0)


@pytest.mark.parametrize(
    "difference, low, high, n, sign, expected",
    [
        (1.0, 0.2, 1.8, 5, +1, "reproduced"),
        (1.0, -0.2, 2.2, 5, +1, "direction only"),
        (-1.0, -2.2, 0.2, 5, +1, "not reproduced"),
        (1.0, 0.2, 1.8, 5, -1, "not reproduced"),  # clear, but the other way
        (-1.0, -1.8, -0.2, 9, -1, "reproduced"),
        (0.0, 0.0, 0.0, 5, +1, "not reproduced"),
        (1.0, 0.2, 1.8, 4, +1, "not tested here"),
        (1.0, math.nan, math.nan, 1, +1, "not tested here"),
    ],
)
def test_status(difference, low, high, n, sign, expected):
    assert claims.status(difference, low, high, n, sign) == expected


def test_an_arm_that_a_unit_lacks_is_an_error(metrics):
    lacking = metrics[~((metrics["seed"] == 3) & (metrics["arm"] == "better"))]
    with pytest.raises(ValueError, match=r"seed \[3\] lacks an arm of the claim 'better is better"):
        claims.assess(lacking, CLAIM)
    with pytest.raises(ValueError, match=r"no rows of arm \['better'\]"):
        claims.assess(metrics[metrics["arm"] == "plain"], CLAIM)


def test_every_other_arm_is_compared_in_every_group(metrics):
    both = pd.concat([metrics, metrics.assign(data="b", top1=-metrics["top1"])])
    found = claims.differences(both, "top1", "plain", "data")
    assert found[["compared", "data"]].values.tolist() == [["better", "a"], ["better", "b"]]
    assert found["difference"].tolist() == pytest.approx([1.0, -1.0])
    halves = both.assign(half=both["seed"] % 2)
    found = claims.differences(halves, "top1", "plain", ["data", "half"])
    assert found[["data", "half"]].values.tolist() == [["a", 0], ["a", 1], ["b", 0], ["b", 1]]
    assert found["difference"].tolist() == pytest.approx([1.2333, 0.65, -1.2333, -0.65], abs=1e-4)


def store(metrics, root, notebook="05_x", run="small"):
    folder = root / "results" / notebook / run
    folder.mkdir(parents=True)
    metrics.to_csv(folder / "metrics.csv", index=False)
    (folder / "claims.json").write_text(json.dumps(claims.documents([CLAIM])))


def test_pages_are_written_from_what_is_stored(metrics, tmp_path):
    store(metrics, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{claims.START}\nold\n{claims.END}\nafter\n")
    claims.write(tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| better is better | better \u2248 71, plain \u2248 70 | \u2248 +1 [" in text
    assert "5 seeds, [05 small](results/05_x/small) | +1.0 | *reproduced* |" in text
    page = (tmp_path / "results" / "README.md").read_text()
    assert "[05 small](05_x/small)" in page
    claims.write(tmp_path)
    assert readme.read_text() == text

    readme.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        claims.write(tmp_path)


def test_a_run_that_is_not_there_names_those_that_are(metrics, tmp_path):
    store(metrics, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"runs of 05_x: \['small'\]"):
        claims.stored("05_x", "large", tmp_path / "results")


def test_the_pages_of_this_repository_are_up_to_date():
    root = claims.RESULTS.parent
    text = claims.page()
    readme = (root / "README.md").read_text()
    assert readme.partition(claims.START)[2].partition(claims.END)[0].strip() == text
    page = (claims.RESULTS / "README.md").read_text()
    assert page.endswith(text.replace("](results/", "](") + "\n")


def stored_claims():
    """(metrics.csv, claim) of all stored runs, in the order of the page."""
    for path in sorted(claims.RESULTS.glob("*/*/claims.json")):
        for claim in json.loads(path.read_text()):
            yield path.with_name("metrics.csv"), claim


def test_every_figure_of_the_page_follows_from_the_stored_files():
    number = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan)"
    rows = [line.split(" | ") for line in claims.page().splitlines()[2:]]
    stored = list(stored_claims())
    assert len(rows) == len(stored) > 0
    for cells, (file, claim) in zip(rows, stored, strict=True):
        table = pd.read_csv(file)
        values = {}  # arm -> unit -> all its values
        for _, row in table.iterrows():
            if all(row[column] == entry for column, entry in claim["where"].items()):
                units = values.setdefault(row["arm"], {})
                units.setdefault(row[claim["unit"]], []).append(row[claim["value"]])
        arm, base = values[claim["arm"]], values[claim["base"]]
        assert arm.keys() == base.keys()
        differences = [sum(arm[u]) / len(arm[u]) - sum(base[u]) / len(base[u]) for u in arm]
        found = textbook_t_interval([round(d, 9) for d in differences])
        mean, low, high = (round(bound, 9) for bound in found)
        shown = [float(n) for n in re.findall(number, cells[2].replace("95%", ""))]
        assert shown == [float(f"{x:.2g}") for x in (mean, low, high)], claim["text"]
        clear = low * high > 0
        right = mean * claim["sign"] > 0
        expected = "reproduced" if right and clear else "direction only" if right else "not "
        assert len(differences) >= claims.LEAST
        assert cells[-1].strip(" |*").startswith(expected), claim["text"]
        assert cells[3].startswith(f"{len(differences)} {claim['unit']}")
