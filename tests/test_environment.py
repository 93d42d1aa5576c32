"""The three files of pins agree, the environment follows them, and the wheel is complete."""

import re
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# One string per requirement: name==version ; marker --hash=sha256:... --hash=sha256:...
HASHED = (ROOT / ".ci" / "requirements.txt").read_text().replace("\\\n", "").splitlines()
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def pins(lines: list[str]) -> dict[str, str]:
    """Return the version of each name. Every line must be an exact pin, every name unique."""
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


def test_hashed_requirements_equal_the_constraints():
    assert pins([str(requirement) for requirement in REQUIREMENTS]) == PINNED


def test_conda_environment_equals_the_constraints():
    *conda, by_pip = ENVIRONMENT["dependencies"]
    *pinned, project = by_pip["pip"]
    assert pins(pinned) == PINNED
    assert [Requirement(line) for line in pinned] == REQUIREMENTS  # with the same markers
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
    """Return `seen` with the packages that `requirement` installs on this platform, itself too."""
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


def test_every_needed_package_is_pinned():
    seen: set[str] = set()
    for line in PYPROJECT["project"]["dependencies"] + PYPROJECT["dependency-groups"]["dev"]:
        needed(Requirement(line), seen)
    assert {name for name in seen if "[" not in name} - PINNED.keys() == set()


def test_installed_versions_equal_the_pins():
    # Not the packages that setuptools vendors and adds to the path when it is imported
    places = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    there = metadata.distributions(path=places)
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in there}
    applicable = {
        canonicalize_name(r.name) for r in REQUIREMENTS if not r.marker or r.marker.evaluate()
    }
    differing = {
        name: (installed[name], PINNED[name])
        for name in applicable & installed.keys()
        # +cpu and the like name a build of a version
        if Version(installed[name]).public != Version(PINNED[name]).public
    }
    assert differing == {}, "(installed, pinned) differ; `uv run` installs the pinned version"


@pytest.mark.parametrize(
    "path",
    ["pyproject.toml", ".ci/requirements.txt", ".ci/run", "environment.yml", WORKFLOW],
    ids=lambda path: Path(path).name,
)
def test_no_host_is_named(path):
    text = (ROOT / path).read_text()
    if path == "pyproject.toml":
        text = text[text.index("[tool.uv]") :]
    assert not re.search(r"://|index-url|find-links| @ |\bgit\+", text)
    assert not re.search(r"\b[\w-]+\.(org|com|net|io|dev|cloud|local)\b", text)


def test_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"]


def test_workflow_runs_all_checks_on_the_oldest_and_newest_python():
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["checks"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    supported = SpecifierSet(PYPROJECT["project"]["requires-python"])
    minors = [f"3.{minor}" for minor in range(50) if f"3.{minor}" in supported]
    assert job["strategy"]["matrix"]["python"] == [minors[0], minors[-1]]


def test_wheel_holds_every_module_and_no_other_file(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mpqlib").rglob("*.py")}
    assert packed == modules
