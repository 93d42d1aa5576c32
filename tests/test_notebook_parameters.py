"""A wrong parameter of a notebook is named before any long work."""

import json
import math
import random
from pathlib import Path

import IPython
import pytest
import yaml
from IPython.display import display
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from mpqlib.studies import benchmark, idm_density, interference
from mpqlib.studies.parameters import check_parameters
from mpqlib.training import loop

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# What takes long in a notebook: module and function.
LONG_WORK = [
    (interference, "descend"),
    (loop, "train_epoch"),
    (idm_density, "outputs_alone"),
    (benchmark, "ratios"),
    (benchmark, "seconds"),
]
# Values that no parameter with a default of this type allows.
WRONG = {
    bool: [None, "true", 1, 0, [], math.nan],
    int: [None, "8", -1, math.nan, math.inf, True, 2.5, [], 10**30],
    float: [None, "0.5", -1.0, math.nan, math.inf, True, [], 1e300],
    str: [None, 3, ["a"], "", True],
    type(None): ["8", -1, 0, math.nan, True, {}],
    list: [None, "[2, 4]", 3, {}, [None], [-1], [math.nan], [[1]]],
    dict: [None, [], "{}", 3, {1: 2}],
}
PATHS = {"data_root", "checkpoint", "supernets"}  # text, even where the default is None
UNNAMED = {"09_one_bitwidth", "10_cora"}  # they name a part of their parameters only


def code_cells(path):
    """Source and tags of the code cells of a notebook."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]


def default_parameters(path):
    """The parameters of a notebook, with their default values."""
    (source,) = [source for source, tags in code_cells(path) if "parameters" in tags]
    exec(source, {}, values := {})
    return values


def run(path, parameters):
    """Runs the code cells of a notebook with these parameters, as papermill would."""
    names = {"display": display, "__name__": "__main__"}
    for source, tags in code_cells(path):
        exec(compile(source, path.name, "exec"), names)
        if "parameters" in tags:
            names |= parameters


CASES = [
    pytest.param(path, name, default, id=f"{path.stem[:2]}-{name}")
    for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    for name, default in default_parameters(path).items()
    if path.stem not in UNNAMED
]


@pytest.mark.parametrize(("path", "name", "default"), CASES)
def test_a_wrong_parameter_is_named_before_any_long_work(
    path, name, default, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for module, function in LONG_WORK:
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("started to work"))
    named = "arm" if name == "arms" else rf"\b{name}\b"  # one of the arms
    drawn = random.Random(f"{path.stem} {name}")
    kind = str if name in PATHS else type(default)
    wrong = [value for value in WRONG[kind] if value is not default]
    for value in drawn.sample(wrong, 2):
        with pytest.raises((TypeError, ValueError), match=rf"{named}.*not (allowed|available)"):
            run(path, {name: value})


class Shell:
    """Stands for the kernel of a notebook: remembers the cells that ran."""

    def __init__(self, *cells):
        self.user_ns = {"In": ["", *cells]}


def cells_of(path, **parameters):
    """The first cells that papermill runs of a notebook with these parameters."""
    found = parameterize_notebook(load_notebook_node(str(path)), parameters)
    code = [cell.source for cell in found.cells if cell.cell_type == "code"]
    (number,) = [i for i, cell in enumerate(code) if cell.startswith("# Parameters")]
    return code[: number + 1]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem[:2])
def test_a_parameter_that_a_notebook_does_not_have_is_named(path, monkeypatch):
    known = default_parameters(path)
    for unknown in ("bitop", "Seeds"):
        shell = Shell(*cells_of(path, **known | {unknown: [3, 4]}))
        monkeypatch.setattr(IPython, "get_ipython", lambda shell=shell: shell)
        with pytest.raises(TypeError, match=rf"unknown parameters \['{unknown}'\]: .*'output_dir'"):
            check_parameters()
    for shell in Shell(*cells_of(path, **known)), Shell("import mpqlib"), None:
        monkeypatch.setattr(IPython, "get_ipython", lambda shell=shell: shell)
        check_parameters()


def test_a_notebook_without_a_cell_of_parameters_takes_any(monkeypatch):
    monkeypatch.setattr(IPython, "get_ipython", lambda: Shell("# Parameters\nseed = 3\n", "x = 2"))
    check_parameters(seed=3)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem[:2])
def test_every_notebook_checks_its_parameters_at_its_start(path):
    start = " ".join(source for source, _ in code_cells(path)[1:5])
    assert "open_folder(" in start or "Setting(" in start


def profiles():
    """Profiles for papermill, with the notebook that each names in its first line."""
    for path in sorted(NOTEBOOKS.glob("profiles/*.yaml")):
        first = path.read_text("utf-8").splitlines()[0].split()
        if "papermill" in first:
            yield pytest.param(path, NOTEBOOKS.parent / first[2], id=path.stem)


@pytest.mark.parametrize(("path", "notebook"), list(profiles()))
def test_a_profile_sets_parameters_of_its_notebook(path, notebook):
    given = yaml.safe_load(path.read_text("utf-8"))
    assert given and given.keys() <= default_parameters(notebook).keys()
