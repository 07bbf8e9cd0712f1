"""The rooms of the recipes: arrows point one way, without a circle, and a recipe imports no other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[3] / "recipes"
# What a room may import beside itself: those below it, as docs/development.md draws them.
BELOW = {
    "ground": set(),
    "data": {"ground"},
    "judging": {"data", "ground"},
    "sources": {"data", "ground"},
    "runs": {"judging", "sources", "data", "ground"},
    "training": {"runs", "judging", "sources", "data", "ground"},
    "reports": {"training", "runs", "judging", "sources", "data", "ground"},
    "top": {"reports", "training", "runs", "judging", "sources", "data", "ground"},
}
TOP = {"trial", "recipe", "sweep", "tuning", "zoo", "grid", "prediction", "robustness"}
MODULES = {
    ".".join(path.relative_to(RECIPES).with_suffix("").parts): path
    for path in (RECIPES / "finetune").rglob("*.py")
    if path.name != "__init__.py"
}


def imports_of(path: Path, module: str) -> set[str]:
    """The modules of finetune that a file imports, wherever in it; relative ones resolved from the name `module`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name if (name := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "finetune"}


def room_of(module: str) -> str:
    _, first, *inner = module.split(".")
    return first if inner else "top" if first in TOP else "ground"


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module: str) -> None:
    room = room_of(module)
    wrong = {name for name in imports_of(MODULES[module], module) if room_of(name) not in BELOW[room] | {room}}
    assert not wrong


def test_modules_form_no_circle() -> None:
    graph = {module: imports_of(path, module) for module, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_are_relative(module: str) -> None:
    """So that the package can be installed under another name."""
    nodes = [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in nodes if not node.level and (node.module or "").startswith("finetune")]


def test_recipes_import_no_recipe() -> None:
    recipes = {path.stem: ast.parse(path.read_text()) for path in RECIPES.glob("*.py")}
    for tree in recipes.values():
        nodes = list(ast.walk(tree))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not names & recipes.keys()
