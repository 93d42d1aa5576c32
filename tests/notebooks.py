"""Run the code cells of a notebook with other parameters, up to its first long work."""

import json
from pathlib import Path

from IPython.display import display

from mpqlib.studies import benchmark, idm_density, interference
from mpqlib.training import loop

FOLDER = Path(__file__).parents[1] / "notebooks"
# What takes long in a notebook: module and function.
LONG = [
    (loop, "train_epoch"),
    (interference, "descend"),
    (idm_density, "outputs_alone"),
    (benchmark, "ratios"),
    (benchmark, "seconds"),
]


class LongWorkError(BaseException):
    """The notebook accepted its parameters and started to work."""


def begin(*_, **__):
    raise LongWorkError


def code_cells(name):
    """Source and tags of the code cells of a notebook."""
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))["cells"]
    return [
        ("".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def default_parameters(name):
    """The parameters of a notebook and their default values."""
    values = {}
    (source,) = [source for source, tags in code_cells(name) if "parameters" in tags]
    exec(source, values)
    values.pop("__builtins__")
    return values


def run(name, parameters):
    """Run a notebook with these parameters, as papermill would, up to its first long work."""
    names = {"display": display, "__name__": "__main__"}
    for source, tags in code_cells(name):
        exec(compile(source, name, "exec"), names)
        if "parameters" in tags:
            names |= parameters
