"""Brings src/tunesmith/locale up to date: the messages that the code says, with their translations, and compiled.

python scripts/write_catalogue.py            writes what has changed; names what is to be translated
python scripts/write_catalogue.py --check    writes nothing; exits 1 and names what is stale
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import yaml
from babel.messages import Catalog
from babel.messages.catalog import Message
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "tunesmith"
LOCALE = PACKAGE / "locale"
FUNCTIONS: Any = {"said": (1,), "marked": (1,), "phrase": (1,), "counted": (1, 2)}
PLACE = "tunesmith/"


def messages(folder: Path = PACKAGE) -> Catalog:
    """What the code below a folder says, and the notes on the models with a short name, with the files they are in."""
    made = Catalog()
    ways: Any = [("**.py", calls), ("**.html.jinja", "jinja2.ext:babel_extract")]
    for name, _, message, _, _ in extract_from_dir(folder, ways, keywords=FUNCTIONS):
        made.add(message, locations=[(PLACE + name, 0)])
    if (models := folder / (name := "hub/models.yaml")).is_file():
        for model in yaml.safe_load(models.read_text(encoding="utf-8")).values():
            made.add(model["note"], locations=[(PLACE + name, 0)])
    return made


def calls(file: IO[bytes], functions: Collection[str], *_: Any, **__: Any) -> Iterator[tuple[int, str, Any, list[str]]]:
    """The calls of some functions in a file of Python with the texts that they are given, for Babel; its own way
    passes over calls inside of others and of f-strings."""
    for node in ast.walk(ast.parse(file.read())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            given = [each.value if isinstance(each, ast.Constant) else None for each in node.args]
            texts = tuple(text if isinstance(text, str) else None for text in given)
            yield node.lineno, node.func.id, texts, []
        yield from ((line, "marked", (text,), []) for line, text in _shown_in_help(node))


def _shown_in_help(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The text that a setting, an option or a command has there: of a function that has an option, its docstring."""
    match node:
        case ast.ClassDef(bases=[ast.Name(id="Section")]):
            yield from (text for inner in ast.walk(node) for text in _given(inner, "Field", "description"))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="typer"), attr=name)):
            yield from _given(node, name, "help")
        case ast.FunctionDef() if any(re.search(r"\w(Option|Argument)\b", ast.unparse(one)) for one in node.args.args):
            if text := ast.get_docstring(node):
                yield node.lineno, " ".join(text.split())


def _given(node: ast.AST, to: str, name: str) -> Iterator[tuple[int, str]]:
    """The text that a call of `to` is given by that name."""
    if isinstance(node, ast.Call) and to in (getattr(node.func, "id", None), getattr(node.func, "attr", None)):
        for given in node.keywords:
            if given.arg == name and isinstance(given.value, ast.Constant):
                yield given.value.lineno, str(given.value.value)


def merged(written: str, found: Catalog, language: str) -> Catalog:
    """The translations as they are, for the messages that there are: new ones are empty, nothing is guessed, what is
    said no more is left out."""
    before = read_po(io.StringIO(written), locale=language)
    before.update(found, no_fuzzy_matching=True, update_header_comment=False)
    before.obsolete.clear()
    return before


class _Dateless(Catalog):
    """Without the time and the program that wrote it, which would be a difference each time."""

    @property
    def mime_headers(self) -> list[tuple[str, str]]:
        return [
            ("Language", str(self.locale)),
            ("Plural-Forms", self.plural_forms),
            ("Content-Type", "text/plain; charset=utf-8"),
        ]


def texts(catalogue: Catalog) -> tuple[str, bytes]:
    """The catalogue for people, and for gettext."""
    same = _Dateless(
        locale=catalogue.locale, fuzzy=False, header_comment="# Written by `make catalogue`; translations by hand."
    )
    for message in catalogue:
        if message.id:
            same.add(message.id, message.string, message.locations, message.flags, user_comments=message.user_comments)
    readable, compiled = io.BytesIO(), io.BytesIO()
    write_po(readable, same, width=100, sort_output=True, include_lineno=False)
    write_mo(compiled, same)
    return readable.getvalue().decode(), compiled.getvalue()


def untranslated(catalogue: Catalog) -> list[str]:
    """Messages without a translation, or with one that somebody should look at."""
    return [str(message.id) for message in catalogue if message.id and (message.fuzzy or not all(strings(message)))]


def strings(message: Message) -> tuple[str, ...]:
    """The translation of a message in each of its forms."""
    return message.string if isinstance(message.string, tuple) else (message.string or "",)


def main() -> int:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is stale")
    check = parser.parse_args().check
    found, stale, open_ = messages(), [], []
    for path in sorted(LOCALE.glob("*/LC_MESSAGES/tunesmith.po")):
        catalogue = merged(path.read_text(encoding="utf-8"), found, path.parts[-3])
        text, compiled = texts(catalogue)
        open_ += untranslated(catalogue)
        for file, new in ((path, text.encode()), (path.with_suffix(".mo"), compiled)):
            if not file.is_file() or file.read_bytes() != new:
                stale.append(file.name)
                if not check:
                    file.write_bytes(new)
    if stale:
        print(f"{'Stale' if check else 'Written'}: {', '.join(stale)}" + (" (make catalogue)" if check else ""))
    for message in open_:
        print(f"Not translated: {message}")
    return 1 if open_ or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
