"""The picture of the rooms in docs/design.md stays true: nobody imports what lies above, and no imports go round."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "tunesmith"
ROOMS = (
    *("__main__", "cli", "tuning", "export", "evaluation", "training", "serving", "chat", "models", "engine"),
    *("recipe", "data", "runs", "hub", "machines", "driver", "model_files", "confined", "extras", "deadline"),
    *("places", "loopback", "reading", "spelling", "markup", "__init__", "system", "screen", "errors", "commands"),
    *("caller", "terminal", "types", "language"),
)
"""Folders and modules of the package, from the top down."""
HEAVY = {"torch", "transformers", "peft", "accelerate"}


@functools.cache
def modules() -> list[str]:
    return sorted(
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    )


@functools.cache
def tree_of(module: str) -> ast.Module:
    path = PACKAGE / (module.replace(".", "/") + ".py")
    return ast.parse(
        (path if path.is_file() else PACKAGE / module.replace(".", "/") / "__init__.py").read_text("utf-8")
    )


def for_types_alone(tree: ast.Module) -> set[int]:
    """The statements below `if TYPE_CHECKING`."""
    tests = (node for node in ast.walk(tree) if isinstance(node, ast.If))
    return {id(n) for test in tests if ast.unparse(test.test) == "TYPE_CHECKING" for n in ast.walk(test)}


def imports(module: str, *, at_start: bool = False) -> Iterator[str]:
    """What a module imports, wherever it does, or as soon as it is imported itself."""
    tree = tree_of(module)
    aside = for_types_alone(tree)
    for node in tree.body if at_start else ast.walk(tree):
        if id(node) in aside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            of_ours = [name for name in named if name.removeprefix("tunesmith.") in modules()]
            yield from of_ours
            if len(of_ours) < len(named):  # something of its own
                yield node.module


def of_ours(module: str, *, at_start: bool = False) -> set[str]:
    """The modules of the package among its imports."""
    found = {name.removeprefix("tunesmith.") for name in imports(module, at_start=at_start)}
    return {name for name in found if name in modules()} - {module}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def upwards(module: str, imported: set[str]) -> list[str]:
    """Those of its imports that lie above it."""
    return sorted(name for name in imported if ROOMS.index(room_of(name)) < ROOMS.index(room_of(module)))


def round_about(graph: Mapping[str, set[str]]) -> list[str]:
    """Those that lead back to themselves."""
    left = dict(graph)
    while ends := [name for name, leads in left.items() if not leads & left.keys()]:
        left = {name: leads for name, leads in left.items() if name not in ends}
    while starts := [name for name in left if not any(name in leads for leads in left.values())]:
        left = {name: leads for name, leads in left.items() if name not in starts}
    return sorted(left)


def test_every_room_has_its_place_in_the_picture() -> None:
    assert {room_of(module) for module in modules()} == {*ROOMS}


def test_no_module_imports_one_above_it() -> None:
    assert {module: up for module in modules() if (up := upwards(module, of_ours(module)))} == {}


def test_no_imports_go_round() -> None:
    """Inside a room neither."""
    assert round_about({module: of_ours(module) for module in modules()}) == []


def test_what_help_needs_does_not_import_torch() -> None:
    reached, new = set[str](), {"cli", "__main__", "__init__"}
    while new:
        reached |= new
        new = {name for module in new for name in of_ours(module, at_start=True)} - reached
    assert len(reached) > 10
    heavy = {module: HEAVY & {n.partition(".")[0] for n in imports(module, at_start=True)} for module in reached}
    assert {module: found for module, found in heavy.items() if found} == {}


def test_the_checks_see_what_they_are_for() -> None:
    assert "training.run" in of_ours("cli.demo")
    assert upwards("data.cache", {"errors", "training.run"}) == ["training.run"]
    assert round_about({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}) == ["b", "c"]
