"""Options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from pydantic import BaseModel

from tunesmith import recipe as recipes
from tunesmith.errors import RecipeError
from tunesmith.terminal import what_is_no_text

_PATHS = ("model.name", "data.path", "template.path")
"""Settings that name files; a file's name may be any bytes."""


def whole(param: typer.CallbackParam, value: str | None) -> str | None:
    """The value of an option that is text. Raises RecipeError for bytes that are none, which no tokenizer takes."""
    if value is not None and (found := what_is_no_text(value)):
        fix = "Set the terminal to UTF-8, or convert what it is given: iconv -f GB18030 -t UTF-8"
        raise RecipeError(param.opts[0], found, "text in UTF-8", fix)
    return value


def whole_settings(param: typer.CallbackParam, values: list[str] | None) -> list[str] | None:
    for text in values or ():
        if text.partition("=")[0].strip() not in _PATHS:
            whole(param, text)
    return values


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Alias, hub id or folder; `tunesmith models` lists the aliases.", show_default=False
    ),
]
DataOption = Annotated[
    str | None, typer.Option("--data", "-d", help="JSON, JSONL, CSV or Parquet file of examples.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        callback=whole_settings,
        help="A setting, for instance lora.r=16; may be repeated. All of them are listed below.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the libraries' own notes and warnings.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the run; must be new or empty.", show_default=False)
]


def _as_written(default: object) -> str:
    """A default as one writes it in a recipe."""
    if default is None or isinstance(default, (dict, list)):
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default) or "–"


def _settings_help() -> str:
    lines = []
    for section, field in recipes.Recipe.model_fields.items():
        for name, setting in cast("type[BaseModel]", field.annotation).model_fields.items():
            default = setting.get_default(call_default_factory=True)
            lines.append(f"[cyan]{section}.{name}[/] \\[{_as_written(default)}]  {setting.description}")
    return "[bold]Settings[/] (recipe.yaml or --set)\n\n" + "\n\n".join(lines)


SETTINGS = _settings_help()
