"""Imports point downward only, form no circle, and the command line needs no torch to say what it can do."""

import ast
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import potstill

ROOT = Path(potstill.__file__).parent
# From the ground up. A floor may import from itself and from those below. `methods` alone is methods/__init__.py, the
# decorator that run.py knows; `methods.*` are the papers.
FLOORS = [
    {"contracts", "assets", "catalogue"},
    {"divergences"},
    {"noise", "models", "serving"},
    {"rollouts", "evaluation"},
    {"weighting", "teachers", "tasks"},
    {"objectives"},
    {"training", "methods"},
    {"run"},
    {"methods.*"},
    {"recipe"},
    {"advisor", "verify", "use", "dry_run"},
    {"report", "export", "show"},
    {"cli"},
]
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}


def room(module: str) -> str:
    """The part of the house that a module is in: the first name below potstill."""
    parts = module.split(".")[1:]
    return "methods.*" if parts[0] == "methods" and len(parts) > 1 else parts[0]


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["potstill", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, module: str, known: frozenset[str], package: bool = False) -> set[str]:
    """The potstill modules that a source imports anywhere: at the top, inside functions, for types only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -(node.level - package) or None]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in known else base for name in names}
    return {name for name in found if name.startswith("potstill.")}


@cache
def graph() -> dict[str, set[str]]:
    known = frozenset(modules())
    return {
        name: imports(path.read_text(), name, known, package=path.name == "__init__.py") - {name}
        for name, path in modules().items()
    }


def upward(edges: dict[str, set[str]]) -> list[str]:
    """The imports that run up the floors, in words."""
    found = []
    for name, targets in edges.items():
        if name == "potstill":
            found += [f"potstill/__init__.py imports {target}" for target in targets]
            continue
        for target in sorted(targets):
            if HEIGHT[room(target)] > HEIGHT[room(name)]:
                found.append(f"{name} imports {target}, which is above it")
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One circle of imports, or nothing. Importing a module runs its packages' __init__ too, but those of its own
    packages are already on their way: they are no new step."""
    steps = {}
    for name, targets in edges.items():
        reached = {target.rsplit(".", i)[0] for target in targets for i in range(target.count("."))}
        steps[name] = {t for t in reached if t != "potstill" and t != name and not name.startswith(t + ".")}
    try:
        graphlib.TopologicalSorter(steps).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_module_has_its_floor():
    homeless = [name for name in modules() if name != "potstill" and room(name) not in HEIGHT]
    assert not homeless, f"give these a floor in docs/design.md and here: {homeless}"


def test_imports_point_downward():
    assert upward(graph()) == []


def test_no_circles():
    assert circle(graph()) == []


def test_the_rules_can_fail():
    known = frozenset({"potstill.run", "potstill.models.ema", "potstill.models"})
    lazy = "def f():\n    from potstill import run\n    from . import ema\n    import torch"
    assert imports(lazy, "potstill.models.taps", known) == {"potstill.run", "potstill.models.ema"}
    assert imports("from .ema import EMA", "potstill.models", known, package=True) == {"potstill.models.ema"}
    assert imports("from potstill.run import Run", "potstill.cli", known) == {"potstill.run"}
    assert upward({"potstill.models.taps": {"potstill.run"}}) == [
        "potstill.models.taps imports potstill.run, which is above it"
    ]
    assert upward({"potstill.run": {"potstill.methods"}}) == []
    assert upward({"potstill.run": {"potstill.methods.language.gkd"}}) != []
    assert upward({"potstill": {"potstill.run"}}) != []
    assert circle({"potstill.a.x": {"potstill.b.y"}, "potstill.b.y": {"potstill.a.x"}})
    assert circle({"potstill.a": {"potstill.a.x"}, "potstill.a.x": set(), "potstill.b": {"potstill.a.x"}}) == []
    assert circle({"potstill.a": {"potstill.a.x"}, "potstill.a.x": {"potstill.b"}, "potstill.b": {"potstill.a.y"}})


@pytest.mark.parametrize("module", ["cli", "catalogue", "contracts.errors"])
def test_the_command_line_starts_without_torch(module):
    heavy = "torch", "transformers", "scipy", "matplotlib"
    code = f"import sys, potstill.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_and_the_list_of_methods():
    done = subprocess.run([sys.executable, "-m", "potstill.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("run", "resume", "evaluate", "generate", "report", "methods", "show", "verify"):
        assert command in done.stdout
    done = subprocess.run([sys.executable, "-m", "potstill.cli", "methods"], capture_output=True, text=True)
    assert done.returncode == 0 and "vopd" in done.stdout, done.stderr
