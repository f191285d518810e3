"""Imports point down one list of layers, without a circle; and what answers --help at once imports no torch."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# From the bottom up; a module may import those of lower layers and of its own package.
LAYERS = (
    ("errors", "types", "metrics"),
    ("utils",),
    ("config",),
    ("data",),
    ("models",),
    ("losses",),
    ("compress",),
    ("runs",),
    ("teachers", "report"),
    ("training",),
    ("export",),
    ("study", "bench", "predict"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
LARGEST = 18  # entries in kd/, __init__.py among them

WITHOUT_TORCH = (
    "kd",
    "kd.config",
    "kd.errors",
    "kd.utils.system",
    "kd.utils.images",
    "kd.utils.console",
    "kd.study.__main__",
    "kd.bench.__main__",
    "kd.export.__main__",
    "kd.export.onnx_runtime",
    "kd.predict",
    "train_teacher",
    "distill_student",
)


def modules() -> dict[str, ast.Module]:
    """Every module of kd by its dotted name."""
    found = {}
    for path in sorted((ROOT / "kd").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imported(tree: ast.AST) -> set[str]:
    """The modules of kd that `tree` imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (whole & MODULES.keys()) or {node.module}
    return {name for name in names if name.split(".")[0] == "kd"}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_point_down():
    wrong = []
    for module, tree in MODULES.items():
        if module == "kd":  # kd.load, whose one import waits until it is called
            continue
        for target in imported(tree):
            same = room(target) == room(module)
            if not same and (target == "kd" or RANK[room(target)] >= RANK[room(module)]):
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_no_module_imports_itself_in_a_circle():
    graph = {module: imported(tree) - {module} for module, tree in MODULES.items()}
    for package in graph:  # a package's face hands on what its modules define; they may import the package's others
        graph[package] = {target for target in graph[package] if not package.startswith(f"{target}.")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_nothing_imports_a_script():
    for module, tree in MODULES.items():
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {"train_teacher", "distill_student"}, module


def test_the_top_level_tells_what_the_thing_is():
    entries = sorted(path.name for path in (ROOT / "kd").iterdir() if path.name != "__pycache__")
    assert len(entries) <= LARGEST, entries
    assert {entry.removesuffix(".py") for entry in entries} == {"__init__", *RANK}


def test_a_loss_imports_no_model_and_a_model_no_loss():
    for module, tree in MODULES.items():
        targets = {target for target in imported(tree) if room(target) != room(module)}
        if room(module) == "models":
            assert not any(room(target) == "losses" for target in targets), module
        if room(module) == "losses":
            assert {target for target in targets if room(target) == "models"} <= {"kd.models.features"}, module


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
