"""Rules for imports, names and docstrings in mpqlib, and for the form of a notebook."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A wing may import the ground floor and the wings before it. Inside a wing, a module may import the
# modules before it.
GROUND = ["files", "data", "models"]  # import no module of mpqlib
WINGS = {
    "network": [
        "compilation",
        "quantizer",
        "bits",
        "layers",
        "tracing",
        "observation",
        "supernet",
        "classifier",
        "cost",
        "width",
    ],
    "training": [
        "scheduler",
        "distortion",
        "speed",
        "step",
        "optimization",
        "evaluation",
        "calibration",
        "distributed",
        "loop",
        "command",
        "__main__",
    ],
    "search": [
        "error",
        "limits",
        "moves",
        "greedy",
        "baselines",
        "sensitivity",
        "assignment",
        "proxies",
    ],
    "report": [
        "intervals",
        "tables",
        "runs",
        "store",
        "policy",
        "paper",
        "results",
        "claims",
        "plots",
    ],
    "studies": [
        "parameters",
        "train",
        "interference",
        "latent_distance",
        "idm_density",
        "arms",
        "processes",
        "command",
        "scheduler_ablation",
        "retraining",
        "one_bitwidth",
        "search",
        "transfer",
        "imagenet",
        "adapters",
        "ranks",
        "cora",
        "benchmark",
    ],
}
ORDER = GROUND + [f"{wing}.{room}" for wing, rooms in WINGS.items() for room in rooms]

MODULES = sorted(path for path in (ROOT / "mpqlib").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def module_name(path: Path) -> str:
    """Return a module's name inside mpqlib, such as "network.bits", or "network" for a package."""
    parts = path.relative_to(ROOT / "mpqlib").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: module_name(path) or "top")


def allowed(module: str) -> set[str]:
    """Return the modules of mpqlib that `module` may import."""
    return set() if module in GROUND else set(ORDER[: ORDER.index(module)])


def own_imports(tree: ast.AST, module: str = "") -> set[str]:
    """Return the modules and names of mpqlib that `tree` imports, also inside functions.

    `tree`: parsed source of `module`. `module`: name inside mpqlib; relative imports start there.
    """
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["mpqlib", *module.split(".")][: -node.level] if node.level else []
            base += [node.module] if node.module else []
            names += [".".join([*base, alias.name]) for alias in node.names]
    return {name.partition(".")[2] for name in names if name.partition(".")[0] == "mpqlib"}


def module_of(imported: str) -> str:
    """Return the module that holds an imported name, or "" if no module of mpqlib does."""
    while imported and imported not in ORDER:
        imported = imported.rpartition(".")[0]
    return imported


@pytest.mark.parametrize(
    "source, module, imported",
    [
        ("from .layers import Bits", "network.cost", {"network.layers.Bits"}),
        ("from . import layers", "network.cost", {"network.layers"}),
        ("from ..network.bits import Bits", "search.moves", {"network.bits.Bits"}),
        ("from .. import models", "studies.train", {"models"}),
        ("from .network import bits", "", {"network.bits"}),
        ("from mpqlib import files, data", "studies.train", {"files", "data"}),
        ("import mpqlib.files as f", "data", {"files"}),
        ("def f():\n    from mpqlib.network.bits import Bits", "data", {"network.bits.Bits"}),
        ("import torch\nfrom torch import nn", "data", set()),
    ],
)
def test_own_imports_sees_every_form(source, module, imported):
    assert own_imports(ast.parse(source), module or "__init__") == imported


def test_every_module_is_in_the_order():
    modules = {module_name(path) for path in MODULES if path.name != "__init__.py"}
    assert modules == set(ORDER)


@each_module
def test_module_imports_only_what_it_may(path):
    if path.name == "__init__.py":
        return  # a package may export all of its modules
    module = module_name(path)
    imported = {name: module_of(name) for name in own_imports(ast.parse(path.read_text()), module)}
    assert all(imported.values()), f"imports of no known module: {imported}"
    assert set(imported.values()) - allowed(module) == set()


@each_module
def test_public_names_have_docstrings(path):
    tree, missing = ast.parse(path.read_text()), []
    module = importlib.import_module(f"mpqlib.{module_name(path)}".rstrip("."))
    if not ast.get_docstring(tree):
        missing.append("the module")
    definitions = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    for node in definitions:
        if node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(node.name)
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        if isinstance(node, ast.ClassDef):
            # A method that overrides another, such as `forward`, inherits its docstring.
            missing += [
                f"{node.name}.{method.name}"
                for method in methods
                if not method.name.startswith("_")
                and not inspect.getdoc(getattr(getattr(module, node.name), method.name))
            ]
    assert missing == []


def public_names(path: Path) -> list[str]:
    """Return the public functions, classes and constants that the module at `path` defines."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def test_public_name_means_one_thing():
    modules = defaultdict(list)
    for path in MODULES:
        for name in public_names(path):
            modules[name].append(module_name(path))
    modules.pop("main", None)  # each command has its own
    assert {name: places for name, places in modules.items() if len(places) > 1} == {}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CITATION.cff"])
def test_documents_name_only_what_exists(document):
    content = (ROOT / document).read_text()
    for name in re.findall(r"\bmpqlib(?:\.[A-Za-z_]\w*)+", content):
        pkgutil.resolve_name(name)  # raises an error for an unknown name
    paths = re.findall(r"\b(?:mpqlib|tests|notebooks|results)/[\w./-]*\w", content)
    placeholders = {"mpqlib/studies/x.py", "tests/studies/test_x.py", "notebooks/NN_x.ipynb"}
    assert [path for path in paths if not (ROOT / path).exists() and path not in placeholders] == []


def test_main_notebook_exists():
    assert (ROOT / "notebooks" / "03_train.ipynb").is_file()


def text(cell: dict) -> str:
    """Return the source of a cell as one string; the file may hold a list of lines."""
    return "".join(cell["source"]).strip()


def cells(path: Path, kind: str) -> list[dict]:
    """Return the cells of a kind, "code" or "markdown", that are not empty."""
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind and text(cell)]


def parsed(cell: dict) -> ast.Module:
    """Return the syntax tree of a code cell, without Jupyter's % and ! lines."""
    lines = text(cell).splitlines()
    return ast.parse("\n".join("" if line.lstrip()[:1] in ("%", "!") else line for line in lines))


@each_notebook
def test_parameters_are_one_cell_of_commented_literals(path):
    tagged = [
        cell
        for cell in cells(path, "code")
        if "parameters" in cell["metadata"].get("tags", [])
        or "injected-parameters" in cell["metadata"].get("tags", [])
    ]
    (cell,) = tagged
    lines = text(cell).splitlines()
    for statement in parsed(cell).body:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), ast.unparse(statement)
        ast.literal_eval(statement.value)
        above = lines[statement.lineno - 2].strip() if statement.lineno > 1 else ""
        beside = "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
        assert above.startswith("#") or "#" in beside, f"no comment: {ast.unparse(statement)}"


@each_notebook
def test_notebook_is_thin(path):
    lengths = [len(text(cell).splitlines()) for cell in cells(path, "code")]
    assert statistics.median(lengths) <= 6
    assert max(lengths) <= 20
    nodes = [node for cell in cells(path, "code") for node in ast.walk(parsed(cell))]
    assert not [node.name for node in nodes if isinstance(node, ast.ClassDef)]


@each_notebook
def test_notebook_has_as_much_prose_as_code(path):
    prose, code = (sum(len(text(c)) for c in cells(path, kind)) for kind in ("markdown", "code"))
    assert prose >= code


@each_notebook
def test_prose_holds_no_angle_brackets_that_vanish(path):
    for cell in cells(path, "markdown"):
        prose = re.sub(r"`[^`]*`", "", text(cell))
        assert not re.findall(r"<[^>\n]*>", prose), "HTML: write it between backticks"


@each_notebook
def test_notebook_is_stored_as_it_ran(path):
    code = cells(path, "code")
    # It ran once, from top to bottom, in a fresh kernel
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert kinds and "error" not in kinds
    # The tag nbval-ignore-output is allowed, but every cell must run
    assert not re.search("nbval[-_]skip|raises[-_]exception", path.read_text(), re.IGNORECASE)
    # A last ";" hides no output under nbval; use `plt.show()` instead
    assert not [text(cell) for cell in code if text(cell).endswith(";")]
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
