"""Writes docs/reference/ from the code: the settings from the recipe's fields, the commands from their own --help.

python scripts/write_reference.py            writes what has changed
python scripts/write_reference.py --check    writes nothing; exits 1 and names what is stale
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
WIDTH = "100"
# What typer and rich read when they are imported; so nothing of tunesmith is imported before this is set.
SURROUNDINGS = {
    "COLUMNS": WIDTH,
    "TUNESMITH_LANG": "en",
    "TERMINAL_WIDTH": WIDTH,
    "NO_COLOR": "1",
    "TERM": "dumb",
    "_TYPER_FORCE_DISABLE_TERMINAL": "1",
}
COLOUR_ON = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
_SETTINGS_IN_HELP = " Settings (recipe.yaml or --set)"


def pages() -> dict[str, str]:
    """The text of each page by its file name."""
    for name in COLOUR_ON:
        os.environ.pop(name, None)
    os.environ.update(SURROUNDINGS)
    return {"settings.md": settings_page(), "commands.md": commands_page()}


# --- settings ---------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every section with its settings as a table."""
    from tunesmith.recipe import Recipe

    schema = Recipe.model_json_schema()
    parts = [
        "# Settings\n\n"
        "Written by `scripts/write_reference.py` from `src/tunesmith/recipe.py`; change them there.\n\n"
        "A setting stands in a recipe, under its section, or behind `--set` as `section.name=value`. `--set` wins. "
        "A name that is not in this list is an error.\n"
    ]
    for section, field in Recipe.model_fields.items():
        kind: Any = field.annotation
        properties = schema["$defs"][kind.__name__]["properties"]
        rows = [_row(name, properties[name]) for name in kind.model_fields]
        parts.append(f"## {section}\n\n{inspect.cleandoc(kind.__doc__)}\n\n{_table(rows)}")
    return "\n".join(parts)


def _row(name: str, setting: Mapping[str, Any]) -> tuple[str, ...]:
    default = _default(setting)
    return f"`{name}`", f"`{default}`" if default else "", allowed(setting), setting["description"]


def _table(rows: list[tuple[str, ...]]) -> str:
    head = ("setting", "default", "allowed", "meaning")
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _default(setting: Mapping[str, Any]) -> str:
    value = setting.get("default")
    if value is None or value in ([], {}):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words.

    >>> allowed({"type": "number", "exclusiveMinimum": 0, "maximum": 1})
    'a number above 0, at most 1'
    """
    if "anyOf" in schema:
        return " or ".join(allowed(one) for one in schema["anyOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        return "a list of texts"
    if kind == "object":
        return "names and texts"
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "`true`, `false`"}
    return ", ".join([f"{words.get(kind, '`none`')}{_lower(schema)}", *_upper(schema)])


def _lower(schema: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']}"
    return f" from {schema['minimum']}" if "minimum" in schema else ""


def _upper(schema: Mapping[str, Any]) -> Iterator[str]:
    if "exclusiveMaximum" in schema:
        yield f"below {schema['exclusiveMaximum']}"
    if "maximum" in schema:
        yield f"at most {schema['maximum']}"


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command's --help."""
    import typer
    from typer.testing import CliRunner

    from tunesmith.cli import app

    group: Any = typer.main.get_command(app)
    parts = [
        "# Commands\n\n"
        "Written by `scripts/write_reference.py` from each command's `--help`.\n\n"
        "Exit codes: 0 done · 2 the input or a setting is wrong · 3 a proof failed · 130 interrupted · "
        "1 a bug of tunesmith.\n"
    ]
    for name in ("", *group.commands):
        answer = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="tunesmith", env=SURROUNDINGS)
        if answer.exit_code:
            raise SystemExit(f"tunesmith {name} --help ended with {answer.exit_code}:\n{answer.output}")
        shown, settings, _ = answer.output.partition(_SETTINGS_IN_HELP)
        lines = [line.rstrip() for line in shown.strip("\n").splitlines()]
        text = "\n".join(lines).strip("\n")
        more = "\nThen follow all [settings](settings.md).\n" if settings else ""
        parts.append(f"## {f'tunesmith {name}'.strip()}\n\n```text\n{text}\n```\n{more}")
    return "\n".join(parts)


# --- the command line -------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    check = parser.parse_args().check
    stale = []
    for name, text in pages().items():
        path = REFERENCE / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'Stale' if check else 'Written'}: {', '.join(stale)}" + (" (make reference)" if check else ""))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
