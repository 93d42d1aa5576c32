"""Claims against a paired t-interval by hand, and every stored figure derived anew."""

import json
import math
import re
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from textbook import textbook_image_covariance, textbook_t_interval, textbook_wilson

from mpqlib.report import claims, runs
from mpqlib.report.paper import FINDINGS, PAPER, Claim, Listed
from mpqlib.training.loop import TRAINING_RULES

ROWS = [  # seed, plain, better
    (0, 70.0, 71.0),
    (1, 60.0, 60.5),
    (2, 65.0, 66.5),
    (3, 80.0, 80.8),
    (4, 75.0, 76.2),
]
CLAIM = Claim("better is better", "distance", "better", "plain", +1, paper="+1.0")


@pytest.fixture
def metrics():
    arms = enumerate(("plain", "better"), 1)
    return pd.DataFrame(
        {"seed": row[0], "arm": arm, "distance": row[i], "data": "a"}
        for i, arm in arms
        for row in ROWS
    )


def test_assessment_is_the_paired_t_interval(metrics):
    found = claims.assess(metrics.sample(frac=1, random_state=0), CLAIM)
    expected = textbook_t_interval([better - plain for _, plain, better in ROWS])
    assert (found.difference, found.low, found.high) == pytest.approx(expected)
    assert (found.arm, found.base, found.n) == (pytest.approx(71.0), pytest.approx(70.0), 5)
    assert found.status == "reproduced"


RIGHT = {  # seed -> the text of each arm, of six images; each seed tests four
    0: {"plain": "01-1-0", "better": "11-1-1"},
    1: {"plain": "-1000-", "better": "-1011-"},
    2: {"plain": "0-1-10", "better": "1-1-11"},
    3: {"plain": "10-01-", "better": "11-01-"},
    4: {"plain": "0010--", "better": "1011"},
}
TOP1 = Claim("better is better", "top1", "better", "plain", +1)


def answers(texts=RIGHT) -> pd.DataFrame:
    """Metrics with the answers to each image, as a run stores them."""
    rows = []
    for seed, arms in texts.items():
        for arm, text in arms.items():
            share = text.count("1") / (len(text) - text.count("-"))
            low, high = textbook_wilson(share, len(text) - text.count("-"))
            top1 = {"top1": 100 * share, "top1_low": 100 * low, "top1_high": 100 * high}
            rows.append({"seed": seed, "arm": arm, "correct": text} | top1)
    return pd.DataFrame(rows)


def image_differences(arms: dict[str, list[str]]) -> dict[int, float]:
    """Better minus plain in % by image that is tested; of several texts, the mean."""

    def shares(texts):
        places = [i for i, character in enumerate(texts[0]) if character != "-"]
        return {i: sum(text[i] == "1" for text in texts) / len(texts) for i in places}

    plain, better = shares(arms["plain"]), shares(arms["better"])
    return {i: 100 * (better[i] - plain[i]) for i in plain}


def test_seeds_that_share_images_are_resampled_with_them():
    found = claims.assess(answers().sample(frac=1, random_state=0), TOP1)
    differences = [
        image_differences({arm: [text] for arm, text in arms.items()}) for arms in RIGHT.values()
    ]
    means = [sum(seed.values()) / 4 for seed in differences]
    covariance = textbook_image_covariance(differences)
    expected = textbook_t_interval(means, covariance)
    assert (found.difference, found.low, found.high) == pytest.approx(expected)
    assert found.shared == "resampled" and covariance > 0
    assert claims.cells(answers(), TOP1)[4] == "5 seeds and their images"
    twice = pd.concat([answers(), answers()])
    assert claims.assess(twice, TOP1) == pytest.approx(found)


def test_a_run_without_answers_is_judged_by_the_largest_chance_of_its_images():
    found = claims.assess(answers().drop(columns="correct"), TOP1)
    rows = answers().pivot(index="seed", columns="arm", values="top1")
    better, plain = rows["better"].mean() / 100, rows["plain"].mean() / 100
    bound = (min(better + plain, 2 - better - plain) - (better - plain) ** 2) / 4
    expected = textbook_t_interval(rows["better"] - rows["plain"], 1e4 * bound)
    assert (found.difference, found.low, found.high) == pytest.approx(expected)
    assert found.shared == "bounded"
    assert claims.cells(answers().drop(columns="correct"), TOP1)[4] == "5 seeds, images bounded"
    some = answers().assign(correct=[None, *answers()["correct"][1:]])
    assert claims.assess(some, TOP1) == found


@pytest.mark.parametrize("value", ["top1", "loss", "judged", "js", "anything new"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_interval_that_ignores_shared_images_decides_nothing(metrics, value, sign):
    claim = replace(CLAIM, value=value, sign=sign)
    measured = metrics.rename(columns={"distance": value})
    assert claims.assess(metrics, replace(CLAIM, sign=sign)).status != "undecided"
    found = claims.assess(measured, claim)
    assert (found.shared, found.status) == ("ignored", "undecided")
    *_, n, explained = claims.cells(measured, claim)
    assert (n, explained) == ("5 seeds, images ignored", "*undecided*: the interval is too narrow")
    by_image = claims.assess(
        measured.rename(columns={"seed": "image"}), replace(claim, unit="image")
    )
    assert by_image.shared == "none" and by_image.status != "undecided"


def test_what_rounding_leaves_of_a_zero_is_no_direction(metrics):
    even = metrics.assign(distance=[0.1 + 0.2] * 5 + [0.3] * 5)
    for sign in (1, -1):
        claim = Claim("", "distance", "better", "plain", sign)
        assert claims.assess(even, claim).status == "undecided"


def test_rows_of_one_unit_are_averaged_before_they_are_paired(metrics):
    twice = pd.concat([metrics.assign(distance=metrics["distance"] + d) for d in (-3, 3)])
    assert claims.assess(twice, CLAIM) == pytest.approx(claims.assess(metrics, CLAIM), nan_ok=True)


def test_only_rows_that_count_are_read(metrics):
    other = metrics.assign(data="b", distance=-metrics["distance"])
    both = pd.concat([metrics, other])
    for name, sign in (("a", 1), ("b", -1)):
        claim = Claim("", "distance", "better", "plain", +1, where={"data": name})
        assert claims.assess(both, claim).difference == pytest.approx(sign * 1.0)


@pytest.mark.parametrize(
    "low, high, n, sign, margin, expected",
    [
        (0.2, 1.8, 5, +1, 0, ("reproduced", "holds")),
        (-0.2, 2.2, 5, +1, 0, ("undecided", "undecided")),
        (-2.2, 0.2, 5, +1, 0, ("undecided", "undecided")),
        (0.0, 0.0, 5, +1, 0, ("undecided", "undecided")),
        (0.2, 1.8, 5, -1, 0, ("contradicted", "does not hold")),
        (-1.8, -0.2, 9, -1, 0, ("reproduced", "holds")),
        (0.2, 1.8, 4, +1, 0, ("not tested", "not tested")),
        (math.nan, math.nan, 1, +1, 0, ("not tested", "not tested")),
        # No worse than the other arm by 0.5
        (-0.4, 0.1, 5, +1, 0.5, ("reproduced", "holds")),
        (-0.6, 0.1, 5, +1, 0.5, ("undecided", "undecided")),
        (-0.9, -0.6, 5, +1, 0.5, ("contradicted", "does not hold")),
        (-0.1, 0.4, 5, -1, 0.5, ("reproduced", "holds")),
    ],
)
def test_status(low, high, n, sign, margin, expected):
    for source, word in zip(("paper", "ours"), expected, strict=True):
        claim = Claim("", "distance", "better", "plain", sign, source=source, margin=margin)
        assert claims.status(claim, low, high, n) == word


@given(st.floats(-9, 9), st.floats(0, 9), st.sampled_from([1, -1]))
def test_status_does_not_change_if_the_arms_are_swapped(mean, half, sign):
    claim = Claim("", "distance", "better", "plain", sign)
    swapped = Claim("", "distance", "plain", "better", -sign)
    one = claims.status(claim, mean - half, mean + half, 5)
    assert one == claims.status(swapped, -mean - half, -mean + half, 5)


def test_an_undecided_claim_says_which_effects_are_excluded(metrics):
    noisy = metrics.assign(
        distance=metrics["distance"] + 9 * (metrics["seed"] % 2) * (metrics.index > 4)
    )
    for sign, side in ((1, "above \u2248 +"), (-1, "below \u2248 -")):
        claim = Claim("", "distance", "better", "plain", sign)
        found = claims.assess(noisy, claim)
        bound = found.high if sign > 0 else found.low
        assert found.low < 0 < found.high
        assert claims.explained(found, claim) == (f"*undecided*, {side}{abs(bound):.2g} excluded")


def test_too_few_seeds_are_named():
    rows = [{"seed": 0, "arm": arm, "distance": 1.0} for arm in ("plain", "better")]
    cells = claims.cells(pd.DataFrame(rows), CLAIM)
    assert cells[-1] == "*not tested*: 1 seed, at least 5 needed"


def test_earlier_files_mark_our_own_findings_in_the_text():
    claim = Claim("ours: better is better", "distance", "better", "plain", +1)
    assert (claim.text, claim.source) == ("better is better", "ours")
    (again,) = claims.documents([claim])
    assert again["source"] == "ours" and Claim(**again) == claim


@pytest.mark.parametrize("wrong", [{"sign": 0}, {"source": "theirs"}, {"margin": -1.0}])
def test_claims_that_make_no_sense_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        Claim(**{**vars(CLAIM), **wrong})


def test_an_arm_that_a_unit_lacks_is_an_error(metrics):
    lacking = metrics[~((metrics["seed"] == 3) & (metrics["arm"] == "better"))]
    with pytest.raises(ValueError, match=r"seed \[3\] lacks an arm of the claim 'better is better"):
        claims.assess(lacking, CLAIM)
    with pytest.raises(ValueError, match=r"no rows of arm \['better'\]"):
        claims.assess(metrics[metrics["arm"] == "plain"], CLAIM)


def test_every_other_arm_is_compared_in_every_group(metrics):
    both = pd.concat([metrics, metrics.assign(data="b", distance=-metrics["distance"])])
    found = claims.differences(both, "distance", "plain", "data")
    assert found[["compared", "data"]].values.tolist() == [["better", "a"], ["better", "b"]]
    assert found["difference"].tolist() == pytest.approx([1.0, -1.0])
    halves = both.assign(half=both["seed"] % 2)
    found = claims.differences(halves, "distance", "plain", ["data", "half"])
    assert found[["data", "half"]].values.tolist() == [["a", 0], ["a", 1], ["b", 0], ["b", 1]]
    assert found["difference"].tolist() == pytest.approx([1.2333, 0.65, -1.2333, -0.65], abs=1e-4)
    # An arm that a group lacks is not compared there.
    lacking = both[(both["arm"] == "plain") | (both["data"] == "b")]
    found = claims.differences(lacking, "distance", "plain", "data")
    assert found[["compared", "data"]].values.tolist() == [["better", "b"]]


@pytest.fixture
def root(metrics, tmp_path, monkeypatch):
    """A repository with one stored run, and claims listed for it."""
    folder = tmp_path / "results" / "05_x" / "small"
    folder.mkdir(parents=True)
    metrics.to_csv(folder / "metrics.csv", index=False)
    (folder / "claims.json").write_text(json.dumps(claims.documents([CLAIM])))
    source = {"commit": "0123456789abcdef", "seeds": [0, 1, 2, 3, 4], "date": "2026-01-02T03:04:05"}
    source["training_rules"] = TRAINING_RULES
    (folder / "provenance.json").write_text(json.dumps(source))
    parts = ["\nearlier table\n".join(claims.marks(name)) for name in ("results", "claims")]
    readme = "\n".join(["before", *parts, "after\n"])
    (tmp_path / "README.md").write_text(readme)
    about = dict(place="Paper, Table 1", measure="top-1 (%)", notebook="05_x")
    listed = [Listed(**vars(CLAIM), **about, run=run) for run in ("small", None)]
    monkeypatch.setattr(claims, "PAPER", listed)
    monkeypatch.setattr(claims, "results_table", lambda results: "table of results")
    monkeypatch.setattr(claims, "FINDINGS", [replace(listed[0], source="ours", place="ours")])
    return tmp_path


def test_the_first_page_judges_listed_claims_by_their_stored_run(root):
    claims.write(root)
    text = (root / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "earlier table" not in text and "table of results" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| b")]
    judged, untested, ours = rows
    assert judged[0] == "better is better<br>Measure: top-1 (%)"
    assert judged[1] == "Paper, Table 1<br>+1.0"
    assert judged[2] == "better \u2248 71, plain \u2248 70"
    assert judged[3].startswith("\u2248 +1 [")
    assert judged[4:] == ["5 seeds, [05 small](results/05_x/small)", "*reproduced*"]
    assert untested[-1] == "*not tested*: no run of 05_x judges it yet"
    assert ours[-1] == "*holds*"
    claims.write(root)
    assert (root / "README.md").read_text() == text


def test_a_run_with_earlier_training_rules_is_marked(root):
    file = root / "results" / "05_x" / "small" / "provenance.json"
    source = json.loads(file.read_text())
    for rules in (TRAINING_RULES - 1, None):
        source["training_rules"] = rules
        if rules is None:
            del source["training_rules"]
        file.write_text(json.dumps(source))
        claims.write(root)
        marked = "5 seeds, [05 small](results/05_x/small), earlier rules"
        assert (root / "README.md").read_text().count(marked) == 2
        assert "*Earlier training rules.*" in (root / "results" / "README.md").read_text()


def test_a_run_that_trains_by_no_rules_of_the_loop_is_never_marked(root):
    source = runs.provenance([0], 1.0, training_rules=None)
    (root / "results" / "05_x" / "small" / "provenance.json").write_text(json.dumps(source))
    claims.write(root)
    first, page = ((root / name / "README.md").read_text() for name in (".", "results"))
    assert "small](results/05_x/small), earlier rules" not in first
    assert "*Earlier training rules.*" not in page


def test_the_results_page_holds_every_row_and_says_how_many_were_tested(root):
    claims.write(root)
    page = (root / "results" / "README.md").read_text()
    assert "The runs below test 1 rows" in page
    assert "[05_x / small](05_x/small)" in page and "commit 0123456 on 2026-01-02" in page
    assert "| better is better | +1.0 | better \u2248 71, plain \u2248 70 |" in page


def test_a_page_without_marks_is_left_alone(root):
    (root / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        claims.write(root)
    assert not (root / "results" / "README.md").exists()


def test_a_run_that_is_not_there_names_those_that_are(root):
    with pytest.raises(FileNotFoundError, match=r"runs of 05_x there: \['small'\]"):
        claims.stored("05_x", "large", root / "results")


def test_missing_results_are_named_with_their_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="part of mpqlib's repository"):
        claims.stored("05_x", "small", tmp_path / "nowhere")


def test_the_pages_of_this_repository_are_up_to_date():
    readme = (claims.RESULTS.parent / "README.md").read_text()
    parts = {"claims": claims.first_page(), "results": claims.results_table(claims.RESULTS)}
    for name, part in parts.items():
        start, end = claims.marks(name)
        assert readme.partition(start)[2].partition(end)[0].strip() == part
    assert (claims.RESULTS / "README.md").read_text() == claims.results_page()


def test_every_listed_run_exists_and_has_the_listed_measure():
    for claim in PAPER + FINDINGS:
        if claim.run is not None:
            folder = claims.RESULTS / claim.notebook / claim.run
            assert (folder / "provenance.json").exists(), folder
            assert claims.assess(pd.read_csv(folder / "metrics.csv"), claim).n >= claims.LEAST


def test_listed_claims_are_the_papers_or_ours():
    assert {claim.source for claim in PAPER} == {"paper"}
    assert {claim.source for claim in FINDINGS} == {"ours"}
    texts = [claim.text for claim in PAPER + FINDINGS]
    assert len(set(texts)) == len(texts)


def judged_rows():
    """(metrics.csv, claim, cells of its row) of both pages."""
    for claim in PAPER + FINDINGS:
        if claim.run is not None:
            file = claims.RESULTS / claim.notebook / claim.run / "metrics.csv"
            yield file, vars(claim), claims.listed_cells(claim, claims.RESULTS)
    page = claims.results_page().splitlines()
    rows = iter([line.strip("| ").split(" | ") for line in page if line.startswith("| ")])
    for path in sorted(claims.RESULTS.glob("*/*/claims.json")):
        assert tuple(next(rows)) == claims.HEADS
        for claim in json.loads(path.read_text()):
            old = claim["text"].startswith("ours: ")
            source = {"source": "ours" if old else claim.get("source", "paper")}
            yield path.with_name("metrics.csv"), claim | source, next(rows)
    assert next(rows, None) is None


COUNTS = (250, 359, 2000, 4000, 10_000)  # test images of the stored runs


def textbook_covariance(rows: list[dict], claim: dict, arm: float, base: float) -> float | None:
    """Covariance of two units by images that they share; None: not known. `arm`, `base`: top-1."""
    alone = ("distance", "spread", "movement", "extent", "crossings", "flips", "seconds")
    if claim["unit"] == "image" or claim["value"] in alone or "variance" in claim["value"]:
        return 0.0
    if claim["value"] != "top1" or "top1_low" not in rows[0]:
        return None
    if isinstance(rows[0].get("correct"), str):
        names = {claim["arm"]: "better", claim["base"]: "plain"}
        texts = {}
        for row in rows:
            units = texts.setdefault(row[claim["unit"]], {"better": [], "plain": []})
            units[names[row["arm"]]].append(row["correct"])
        return textbook_image_covariance([image_differences(arms) for arms in texts.values()])
    share, bounds = rows[0]["top1"] / 100, (rows[0]["top1_low"] / 100, rows[0]["top1_high"] / 100)
    (n,) = (n for n in COUNTS if textbook_wilson(share, n) == pytest.approx(bounds, abs=1e-9))
    arm, base = arm / 100, base / 100
    return 1e4 * (min(arm + base, 2 - arm - base) - (arm - base) ** 2) / n


def test_every_figure_of_both_pages_follows_from_the_stored_files():
    number = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan)"
    words = {"paper": ("reproduced", "contradicted"), "ours": ("holds", "does not hold")}
    tables, count = {}, 0
    for file, claim, cells in judged_rows():
        if file not in tables:
            tables[file] = pd.read_csv(file).to_dict("records")
        values, rows = {}, []  # arm -> unit -> all its values
        for row in tables[file]:
            known = row[claim["value"]] == row[claim["value"]]  # NaN: not measured at this level
            known = known and row["arm"] in (claim["arm"], claim["base"])
            if known and all(row[column] == entry for column, entry in claim["where"].items()):
                rows.append(row)
                units = values.setdefault(row["arm"], {})
                units.setdefault(row[claim["unit"]], []).append(row[claim["value"]])
        arm, base = (
            {unit: sum(found) / len(found) for unit, found in values[claim[name]].items()}
            for name in ("arm", "base")
        )
        assert arm.keys() == base.keys()
        differences = [round(arm[u] - base[u], 9) for u in arm]
        means = sum(arm.values()) / len(arm), sum(base.values()) / len(base)
        covariance = textbook_covariance(rows, claim, *means)
        found = textbook_t_interval(differences, covariance or 0.0)
        mean, low, high = (round(bound, 9) for bound in found)
        shown = [float(n) for n in re.findall(number, cells[3])]
        assert shown == [float(f"{x:.2g}") for x in (mean, low, high)], claim["text"]
        assert len(differences) >= claims.LEAST
        assert cells[4].startswith(f"{len(differences)} {claim['unit']}")
        assert ("images ignored" in cells[4]) == (covariance is None)
        expected, margin = "undecided", claim.get("margin", 0)
        worst, best = sorted((claim["sign"] * low, claim["sign"] * high))
        if covariance is not None and (worst > -margin or best < -margin):
            yes, no = words[claim["source"]]
            expected = yes if worst > -margin else no
        assert cells[5].startswith(f"*{expected}*"), claim["text"]
        count += 1
    assert count > 0
