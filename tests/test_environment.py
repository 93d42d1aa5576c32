"""The pins: three files that say the same, and an environment that obeys them."""

import re
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# One string per requirement: name==version ; marker --hash=sha256:... --hash=sha256:...
HASHED = (ROOT / ".ci" / "requirements.txt").read_text().replace("\\\n", "").splitlines()
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def pins(lines: list[str]) -> dict[str, str]:
    """Version by name; fails where a line is not an exact pin or a name comes twice."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, line
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = specifier.version
    return found


REQUIREMENTS = [Requirement(line.partition("--hash=")[0]) for line in HASHED]
PINNED = pins(PYPROJECT["tool"]["uv"]["constraint-dependencies"])
DIRECT = [
    Requirement(line)
    for lines in (
        PYPROJECT["project"]["dependencies"],
        *PYPROJECT["project"]["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    )
    for line in lines
]


def test_hashed_requirements_are_the_constraints():
    assert pins([str(requirement) for requirement in REQUIREMENTS]) == PINNED


def test_conda_environment_is_the_constraints():
    *conda, by_pip = ENVIRONMENT["dependencies"]
    *pinned, project = by_pip["pip"]
    assert pins(pinned) == PINNED
    assert [Requirement(line) for line in pinned] == REQUIREMENTS  # the same markers, too
    assert project == "-e ."
    assert conda == ["python=3.11", "pip"] and ENVIRONMENT["channels"] == ["conda-forge"]


def test_build_constraints_are_among_the_constraints():
    build = pins(PYPROJECT["tool"]["uv"]["build-constraint-dependencies"])
    assert build.items() <= PINNED.items()
    assert {"hatchling", "uv"} <= build.keys()


def test_every_requirement_has_hashes():
    for line in HASHED:
        pin, *hashes = line.split("--hash=")
        assert hashes, pin
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each.strip()) for each in hashes), pin


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_direct_dependency_is_pinned_within_its_bounds(requirement):
    version = PINNED[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def needed(requirement: Requirement, seen: set[str]) -> set[str]:
    """Names of the installed packages that `requirement` leads to on this platform, itself too."""
    name = canonicalize_name(requirement.name)
    keys = {f"{name}[{extra}]" for extra in requirement.extras} | {name}
    if keys <= seen:
        return seen
    seen |= keys
    for line in metadata.requires(name) or []:
        further = Requirement(line)
        extras = requirement.extras | {""}
        if not further.marker or any(further.marker.evaluate({"extra": e}) for e in extras):
            needed(further, seen)
    return seen


def test_everything_that_is_needed_is_pinned():
    seen: set[str] = set()
    for line in PYPROJECT["project"]["dependencies"] + PYPROJECT["dependency-groups"]["dev"]:
        needed(Requirement(line), seen)
    assert {name for name in seen if "[" not in name} - PINNED.keys() == set()


def test_installed_versions_are_the_pins():
    # Not what setuptools brings along and puts on the path when it is imported.
    places = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    there = metadata.distributions(path=places)
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in there}
    applicable = {
        canonicalize_name(r.name) for r in REQUIREMENTS if not r.marker or r.marker.evaluate()
    }
    differing = {
        name: (installed[name], PINNED[name])
        for name in applicable & installed.keys()
        # +cpu and the like name a build, not a version
        if Version(installed[name]).public != Version(PINNED[name]).public
    }
    assert differing == {}, "(installed, pinned): `uv run` installs what is pinned"


@pytest.mark.parametrize("path", ["pyproject.toml", ".ci/requirements.txt", "environment.yml"])
def test_pins_name_no_host(path):
    text = (ROOT / path).read_text()
    if path == "pyproject.toml":
        text = text[text.index("[tool.uv]") :]
    assert not re.search(r"://|index-url|find-links| @ |\bgit\+", text)
    assert not re.search(r"\b[\w-]+\.(org|com|net|io|dev|cloud|local)\b", text)


def test_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"]
