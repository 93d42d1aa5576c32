"""Claims of the paper and what stored seeds say of them: `python -m mpqlib.report.claims`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from IPython.display import Markdown

from ..files import save_atomically
from .intervals import t_interval

RESULTS = Path(__file__).resolve().parents[2] / "results"
LEAST = 5  # units, such as seeds, below which a claim has no status
HEADS = "claim", "measured", "paired difference [95%]", "n", "paper", "status"
START, END = "<!-- claims: written by python -m mpqlib.report.claims -->", "<!-- end of claims -->"


@dataclass(frozen=True)
class Claim:
    """That one arm's value differs from another's in a stated direction.

    `value`: column of the metrics; `arm`, `base`: two entries of its column `arm`; `sign`: of the
    difference, +1 or -1; `unit`: the column whose entries are paired, each averaged first, such as
    `seed`; `where`: rows that count, by column and entry; `paper`: the figure to compare with.
    """

    text: str
    value: str
    arm: str
    base: str
    sign: int
    paper: str = "no figure"
    unit: str = "seed"
    where: Mapping[str, str | int | float] = field(default_factory=dict)


class Assessment(NamedTuple):
    """Means of both arms, their paired difference with its 95% interval, pairs, and the status."""

    arm: float
    base: float
    difference: float
    low: float
    high: float
    n: int
    status: str


def pairs(metrics: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """The two arms' values, one row per unit; raises ValueError where a unit lacks an arm."""
    for column, entry in claim.where.items():
        metrics = metrics[metrics[column] == entry]
    values = metrics.pivot_table(index=claim.unit, columns="arm", values=claim.value)
    if missing := {claim.arm, claim.base} - set(values):
        raise ValueError(f"no rows of arm {sorted(missing)} for the claim {claim.text!r}")
    values = values[[claim.arm, claim.base]]
    if (lacking := values.index[values.isna().any(axis=1)]).size:
        raise ValueError(f"{claim.unit} {list(lacking)} lacks an arm of the claim {claim.text!r}")
    return values


def status(difference: float, low: float, high: float, n: int, sign: int) -> str:
    """*reproduced*: the claimed sign, and the interval excludes zero; *direction only*: the sign;
    else *not reproduced*. Fewer than LEAST units: *not tested here*."""
    if n < LEAST:
        return "not tested here"
    if not difference * sign > 0:
        return "not reproduced"
    return "reproduced" if low * high > 0 else "direction only"


def assess(metrics: pd.DataFrame, claim: Claim) -> Assessment:
    """A claim against the metrics of a run: paired t-interval over its units (scipy)."""
    values = pairs(metrics, claim)
    differences = values[claim.arm] - values[claim.base]
    differences = differences.round(9)  # what rounding leaves of a zero is no direction
    n = len(differences)
    mean, low, high = (round(bound, 9) for bound in t_interval(differences))
    verdict = status(mean, low, high, n, claim.sign)
    return Assessment(*map(float, values.mean()), mean, low, high, n, verdict)


def differences(
    metrics: pd.DataFrame, value: str, base: str, by: str | Sequence[str]
) -> pd.DataFrame:
    """Every other arm against `base`, paired by seed: one assessment a row.

    `value`: the column that is compared. `by`: one or more columns; each combination of their
    entries is a group of its own.
    """
    by, rows = [by] if isinstance(by, str) else list(by), []
    arms = [arm for arm in metrics["arm"].unique() if arm != base]
    for entries in metrics[by].drop_duplicates().itertuples(index=False, name=None):
        where = dict(zip(by, entries, strict=True))
        for arm in arms:
            found = assess(metrics, Claim("", value, arm, base, 1, where=where))
            rows.append({"compared": arm} | where | found._asdict())
    return pd.DataFrame(rows)


def row(metrics: pd.DataFrame, claim: Claim, about: str = "") -> list[str]:
    """The cells of a claim under HEADS; figures follow an \u2248 sign, for they were measured."""
    a = assess(metrics, claim)
    unit = f"{a.n} {claim.unit}{'s' * (a.n != 1)}"
    return [
        claim.text,
        f"{claim.arm} \u2248 {a.arm:.3g}, {claim.base} \u2248 {a.base:.3g}",
        f"\u2248 {a.difference:+.2g} [{a.low:+.2g}, {a.high:+.2g}]",
        f"{unit}, {about}" if about else unit,
        claim.paper,
        f"*{a.status}*",
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under HEADS, as Markdown."""
    lines = [HEADS, ["---"] * len(HEADS), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def stored(notebook: str, run: str, results: Path = RESULTS) -> tuple[pd.DataFrame, list[Claim]]:
    """Metrics and claims of a stored run; raises FileNotFoundError, naming the runs there are."""
    folder = Path(results) / notebook / run
    if not (folder / "claims.json").exists():
        there = sorted(path.parent.name for path in folder.parent.glob("*/claims.json"))
        raise FileNotFoundError(f"no claims in {folder}; runs of {notebook}: {there}")
    claims = [Claim(**claim) for claim in json.loads((folder / "claims.json").read_text())]
    return pd.read_csv(folder / "metrics.csv"), claims


def judge(metrics: pd.DataFrame, claims: Sequence[Claim]) -> Markdown:
    """The claims against metrics at hand, as a table to read."""
    return Markdown(table([row(metrics, claim) for claim in claims]))


def show(notebook: str, run: str, results: Path = RESULTS) -> Markdown:
    """The claims of a stored run, as a table to read."""
    return judge(*stored(notebook, run, results))


def documents(claims: Sequence[Claim]) -> list[dict]:
    """What claims.json holds."""
    return [asdict(claim) for claim in claims]


def page(results: Path = RESULTS) -> str:
    """All claims of all stored runs as one table, each run linked."""
    rows = []
    for path in sorted(Path(results).glob("*/*/claims.json")):
        notebook, run = path.parts[-3:-1]
        metrics, claims = stored(notebook, run, results)
        link = f"[{notebook[:2]} {run}](results/{notebook}/{run})"
        rows += [row(metrics, claim, link) for claim in claims]
    return table(rows)


def write(root: Path) -> None:
    """Writes results/README.md, and the claims between the two marks of README.md, under `root`."""
    readme, text = root / "README.md", page(root / "results")
    head = "# Results\n\nWritten by `python -m mpqlib.report.claims` from the files beside it.\n\n"
    own = head + text.replace("](results/", "](") + "\n"
    save_atomically(root / "results" / "README.md", lambda part: part.write_text(own))
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    if not (rest and after):
        raise ValueError(f"{readme} lacks the marks {START!r} and {END!r}")
    whole = f"{before}{START}\n{text}\n{END}{after}"
    save_atomically(readme, lambda part: part.write_text(whole))


def main() -> None:
    """Writes the pages anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=RESULTS.parent, help="of the repository")
    write(parser.parse_args().root)


if __name__ == "__main__":
    main()
