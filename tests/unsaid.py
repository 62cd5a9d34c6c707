"""Texts in the constructors of errors that are not said in the reader's language, found in the code.

A text is prose where a word or a value stands beside another one with a space between. A command or an option as it
is typed, and a number with its unit, stand as they are.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

RAISED = {
    *("TunesmithError", "RecipeError", "DataError", "TemplateError", "ModelError", "RunError", "OutOfMemory"),
    *("MissingExtra", "UnsupportedSystem", "ProofError", "Fault", "Problem", "_Problem", "Unfit", "Ended", "Refused"),
}
SAYING = {"said", "counted", "marked"}
PROSE = re.compile(r"[A-Za-z{] [A-Za-z{]")
AS_TYPED = re.compile(r"(\w+ )?--|(tunesmith|pip|iconv) |\{ (GiB|MiB)$")


def unsaid(folder: Path) -> list[tuple[str, str]]:
    """File with line, and text, of each; a value in an f-string is `{`."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in _Module(ast.parse(path.read_bytes())).texts():
            text = _text(node)
            if PROSE.search(text) and not AS_TYPED.match(text):
                found.append((f"{path}:{node.lineno}", text))
    return found


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{" for part in node.values)


_TELLING = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For, ast.comprehension, ast.Call)


class _Module:
    """The code of one, in which a name is followed to what it was given, a function to what it returns."""

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self._functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self._seen: set[object] = set()
        self._within: dict[ast.AST, list[ast.AST]] = {}

    def texts(self) -> Iterator[ast.Constant | ast.JoinedStr]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED:
                for given in (*node.args, *(keyword.value for keyword in node.keywords)):
                    yield from self._in(given)

    def _in(self, node: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
        if node in self._seen:
            return
        self._seen.add(node)
        parts: list[ast.AST] = []
        match node:
            case ast.Constant(value=str()):
                yield node
            case ast.JoinedStr():
                yield node
                parts = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
            case ast.IfExp():
                parts = [node.body, node.orelse]
            case ast.BinOp():
                parts = [node.left, node.right]
            case ast.BoolOp():
                parts = [*node.values]
            case ast.Dict():
                parts = [*node.values]
            case ast.List() | ast.Tuple() | ast.Set():
                parts = [*node.elts]
            case ast.ListComp() | ast.GeneratorExp():
                parts = [node.elt]
            case ast.Starred() | ast.NamedExpr() | ast.Subscript():
                parts = [node.value]
            case ast.Name():
                parts = self._given(node)
            case ast.Call(func=ast.Name(id=name)) if name in SAYING:
                parts = [keyword.value for keyword in node.keywords]
            case ast.Call(func=ast.Name(id=name)) if name in self._functions:
                returned = ast.walk(self._functions[name])
                parts = [one.value for one in returned if isinstance(one, ast.Return) and one.value]
            case ast.Call(func=ast.Attribute(value=value, attr=method)):
                parts = [value, *(node.args if method in ("join", "get") else ())]
        for part in parts:
            yield from self._in(part)

    def _given(self, name: ast.Name) -> list[ast.AST]:
        """What the name stands for: in the innermost function, or the module, that gives it a value."""
        place: ast.AST = name
        while place in self._above:
            place = self._above[place]
            if isinstance(place, ast.FunctionDef | ast.Module) and (values := [*self._values(name.id, place)]):
                return values
        return []

    def _values(self, name: str, place: ast.FunctionDef | ast.Module) -> Iterator[ast.AST]:
        for node in self._inside(place):
            match node:
                case ast.Assign(targets=[target], value=value) | ast.NamedExpr(target=target, value=value):
                    yield from _bound(target, value, name)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    yield from _bound(target, value, name)
                case ast.AugAssign(target=target, value=value):
                    yield from _bound(target, value, name)
                case ast.For(target=target, iter=each) | ast.comprehension(target=target, iter=each):
                    yield from self._turns(target, each, name)
        if isinstance(place, ast.FunctionDef):
            names = [one.arg for one in (*place.args.posonlyargs, *place.args.args)]
            if name in names:
                at = names.index(name) - (names[0] in ("self", "cls"))
                for call in self._inside(self._tree):
                    if isinstance(call, ast.Call) and _called(call) == place.name:
                        yield from call.args[at : at + 1]

    def _inside(self, place: ast.AST) -> list[ast.AST]:
        if place not in self._within:
            self._within[place] = [node for node in ast.walk(place) if isinstance(node, _TELLING)]
        return self._within[place]

    def _turns(self, target: ast.expr, each: ast.expr, name: str) -> Iterator[ast.AST]:
        """What a loop gives a name: of the entries of a table, their keys or their values."""
        match target, each:
            case (
                ast.Tuple(elts=[ast.Name(id=key), ast.Name(id=value)]),
                ast.Call(func=ast.Attribute(value=ast.Name() as table, attr="items")),
            ) if name in (key, value):
                for one in self._given(table):
                    if isinstance(one, ast.Dict):
                        yield from (part for part in (one.keys if name == key else one.values) if part)
            case ast.Name(id=found), _ if found == name:
                yield each


def _called(call: ast.Call) -> str | None:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return None


def _bound(target: ast.expr, value: ast.expr, name: str) -> Iterator[ast.AST]:
    match target, value:
        case ast.Name(id=found), _ if found == name:
            yield value
        case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
            for one, other in zip(names, values, strict=True):
                yield from _bound(one, other, name)
        case ast.Tuple(elts=names), _ if any(isinstance(one, ast.Name) and one.id == name for one in names):
            yield value
