"""The house stays as it was built: no circles, one direction between folders, and a short path through the paper."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    file
    for folder in ("minifocus", "experiments", "examples", "csrc")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file.name != "__init__.py" or file.stat().st_size
]
PATH = ["model", "vision", "llama", "rows", "generate", "samplers/hooks", "samplers/vision_guided"]
PATH += ["projectors/mlp", "samplers/text_guided", "samplers/__init__", "ops/reference"]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file) for file in FILES}


def imports(file: Path) -> set[str]:
    """The repository's modules that a file imports, at its top or inside a function, for types alone or not."""
    package = module_of(file).split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                found.add(inner if inner in MODULES else name)
    return (found & MODULES) - {module_of(file)}


def test_no_two_files_import_each_other() -> None:
    graph = {module_of(file): imports(file) for file in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' imports '.join(reversed(error.args[1]))}")


def test_no_two_folders_import_each_other() -> None:
    """A package's own files at its top (model.py, load.py) are each a place of their own."""

    def place(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:2]) if parts[0] == "minifocus" else parts[0]

    graph: dict[str, set[str]] = {}
    for file in FILES:
        own = place(module_of(file))
        graph.setdefault(own, set()).update({place(name) for name in imports(file)} - {own, "minifocus"})
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' imports '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize(
    ("folder", "not_from"),
    [
        ("minifocus/samplers", ("minifocus.methods", "minifocus.training", "minifocus.cards")),
        ("minifocus/training", ("minifocus.cards", "minifocus.methods")),
        ("minifocus/methods", ("minifocus.training", "minifocus.cards")),
        ("minifocus", ("experiments", "examples", "csrc")),
        ("examples", ("experiments",)),
    ],
)
def test_what_does_not_import_what(folder: str, not_from: tuple[str, ...]) -> None:
    for file in sorted((ROOT / folder).rglob("*.py")):
        wrong = [name for name in imports(file) if name.startswith(not_from)]
        assert not wrong, f"{module_of(file)} imports {wrong}"


def test_the_path_is_the_paper_s_alone() -> None:
    """It may use what opens, checks and lays out, and nothing of a baseline, a toy or a tool."""
    for name in PATH:
        for module in imports(ROOT / f"minifocus/{name}.py"):
            place = module.split(".")[1] if "." in module else ""
            assert place not in ("methods", "cards", "training", "testing", "evaluate", "figure", "load"), (
                name,
                module,
            )


def test_the_path_is_an_evening_s_reading() -> None:
    lines = {name: len((ROOT / f"minifocus/{name}.py").read_text(encoding="utf-8").splitlines()) for name in PATH}
    assert sum(lines.values()) <= 1620, lines


def test_nothing_edits_the_path_of_modules_but_setup() -> None:
    """The process that renders chat templates is started without one (inputs/template_renderer.py)."""
    edited = []
    for file in [*FILES, ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            target = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = node.func.value if node.func.attr in ("append", "insert", "extend") else None
            elif isinstance(node, ast.AugAssign):
                target = node.target
            elif isinstance(node, ast.Assign):
                target = node.targets[0]
            if target is not None and ast.unparse(target).split("[")[0] == "sys.path":
                edited.append(module_of(file))
    assert sorted(edited) == ["minifocus.inputs.template_renderer", "setup"]
