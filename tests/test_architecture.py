"""The house rules: who may import whom, how long code may get, what a notebook looks like."""

import ast
import importlib
import inspect
import io
import json
import re
import statistics
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module may import only from its left; what `training` and `search` are
# made of stands right before them (`checkpoint` to `evaluation`; `incremental` and `moves`).
LINE = [
    "quantizer",
    "layers",
    "supernet",
    "cost",
    "scheduler",
    "distortion",
    "checkpoint",
    "one_shot",
    "optimization",
    "evaluation",
    "training",
    "incremental",
    "moves",
    "search",
    "deploy",
    "report",
]
PICTURES = ["plots"]  # beside the line, which needs none: for notebooks and studies
LEAVES = ["data", "models"]  # import nothing of ours
STUDIES = [
    "comparison",
    "regression",
    "probes",
    "ablation",
    "fronts",
    "rules",
    "cora",
    "width",
    "benchmark",
    "claims",
]  # beside the line: imported by nobody

MODULES = sorted((ROOT / "mpqlib").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def allowed(module: str) -> set[str]:
    """Modules of mpqlib that `module` may import."""
    if module in LEAVES:
        return set()
    if module in PICTURES:
        return {*LINE}
    if module in STUDIES:
        return {*LINE, *LEAVES, *PICTURES}
    if module in LINE:
        return {*LINE[: LINE.index(module)], *LEAVES}
    raise ValueError(f"{module} has no place in LINE, LEAVES, PICTURES or STUDIES")


def own_imports(tree: ast.AST) -> set[str]:
    """Modules of mpqlib that `tree` imports at any depth; "" for the package itself."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "mpqlib" if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            package = base == "mpqlib"
            names += [f"{base}.{alias.name}" for alias in node.names] if package else [base]
    return {name.partition(".")[2] for name in names if name.partition(".")[0] == "mpqlib"}


@pytest.mark.parametrize(
    "source, modules",
    [
        ("from .layers import Bits", {"layers"}),
        ("from . import layers", {"layers"}),
        ("from mpqlib import layers, cost", {"layers", "cost"}),
        ("import mpqlib.layers as l", {"layers"}),
        ("import mpqlib", {""}),
        ("def f():\n    from mpqlib.layers import Bits", {"layers"}),
        ("import torch\nfrom torch import nn", set()),
    ],
)
def test_own_imports_sees_every_form(source, modules):
    assert own_imports(ast.parse(source)) == modules


@each_module
def test_module_imports_only_what_it_may(path):
    imports = own_imports(ast.parse(path.read_text()))
    known = {module.stem for module in MODULES}
    assert imports <= known, f"{imports - known} is no module of mpqlib"
    if path.stem != "__init__":
        assert imports - allowed(path.stem) == set()


def length(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text().splitlines())


@each_module
def test_module_is_short(path):
    assert length(path) <= 250


def code_lines(path: Path) -> int:
    """Lines of a module that hold code: no blank ones, comments or docstrings."""
    source, lines = path.read_text(), set()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_core_line_is_short():
    lengths = {m.stem: code_lines(m) for m in MODULES if m.stem in LINE}
    assert sum(lengths.values()) < 1200, lengths


@each_module
def test_functions_need_no_scrolling(path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


@each_module
def test_public_names_have_docstrings(path):
    tree, missing = ast.parse(path.read_text()), []
    module = importlib.import_module("mpqlib" if path.stem == "__init__" else f"mpqlib.{path.stem}")
    if path.stem != "__init__" and not ast.get_docstring(tree):
        missing.append("the module")
    definitions = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    for node in definitions:
        if node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(node.name)
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        if isinstance(node, ast.ClassDef):
            # A method that overrides another (`forward`) has the docstring of that one.
            missing += [
                f"{node.name}.{method.name}"
                for method in methods
                if not method.name.startswith("_")
                and not inspect.getdoc(getattr(getattr(module, node.name), method.name))
            ]
    assert missing == []


def test_main_notebook_exists():
    assert (ROOT / "notebooks" / "03_train.ipynb").is_file()


def text(cell: dict) -> str:
    """Source of a cell as one string; a notebook file may hold it as a list of lines."""
    return "".join(cell["source"]).strip()


def cells(path: Path, kind: str) -> list[dict]:
    """The cells of a kind ("code", "markdown") that are not empty."""
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind and text(cell)]


def parsed(cell: dict) -> ast.Module:
    """Syntax tree of a code cell, Jupyter's own % and ! lines blanked."""
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
def test_notebook_is_stored_as_it_ran(path):
    code = cells(path, "code")
    # Run once, from top to bottom, in a fresh kernel
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert kinds and "error" not in kinds
    # A cell's output may go uncompared (tag nbval-ignore-output), but no cell goes unrun
    assert not re.search("nbval[-_]skip|raises[-_]exception", path.read_text(), re.IGNORECASE)
    # nbval keeps no history, so that a last ";" hides nothing there: end in `plt.show()` instead
    assert not [text(cell) for cell in code if text(cell).endswith(";")]
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
