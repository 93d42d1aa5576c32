"""Stores a finished run as evidence, such as runs/10_cora/lite0 as results/10_cora/lite0.

    python -m mpqlib.report.store runs/10_cora/lite0 results/10_cora/lite0

Notebooks and commands write to runs/. This command alone writes a run into results/. It copies the
tables, documents and figures, not the weights, and not the intermediate files in the run's own
folder runs/. It refuses a run that is not whole. It replaces an earlier run, unless that one is
larger: it has more seeds or more rows, or was made with more images or epochs.
"""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import yaml

from ..files import stored_run

STORED_KINDS = {".csv", ".json", ".yaml", ".png"}  # of files that are stored


def run_size(folder: Path) -> dict[str, float]:
    """The number of seeds and of rows of a run, and all its numbers of images and epochs.

    Those of images and epochs are the entries of parameters.yaml whose names end so; None, which
    means all images, counts as infinite. Raises ValueError if the run has no metrics.csv,
    parameters.yaml or provenance.json that can be read.
    """
    try:
        rows = len(pd.read_csv(folder / "metrics.csv"))
        parameters = yaml.safe_load((folder / "parameters.yaml").read_text("utf-8"))
        seeds = len(json.loads((folder / "provenance.json").read_text("utf-8"))["seeds"])
        counts = {n: v for n, v in parameters.items() if n.endswith(("images", "epochs"))}
        counts = {name: math.inf if v is None else float(v) for name, v in counts.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{folder} holds no whole run: {error}") from error
    return {"seeds": seeds, "rows": rows} | counts


def check_whole(folder: Path) -> None:
    """Raises ValueError if a run lacks one of its files, or has no rows."""
    if run_size(folder)["rows"] == 0:
        raise ValueError(f"{folder} holds no whole run: metrics.csv has no rows")
    source = json.loads((folder / "provenance.json").read_text("utf-8"))
    figures = [f"{name}.png" for name in source.get("figures", [])]
    if missing := [name for name in figures if not (folder / name).is_file()]:
        raise ValueError(f"{folder} holds no whole run: {missing} are missing")


def run_files(folder: Path) -> list[Path]:
    """The files of a run that are stored, relative to its folder."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    own = [file for file in files if file.parts[0] != "runs" and file.suffix in STORED_KINDS]
    return [file for file in own if not any(part.startswith(".") for part in file.parts)]


def check_replacement(source: Path, destination: Path) -> None:
    """Raises ValueError if `destination` holds a larger run than `source`, or other files.

    Larger: one of the numbers of `run_size` that both runs have is larger.
    """
    new, old = run_size(source), run_size(destination)
    smaller = [name for name in old if name in new and new[name] < old[name]]
    if smaller:
        listed = "; ".join(f"{name}: {new[name]:g}, stored: {old[name]:g}" for name in smaller)
        raise ValueError(
            f"{source} is smaller than the run in {destination} ({listed}). To replace it all the "
            f"same, remove it first: git rm -r {destination}"
        )
    files = {path.relative_to(destination) for path in destination.rglob("*") if path.is_file()}
    if others := sorted(map(str, files - set(run_files(destination)))):
        raise ValueError(f"{destination} also holds {others[:3]}: move what is not of the run")


def store_run(source: str | Path, destination: str | Path) -> None:
    """Copies the run in the folder `source` to `destination`, as results/<notebook>/<run>.

    Replaces an earlier run there, unless it is larger (see `check_replacement`). Raises ValueError
    for a run that is not whole, for another destination, and if a file cannot be written; an
    earlier run is then whole.
    """
    source, destination = Path(source), Path(destination)
    if [parent.name for parent in destination.resolve().parents][1:2] != ["results"]:
        where = "a folder results/<notebook>/<run>"
        raise ValueError(f"destination={str(destination)!r} is not allowed: {where}")
    if stored_run(source):
        raise ValueError(f"source={str(source)!r} is not allowed: it is stored already")
    check_whole(source)
    if destination.exists():
        check_replacement(source, destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=destination.parent, prefix=".store-") as workspace:
            _replace_folder(source, destination, Path(workspace))
    except OSError as error:
        raise ValueError(f"{destination} cannot be written: {error}") from error


def _replace_folder(source: Path, destination: Path, workspace: Path) -> None:
    """Copies the files of a run into `workspace`, on the same disk, then moves them all at once."""
    new, old = workspace / "new", workspace / "old"
    for file in run_files(source):
        (new / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, new / file)
    try:
        if destination.exists():
            destination.rename(old)
        new.rename(destination)
    finally:  # also after an interruption
        if old.exists() and not destination.exists():
            old.rename(destination)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m mpqlib.report.store",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder that a notebook or command wrote to")
    parser.add_argument("destination", type=Path, help="folder results/<notebook>/<run>")
    given = parser.parse_args(arguments)
    try:
        store_run(given.source, given.destination)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{given.destination} holds the run. To judge claims by it:\npython -m mpqlib.report.claims"
    )


if __name__ == "__main__":
    main()
