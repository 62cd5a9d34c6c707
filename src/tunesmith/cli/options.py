"""Options that several commands have in common, and what those of a training come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunesmith import recipe as recipes
from tunesmith.errors import RecipeError
from tunesmith.language import said
from tunesmith.terminal import what_is_no_text

_PATHS = ("model.name", "data.path", "template.path")
"""Settings that name files; a file's name may be any bytes."""


def whole(param: typer.CallbackParam, value: str | None) -> str | None:
    """The value of an option that is text. Raises RecipeError for bytes that are none, which no tokenizer takes."""
    if value is not None and (found := what_is_no_text(value)):
        fix = said(
            "Set the terminal to UTF-8, or convert what it is given: {command}", command="iconv -f GB18030 -t UTF-8"
        )
        raise RecipeError(param.opts[0], found, said("text in UTF-8"), fix)
    return value


def whole_settings(param: typer.CallbackParam, values: list[str] | None) -> list[str] | None:
    for text in values or ():
        if text.partition("=")[0].strip() not in _PATHS:
            whole(param, text)
    return values


def _as_written(default: object) -> str:
    """A default as one writes it in a recipe."""
    if default is None or isinstance(default, (dict, list)):
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default) or "–"


def _described(setting: str) -> FieldInfo:
    section, _, name = setting.partition(".")
    return cast("type[BaseModel]", recipes.Recipe.model_fields[section].annotation).model_fields[name]


SHORT = {"epochs": "train.epochs", "lr": "train.learning_rate", "rank": "lora.r", "batch": "train.examples_per_step"}
"""The settings that have an option of their own, by its name."""


def _short(name: str) -> Any:
    setting = _described(SHORT[name])
    return typer.Option(
        f"--{name}",
        metavar=name.upper(),
        callback=whole,
        show_default=_as_written(setting.get_default(call_default_factory=True)),
    )


def short_help(name: str) -> str:
    what = said(_described(SHORT[name]).description or "")
    return said("{what} Short for --set {setting}.", what=what, setting=SHORT[name])


FilesArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="RECIPE.yaml|ROWS.jsonl",
        help="Settings in a file (YAML), examples in a file (JSONL, JSON, CSV, Parquet), or both.",
        show_default=False,
    ),
]
EpochsOption = Annotated[str | None, _short("epochs")]
RateOption = Annotated[str | None, _short("lr")]
RankOption = Annotated[str | None, _short("rank")]
BatchOption = Annotated[str | None, _short("batch")]
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
LikeOption = Annotated[
    str | None,
    typer.Option(
        "--like",
        metavar="|".join(recipes.LIKE),
        callback=whole,
        help="Settings of somebody else's, below all that is given here: those that notebooks copied per model have.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the libraries' own notes and warnings.")]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, or its name in runs/.", show_default=False)
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the run; must be new or empty.", show_default=False)
]


# --- what they come to ------------------------------------------------------------------------------------------------

_ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Given:
    """What a command line says of a training."""

    recipe: recipes.Recipe
    sources: dict[str, recipes.Source]
    words: tuple[str, ...]
    """The same once more, for another command line."""


def given(
    files: Sequence[Path] | None,
    model: str | None,
    data: str | None,
    sets: Sequence[str] | None,
    like: str | None,
    **short: str | None,
) -> Given:
    """The recipe that files and options come to. Raises RecipeError for what is given twice, and as `resolve` does."""
    rows = [str(file) for file in files or () if file.suffix.lower() in _ROWS]
    settings = [file for file in files or () if str(file) not in rows]
    if len(settings) > 1:
        found = said(" and ").join(map(str, settings))
        raise RecipeError(
            said("the recipe"), found, said("one recipe (YAML), and rows"), said("Leave one of the two out.")
        )
    options = [("--model", "model.name", model), ("--data", "data.path", data)]
    options += [(f"--{name}", SHORT[name], value) for name, value in short.items()]
    options = [(option, setting, value) for option, setting, value in options if value is not None]
    settings_given = [(f"--set {setting}", setting, value) for setting, value in map(recipes.parse_flag, sets or ())]
    settings_given += [(name, "data.path", name) for name in rows]
    settings_given += [
        (option, setting, value if setting in _PATHS else recipes.parse_flag(f"{setting}={value}")[1])
        for option, setting, value in options
    ]
    first: dict[str, str] = {}
    for where, setting, _ in settings_given:
        before = first.setdefault(setting, where)
        if before != where:
            raise RecipeError(
                where,
                said("{setting}, which {before} gives too", setting=setting, before=before),
                said("it once"),
                said("Leave one of the two out."),
            )
    flags = {name: value for _, name, value in settings_given}
    recipe, sources = recipes.resolve(settings[0] if settings else None, flags, like=like)
    words = [*map(str, files or ()), *(() if like is None else ("--like", like))]
    words += [word for option, _, value in options for word in (option, value)]
    return Given(recipe, sources, (*words, *(word for text in sets or () for word in ("--set", text))))


def ours(option: str, known: Sequence[str]) -> str | None:
    """What another tool's option is called here, with what it means; None where it is not known, or the command does
    not have the settings of a training. `known` are the command's own options."""
    name = option.lstrip("-").lower().replace("-", "_")
    theirs = (setting for setting, names in recipes.OTHER_NAMES.items() if name in names.split())
    same = (setting for setting in recipes.setting_names() if name in (setting, setting.rpartition(".")[2]))
    meant = next(theirs, None) or next(same, None)
    if meant is None or not {"--data", "--set"} <= set(known):
        return None
    if meant not in recipes.setting_names():
        return said("Write {option}.", option=meant) if meant in known else None
    own = {"model.name": "--model", "data.path": "--data"} | {setting: f"--{name}" for name, setting in SHORT.items()}
    what = said(_described(meant).description or "")
    if own.get(meant) in known:
        return said("Write --set {setting}=…, or {option}. {what}", setting=meant, option=own[meant], what=what)
    return said("Write --set {setting}=…. {what}", setting=meant, what=what)


def settings_help() -> str:
    """Every setting with its default and what it means, in rich's markup."""
    lines = [said("[bold]Settings[/] (recipe.yaml or --set)")]
    for name in recipes.setting_names():
        setting = _described(name)
        default = _as_written(setting.get_default(call_default_factory=True))
        lines.append(f"[cyan]{name}[/] \\[{default}]  {said(setting.description or '')}")
    return "\n\n".join(lines)
