"""Rooms of the package: which of them imports which. Read from the sources; nothing is imported."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "aim_kernels"

#: Downwards only: each imports those that stand before it, and itself.
LAYERS = (
    "_native",
    "_extras",
    "_locks",
    "command_line",
    "step",
    "backends",
    "diagnostics",
    "optim",
    "aim",
    "methods",
    "integrations",
    "bench",
    "experiments",
    "__init__",
    "__main__",
)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str, *, at_run_time: bool) -> Iterator[str]:
    """Modules of the package that one names in its imports: all, or those outside of ``if TYPE_CHECKING``."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    left_out = set[int]()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            left_out.update(id(child) for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        found = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            found = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        named = [module for module in found if module in FILES]
        # Of `from package import module` the module is meant.
        yield from named[1:] or named


def room_of(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def test_imports_go_down() -> None:
    # The root is asked for its version, inside of functions.
    wrong = [
        f"{name} imports {other}"
        for name in FILES
        for other in imported(name, at_run_time=True)
        if LAYERS.index(room_of(other)) > LAYERS.index(room_of(name)) and other != "aim_kernels"
    ]
    assert not wrong


def test_no_module_imports_itself_over_others() -> None:
    # Types included: what needs another's types only is given an interface.
    graph = {name: set(imported(name, at_run_time=False)) - {name, "aim_kernels"} for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def private_names_of_the_optimizer() -> set[str]:
    """What its classes set on themselves, and their methods, beginning with one underscore."""
    found = set[str]()
    for module in ("optimizer", "weights", "modulation"):
        for node in ast.walk(ast.parse((PACKAGE / "optim" / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_nobody_else_reaches_into_the_optimizer() -> None:
    names = private_names_of_the_optimizer()
    assert {"_plan", "_make_plan", "_weights", "_release"} <= names
    reaches = [
        f"{name}:{node.lineno}: {ast.unparse(node)}"
        for name, path in FILES.items()
        if room_of(name) != "optim"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in names
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "torch"))
    ]
    assert not reaches


def test_the_ground_floor_has_ten_doors_at_most() -> None:
    doors = {path.stem for path in PACKAGE.iterdir() if path.suffix in (".py", "") and path.stem[0] not in "_."}
    assert doors == {layer for layer in LAYERS if not layer.startswith("_")} and len(doors) <= 10
