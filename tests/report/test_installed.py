"""The package outside its repository: copied into another project, without git, without IPython."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mpqlib
from mpqlib.report import runs

PACKAGE = Path(mpqlib.__file__).parent
FILE = Path("mpqlib", "report", "runs.py")
IDENTITY = ["-c", "user.name=tester", "-c", "user.email=tester@example.com"]

SCRIPT = """
import importlib, json, pkgutil, sys
sys.modules["IPython"] = None  # importing it fails
import mpqlib
for found in pkgutil.walk_packages(mpqlib.__path__, "mpqlib."):
    importlib.import_module(found.name)
from mpqlib.report import claims, runs
try:
    claims.stored("01_interference", "seeds")
except FileNotFoundError as error:
    message = str(error)
heavy = sorted({"papermill", "jupyterlab", "notebook", "nbconvert"} & set(sys.modules))
source = runs.provenance([0], 1.0)
print(json.dumps([mpqlib.__file__, source["commit"], str(claims.RESULTS), message, heavy]))
"""


def git(folder, *command):
    """Runs git in `folder`; returns what it prints."""
    done = subprocess.run(
        ["git", *IDENTITY, "-C", folder, *command], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit_all(folder):
    """Makes `folder` a repository with all its files in one commit; returns the commit."""
    git(folder, "init", "-q")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "-q", "-m", "all")
    return git(folder, "rev-parse", "HEAD")


def put_package(root, monkeypatch, project=None):
    """Puts the file of provenance into `root`, beside a pyproject of the named project."""
    (root / FILE).parent.mkdir(parents=True)
    (root / FILE).write_text("")
    if project:
        (root / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
    monkeypatch.setattr(runs, "__file__", str(root / FILE))


def test_installed_in_another_project_nothing_of_that_project_is_recorded(tmp_path):
    site = tmp_path / "other" / ".venv" / "lib" / "site-packages"
    shutil.copytree(PACKAGE, site / "mpqlib", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "other" / "pyproject.toml").write_text('[project]\nname = "other"\n')
    commit_all(tmp_path / "other")
    environment = os.environ | {"PYTHONPATH": str(site), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path / "other",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    file, commit, results, message, heavy = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(site)
    assert commit is None
    assert results == "results"  # of the current folder, not beside the package
    assert str(tmp_path / "other" / "results") in message
    assert "part of mpqlib's repository" in message
    assert heavy == []


def test_the_commit_is_that_of_the_own_repository(tmp_path, monkeypatch):
    put_package(tmp_path, monkeypatch, "mpqlib")
    assert runs.own_commit() is None  # not a repository
    commit = commit_all(tmp_path)
    assert runs.own_commit() == commit


@pytest.mark.parametrize("project", ["other", None])
def test_the_commit_of_a_project_that_holds_a_copy_is_not_recorded(tmp_path, monkeypatch, project):
    put_package(tmp_path, monkeypatch, project)
    commit_all(tmp_path)
    assert runs.own_commit() is None


def test_the_commit_of_a_repository_around_a_copy_of_the_project_is_not_recorded(
    tmp_path, monkeypatch
):
    put_package(tmp_path / "third_party", monkeypatch, "mpqlib")
    commit_all(tmp_path)
    assert runs.own_commit() is None


def test_a_package_that_is_not_tracked_has_no_commit(tmp_path, monkeypatch):
    site = tmp_path / ".venv" / "site-packages"
    put_package(site, monkeypatch)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mpqlib"\n')
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "pyproject.toml", ".gitignore")
    git(tmp_path, "commit", "-q", "-m", "all")
    assert runs.own_commit() is None


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    put_package(tmp_path, monkeypatch, "mpqlib")
    commit_all(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.own_commit() is None


def test_a_package_that_is_not_installed_has_no_version():
    assert runs.installed_version("no-such-package-of-ours") is None
    versions = runs.provenance([0], 1.0)["versions"]
    assert versions.keys() == {"python", *runs.PACKAGES}


def test_the_checkout_is_found_from_any_folder_within(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mpqlib"\n')
    inner = tmp_path / "notebooks" / "deep"
    inner.mkdir(parents=True)
    assert runs.checkout(inner) == tmp_path.resolve()
    (inner / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert runs.checkout(inner) == tmp_path.resolve()
