"""Runs become evidence by one command, which never replaces a larger run."""

import os
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml

from mpqlib.files import save_json
from mpqlib.report import runs, store
from mpqlib.studies.command import Command
from mpqlib.studies.parameters import open_folder
from mpqlib.training.command import main as train

PROFILES = sorted((Path(__file__).parents[2] / "notebooks" / "profiles").glob("*.yaml"))


def save(folder, seeds=3, rows=12, figures=("front",), **parameters):
    """Writes a run as a notebook does, with intermediate files and weights beside it."""
    metrics = pd.DataFrame({"seed": range(rows)})
    drawn = {name: plt.figure(figsize=(1, 1)) for name in figures}
    source = runs.provenance(range(seeds), 1.0)
    runs.save_run(folder, parameters=parameters, metrics=metrics, source=source, figures=drawn)
    plt.close("all")
    save_json(folder / "policies" / "policy-3.json", {})
    save_json(folder / "runs" / "seed0.json", {})
    (folder / "supernet.pt").touch()


def content(folder):
    """All files below a folder, with their content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folder of a run and that of a larger stored one, relative to the present folder."""
    monkeypatch.chdir(tmp_path)
    made, stored = Path("runs/05_x/small"), Path("results/05_x/small")
    save(Path("before"), seeds=100, rows=40, epochs=4, figures=("front", "old"))
    store.store_run("before", stored)
    return made, stored


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_no_profile_writes_into_the_evidence(path):
    profile, name = yaml.safe_load(path.read_text("utf-8")), path.stem
    if name[0].isdecimal():
        notebooks = [file.stem for file in PROFILES[0].parents[1].glob("*.ipynb")]
        (notebook,) = [each for each in notebooks if name.startswith(f"{each}_")]
        name = f"{notebook}/{name.removeprefix(f'{notebook}_')}"
    assert profile["output_dir"] == f"runs/{name}"


def test_a_larger_or_equal_run_takes_the_place_of_the_stored_one(folders, capsys):
    made, stored = folders
    save(made, seeds=100, rows=40, epochs=6)
    store.main([str(made), str(stored)])
    assert "python -m mpqlib.report.claims" in capsys.readouterr().out
    found = content(stored)
    names = ["front.png", "metrics.csv", "parameters.yaml", "policies/policy-3.json"]
    assert sorted(found) == [*names, "provenance.json"]
    assert all(content(made)[name] == data for name, data in found.items())
    assert [path.name for path in stored.parent.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("smaller", "message"),
    [
        ({"seeds": 6}, "seeds: 6, stored: 100"),
        ({"rows": 39}, "rows: 39, stored: 40"),
        ({"epochs": 3}, "epochs: 3, stored: 4"),
    ],
)
def test_a_larger_stored_run_is_never_replaced(folders, smaller, message, capsys):
    made, stored = folders
    save(made, **{"seeds": 100, "rows": 40, "epochs": 4} | smaller)
    before = content(stored)
    with pytest.raises(SystemExit):
        store.main([str(made), str(stored)])
    assert f"({message}). To replace it" in capsys.readouterr().err
    assert content(stored) == before
    shutil.rmtree(stored)  # git rm -r
    store.store_run(made, stored)
    assert content(stored) != before


def test_all_images_are_more_than_any_number(tmp_path):
    save(tmp_path / "all", train_images=None)
    save(tmp_path / "some", train_images=10**9)
    stored = tmp_path / "results" / "05_x" / "small"
    store.store_run(tmp_path / "all", stored)
    with pytest.raises(ValueError, match=r"train_images: 1e\+09, stored: inf"):
        store.store_run(tmp_path / "some", stored)


@pytest.mark.parametrize(
    "name", ["metrics.csv", "parameters.yaml", "provenance.json", "front.png", "rows", "damaged"]
)
def test_a_run_that_is_not_whole_is_refused(folders, name):
    made, stored = folders
    save(made, seeds=200, rows=0 if name == "rows" else 50, epochs=4)
    if name == "damaged":
        (made / "provenance.json").write_text("[]")
    elif name != "rows":
        (made / name).unlink()
    before = content(stored)
    with pytest.raises(ValueError, match="small holds no whole run"):
        store.store_run(made, stored)
    assert content(stored) == before


def test_only_a_place_of_a_run_is_taken(folders):
    made, stored = folders
    save(made, seeds=100, rows=40, epochs=4)
    for wrong in ("results/small", "elsewhere/05_x/small", "results/05_x/small/again"):
        with pytest.raises(ValueError, match=r"destination='.*' is not allowed: a folder results/"):
            store.store_run(made, wrong)
    with pytest.raises(ValueError, match="it is stored already"):
        store.store_run(stored, stored)
    (stored / "runs").mkdir()
    (stored / "runs" / "seed0.json").touch()
    with pytest.raises(ValueError, match=r"also holds \['runs/seed0.json'\]"):
        store.store_run(made, stored)


@pytest.mark.parametrize("call", [0, 1])
def test_after_an_interruption_the_stored_run_is_whole(folders, call, monkeypatch):
    made, stored = folders
    save(made, seeds=100, rows=40, epochs=4, figures=("new",))
    before, calls, rename = content(stored), [], Path.rename

    def interrupt(path, target):
        calls.append(path)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.store_run(made, stored)
    assert content(stored) == before and os.listdir(stored.parent) == ["small"]


def test_nothing_else_writes_into_a_stored_run(folders, monkeypatch):
    _, stored = folders
    before = content(stored)
    profile = Path("profile.yaml")
    profile.write_text(yaml.safe_dump({"seeds": [0], "output_dir": str(stored)}))
    for write in (
        lambda: save(stored, seeds=6),
        lambda: runs.Stopwatch(stored / "runs" / "seconds.json"),
        lambda: open_folder(str(stored)),
        lambda: Command.parse(dict, "", [str(profile), "--device", "cpu"]),
        lambda: train(["--output-dir", str(stored), "--image-size", "8", "--device", "cpu"]),
    ):
        with pytest.raises(ValueError, match=r"stored run .* such as runs/05_x/small, then store"):
            write()
    assert content(stored) == before


def test_other_folders_may_be_named_results(tmp_path):
    for name in ("results/mine", "results/05_x/seeds/mine", "my results/05_x/mine"):
        for _ in range(2):
            save(tmp_path / name)


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit):
        store.main(["--help"])
    assert "python -m mpqlib.report.store runs/10_cora/lite0" in capsys.readouterr().out
