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
    if at_start:  # what stands in a function waits until that is called
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda))
        aside |= {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
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
        found = {name for module in new for name in of_ours(module, at_start=True)}
        new = found | {name.rpartition(".")[0] for name in found if "." in name}  # a folder is imported first
        new -= reached
    assert {"cli.console", "errors", "runs"} <= reached and "training.run" not in reached
    heavy = {module: HEAVY & {n.partition(".")[0] for n in imports(module, at_start=True)} for module in reached}
    assert {module: found for module, found in heavy.items() if found} == {}


ROOT = PACKAGE.parent.parent
ASIDE = [path for folder in ("benchmarks", "scripts", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_what_benchmarks_and_scripts_import_is_there() -> None:
    """No test runs them as a whole."""
    homes = [PACKAGE.parent, *(ROOT / name for name in ("tests", "benchmarks", "scripts", "benchmarks/gpu"))]
    assert len(ASIDE) > 20
    assert [missing for path in ASIDE for missing in absent(path, homes)] == []


def absent(path: Path, homes: list[Path]) -> Iterator[str]:
    """What a file takes from a module in one of these folders that has no such name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        places = [home.joinpath(*node.module.split(".")) for home in homes]
        files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
        whole = next((file for file in files if file.is_file()), None)
        if whole is None:
            if node.module.partition(".")[0] == "tunesmith":
                yield f"{path.name}:{node.lineno} {node.module}"
            continue  # somebody else's
        nodes = [*ast.walk(ast.parse(whole.read_text("utf-8")))]
        names = {n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.alias)}
        names |= {n.asname for n in nodes if isinstance(n, ast.alias) and n.asname}
        names |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if whole.parent == PACKAGE:  # which brings its public names when they are asked for
            names |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        inside = {file.stem for file in whole.parent.glob("*")} if whole.name == "__init__.py" else set[str]()
        yield from (
            f"{path.name}:{node.lineno} {node.module}.{alias.name}"
            for alias in node.names
            if alias.name not in names | inside
        )


def test_a_name_that_has_moved_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text(
        "from tunesmith.model import attach\nfrom tunesmith.runs import hide\nfrom tunesmith import hub, train\n"
    )
    assert list(absent(path, [PACKAGE.parent])) == ["old.py:1 tunesmith.model", "old.py:2 tunesmith.runs.hide"]


def test_the_checks_see_what_they_are_for() -> None:
    assert "training.run" in of_ours("cli.demo")
    assert upwards("data.cache", {"errors", "training.run"}) == ["training.run"]
    assert round_about({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}) == ["b", "c"]
