"""Judges claims by stored runs and writes the tables: `python -m mpqlib.report.claims`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from ..files import save_atomically
from .intervals import (
    correct_shares,
    covariance_bound,
    image_count,
    image_covariance,
    t_interval,
)
from .paper import FINDINGS, PAPER, Claim, Listed
from .results import results_table
from .runs import checkout, has_earlier_rules
from .tables import markdown_table, show_markdown

if TYPE_CHECKING:
    from IPython.display import Markdown

LEAST = 5  # units, such as seeds, that a claim needs to be judged
WORDS = {  # source of a claim -> status if the interval lies on the claimed side, or on the other
    "paper": ("reproduced", "contradicted"),
    "ours": ("holds", "does not hold"),
}
# Of the checkout that the current folder lies in, or else of the one that this package lies in.
RESULTS = (checkout(Path.cwd()) or checkout(Path(__file__)) or Path()) / "results"

# How an interval treats the images that units share -> what the pages say behind their number
SHARED_IMAGES = {
    "none": "",
    "resampled": " and their images",
    "bounded": ", images bounded",
    "ignored": ", images ignored",
}
HEADS = "claim", "paper", "measured", "difference [95%]", "n", "status"


class Assessment(NamedTuple):
    """Means of both arms, their paired difference with its 95% interval, pairs, and the status.

    `shared`: how the interval treats the images that units share, one of SHARED_IMAGES.
    """

    arm: float
    base: float
    difference: float
    low: float
    high: float
    n: int
    shared: str
    status: str


def rows_of(metrics: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """The rows of the metrics that the claim compares, without those that were not measured."""
    for column, entry in claim.where.items():
        metrics = metrics[metrics[column] == entry]
    return metrics[metrics["arm"].isin([claim.arm, claim.base])].dropna(subset=claim.value)


def pairs(metrics: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """The values of both arms, one row per unit; raises ValueError if a unit lacks an arm."""
    values = rows_of(metrics, claim).pivot_table(
        index=claim.unit, columns="arm", values=claim.value
    )
    if missing := {claim.arm, claim.base} - set(values):
        raise ValueError(f"no rows of arm {sorted(missing)} for the claim {claim.text!r}")
    values = values[[claim.arm, claim.base]]
    if (lacking := values.index[values.isna().any(axis=1)]).size:
        raise ValueError(f"{claim.unit} {list(lacking)} lacks an arm of the claim {claim.text!r}")
    return values


def image_differences(metrics: pd.DataFrame, claim: Claim) -> np.ndarray:
    """Arm minus base in % for each unit and image, (units, images); NaN: not tested by the unit.

    `metrics`: with the column `correct`, written by `correct_text`.
    """
    rows = rows_of(metrics, claim)
    texts = rows["correct"].str.pad(rows["correct"].str.len().max(), "right", "-")
    found = texts.groupby([rows["arm"], rows[claim.unit]]).apply(correct_shares)
    return 100 * np.stack(found[claim.arm] - found[claim.base])


def shared_covariance(metrics: pd.DataFrame, claim: Claim) -> tuple[str, float]:
    """How the images that units share are treated, one of SHARED_IMAGES, and the units' covariance.

    The covariance is measured where the run stores which images are classified correctly, and
    bounded where it stores top-1 with its interval. For other measures on images it is not known.
    """
    if not claim.shares_images:
        return "none", 0.0
    rows = rows_of(metrics, claim)
    if claim.value != "top1" or "top1_low" not in rows or rows["top1_low"].isna().any():
        return "ignored", 0.0
    if "correct" in rows and rows["correct"].notna().all() and rows[claim.unit].nunique() > 1:
        return "resampled", image_covariance(image_differences(metrics, claim))
    images = min(map(image_count, rows["top1"], rows["top1_low"], rows["top1_high"]))
    arm, base = (values.mean() / 100 for values in pairs(metrics, claim).T.to_numpy())
    return "bounded", 100**2 * covariance_bound(arm, base, images)


def status(claim: Claim, low: float, high: float, n: int, shared: str = "none") -> str:
    """The status of a claim whose paired difference has the 95% interval from `low` to `high`.

    *reproduced* (ours: *holds*): the interval excludes zero, and the difference has the claimed
    sign. *contradicted* (ours: *does not hold*): it excludes zero, with the opposite sign.
    *undecided*: it holds zero, or it is too narrow, because it ignores that units share images.
    *not tested*: fewer than LEAST units. If the claim has a margin, the margin replaces zero.
    `shared`: one of SHARED_IMAGES.
    """
    if n < LEAST:
        return "not tested"
    yes, no = WORDS[claim.source]
    # Both bounds in the claimed direction
    worst, best = sorted((claim.sign * low, claim.sign * high))
    if shared == "ignored":
        return "undecided"
    if worst > -claim.margin:
        return yes
    return no if best < -claim.margin else "undecided"


def assess(metrics: pd.DataFrame, claim: Claim) -> Assessment:
    """Judges a claim by the metrics of a run: the paired t-interval over its units.

    The interval includes the chance of the images that units share (see `shared_covariance`).
    """
    values = pairs(metrics, claim)
    # Rounding: 0.1 + 0.2 - 0.3 has no direction
    differences = (values[claim.arm] - values[claim.base]).round(9)
    n, (shared, covariance) = len(differences), shared_covariance(metrics, claim)
    mean, low, high = (round(bound, 9) for bound in t_interval(differences, covariance))
    found = status(claim, low, high, n, shared)
    return Assessment(*map(float, values.mean()), mean, low, high, n, shared, found)


def differences(
    metrics: pd.DataFrame, value: str, base: str, by: str | Sequence[str]
) -> pd.DataFrame:
    """Assesses every other arm against `base`, paired by seed: one row per arm and group.

    `value`: the column to compare. `by`: one or more columns; each combination of their entries is
    a group; one that `base` or the arm lacks is left out. Columns: `compared` (the arm), those of
    `by`, and those of Assessment, so intervals are those that claims are judged by.
    """
    by, rows = [by] if isinstance(by, str) else list(by), []
    arms = [arm for arm in metrics["arm"].unique() if arm != base]
    for entries, group in metrics.groupby(by, sort=False):
        where = dict(zip(by, entries, strict=True))
        for arm in (arm for arm in arms if {arm, base} <= set(group["arm"])):
            found = assess(metrics, Claim("", value, arm, base, 1, where=where))
            rows.append({"compared": arm} | where | found._asdict())
    return pd.DataFrame(rows)


def counted(n: int, unit: str) -> str:
    """A number of units in words, such as "1 seed" or "5 seeds"."""
    return f"{n} {unit}" if n == 1 else f"{n} {unit}s"


def explained(found: Assessment, claim: Claim) -> str:
    """The status in words; if undecided, with the largest claimed effect that is not excluded."""
    if found.status == "not tested":
        return f"*not tested*: {counted(found.n, claim.unit)}, at least {LEAST} needed"
    if found.status == "undecided" and found.shared == "ignored":
        return "*undecided*: the interval is too narrow"
    if found.status == "undecided":
        side, bound = ("above", found.high) if claim.sign > 0 else ("below", found.low)
        return f"*undecided*, {side} \u2248 {bound:+.2g} excluded"
    return f"*{found.status}*"


def cells(metrics: pd.DataFrame, claim: Claim, link: str = "") -> list[str]:
    """The row of a claim under HEADS; measured numbers follow an \u2248 sign.

    `link`: to the run, stands behind the number of units.
    """
    found = assess(metrics, claim)
    units = counted(found.n, claim.unit) + SHARED_IMAGES[found.shared]
    return [
        claim.text,
        "our own finding" if claim.source == "ours" else claim.paper,
        f"{claim.arm} \u2248 {found.arm:.3g}, {claim.base} \u2248 {found.base:.3g}",
        f"\u2248 {found.difference:+.2g} [{found.low:+.2g}, {found.high:+.2g}]",
        ", ".join(filter(None, [units, link])),
        explained(found, claim),
    ]


def table(metrics: pd.DataFrame, claims: Sequence[Claim]) -> str:
    """Claims judged by the metrics of one run, as a Markdown table."""
    return markdown_table(HEADS, [cells(metrics, claim) for claim in claims])


def stored(notebook: str, run: str, results: Path = RESULTS) -> tuple[pd.DataFrame, list[Claim]]:
    """Metrics and claims of a stored run.

    Raises FileNotFoundError if the run or all results are missing, and names the runs there are.
    """
    folder = Path(results).resolve() / notebook / run
    if not (folder / "claims.json").exists():
        there = sorted(path.parent.name for path in folder.parent.glob("*/claims.json"))
        raise FileNotFoundError(
            f"no claims in {folder}; runs of {notebook} there: {there}. Stored runs are part of "
            "mpqlib's repository, not of the installed package: work inside a checkout of it, or "
            "pass results=<its folder results>"
        )
    claims = [Claim(**claim) for claim in json.loads((folder / "claims.json").read_text())]
    return pd.read_csv(folder / "metrics.csv"), claims


def judge(metrics: pd.DataFrame, claims: Sequence[Claim]) -> Markdown:
    """The claims judged by `metrics`, as a table that a notebook shows."""
    return show_markdown(table(metrics, claims))


def show(notebook: str, run: str, results: Path = RESULTS) -> Markdown:
    """The claims of a stored run, judged, as a table that a notebook shows."""
    return judge(*stored(notebook, run, results))


def documents(claims: Sequence[Claim]) -> list[dict]:
    """The claims as claims.json holds them."""
    return [asdict(claim) for claim in claims]


def count_statuses(listed: Sequence[Listed], results: Path) -> str:
    """How many of the claims have which status, in words."""

    def found(claim: Listed) -> str:
        if claim.run is None:
            return "not tested"
        path = Path(results) / claim.notebook / claim.run / "metrics.csv"
        return assess(pd.read_csv(path), claim).status

    counts = Counter(map(found, listed))
    order = [*WORDS["paper"], *WORDS["ours"], "undecided", "not tested"]
    return ", ".join(f"{counts[way]} *{way}*" for way in order if counts[way])


def listed_cells(claim: Listed, results: Path) -> list[str]:
    """The row under HEADS of a claim that its own stored run judges."""
    row = ["", "", "", "", "", f"*not tested*: no run of {claim.notebook} judges it yet"]
    if claim.run is not None:
        run = f"{claim.notebook}/{claim.run}"
        metrics = pd.read_csv(Path(results) / run / "metrics.csv")
        link = f"[{claim.notebook[:2]} {claim.run}](results/{run})"
        old = ", earlier rules" if has_earlier_rules(Path(results) / run) else ""
        row = cells(metrics, claim, link + old)
    what = f"{claim.text}<br>Measure: {claim.measure}"
    paper = claim.place if claim.source == "ours" else f"{claim.place}<br>{claim.paper}"
    return [what, paper, *row[2:]]


INTRODUCTION = f"""\
Each claim of a paper is judged by one measure on one run: the largest there is, not chosen by its
result. The difference is arm minus base, paired by seed, with its 95% t-interval. *Reproduced*: the
interval excludes zero and the difference has the claimed sign. *Contradicted*: it excludes zero,
with the opposite sign. *Undecided*: it holds zero; the table says which effects it excludes. *Not
tested*: no run judges it yet, or there are fewer than {LEAST} seeds.

An interval is about networks that are trained or calibrated anew, and tested on new images. But all
seeds of a run are tested on the same images, or on some of the same. So the column n says how the
interval treats them. *Seeds and their images*: it counts the chance of both. *Images bounded*: the
run stores its top-1 alone, so the interval takes the largest chance of the images that this top-1
allows. *Images ignored*: the interval counts the seeds alone and is too narrow, so the claim stays
undecided. The images to train and calibrate on are those of the run in any case.

*Earlier rules*: the run was made before the training rules were those of RFQuant's release. These
runs use small networks and data sets. None was trained on ImageNet; EfficientNet-Lite0 came with
weights that others trained there. The papers' figures were taken from summaries by others and are
not yet checked against the papers.
"""


def first_page(results: Path = RESULTS) -> str:
    """The claims part of README.md: claims of the papers, then our own findings."""
    paper, ours = (
        markdown_table(HEADS, [listed_cells(claim, results) for claim in listed])
        for listed in (PAPER, FINDINGS)
    )
    paper_counts, our_counts = (count_statuses(listed, results) for listed in (PAPER, FINDINGS))
    parts = [
        f"{len(PAPER)} claims of three papers: {paper_counts}.",
        INTRODUCTION.rstrip(),
        paper,
        f"{len(FINDINGS)} findings of our own, judged alike: {our_counts}.",
        ours,
        "All rows of all runs are in [`results/README.md`](results/README.md).",
    ]
    return "\n\n".join(parts)


def run_section(folder: Path) -> str:
    """The part of results/README.md about one run: where it comes from, and its claims."""
    notebook, run = folder.parts[-2:]
    source = json.loads((folder / "provenance.json").read_text())
    commit, seeds = source["commit"] or "unknown", len(source["seeds"])
    about = (
        f"Made with mpqlib commit {commit[:7]} on {source['date'][:10]}; number of seeds: {seeds};"
    )
    about += f" [settings]({notebook}/{run}/parameters.yaml)."
    if has_earlier_rules(folder):
        about += " *Earlier training rules.*"
    lines = [f"## [{notebook} / {run}]({notebook}/{run})", about]
    if (folder / "claims.json").exists():
        lines.append(table(*stored(notebook, run, folder.parents[1])))
    else:
        lines.append("This run judges no claim.")
    return "\n\n".join(lines)


def results_page(results: Path = RESULTS) -> str:
    """The text of results/README.md: all rows of all stored runs."""
    folders = sorted(path.parent for path in Path(results).glob("*/*/provenance.json"))
    files = Path(results).glob("*/*/claims.json")
    count = sum(len(json.loads(file.read_text())) for file in files)
    head = f"""\
# Results

Written by `python -m mpqlib.report.claims` from the files beside it.

The runs below test {count} rows. Each has a 95% interval, so about one row in twenty, here about
{round(count / 20)}, would exclude zero by chance even if no arm differed from another. A single
row is weak evidence; the [first page](../README.md) judges each claim of a paper once. Training
and search may have changed since the commit that a run names."""
    return "\n\n".join([head, *map(run_section, folders)]) + "\n"


def marks(name: str) -> tuple[str, str]:
    """The comments before and after the part `name` of README.md."""
    start = f"<!-- {name}: written by python -m mpqlib.report.claims -->"
    return start, f"<!-- end of {name} -->"


def replace_part(text: str, name: str, part: str) -> str:
    """`text` with a new part between the marks of `name`; raises ValueError if it lacks them."""
    start, end = marks(name)
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    if not (rest and after):
        raise ValueError(f"the page lacks the marks {start!r} and {end!r}")
    return f"{before}{start}\n{part}\n{end}{after}"


def write(root: Path) -> None:
    """Writes results/README.md and two parts of README.md, results and claims, under `root`.

    Raises ValueError if README.md lacks the marks around these parts.
    """
    results, readme = root / "results", root / "README.md"
    text = replace_part(readme.read_text(), "results", results_table(results))
    text = replace_part(text, "claims", first_page(results))
    page = results_page(results)
    save_atomically(results / "README.md", lambda part: part.write_text(page))
    save_atomically(readme, lambda part: part.write_text(text))


def main() -> None:
    """Writes both pages."""
    parser = argparse.ArgumentParser(
        prog="python -m mpqlib.report.claims",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    root = "folder of the repository, whose README.md and results/README.md are written"
    parser.add_argument("--root", type=Path, default=RESULTS.parent, help=root)
    write(parser.parse_args().root)


if __name__ == "__main__":
    main()
