"""What is wrong with the words of a command line, in the parts of every other error."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from tunesmith import commands
from tunesmith import recipe as recipes
from tunesmith.cli.options import ours
from tunesmith.errors import RecipeError
from tunesmith.language import said
from tunesmith.spelling import nearest


def understood(error: Any) -> RecipeError:
    """What typer found, of which the type and some values are known, and else a sentence in English."""
    context = error.ctx
    command = " ".join(["tunesmith", *_words(context)])
    fix = said("What there is, is listed by: {command}", command=commands.tunesmith(*_words(context), "--help"))
    match type(error).__name__:
        case "NoSuchOption":
            return _no_such_option(error, command, fix)
        case "BadOptionUsage":
            if "requires" in error.message:
                return RecipeError(error.option_name, said("no value"), said("a value after it"), fix)
            return RecipeError(error.option_name, said("a value"), said("none: it is given or left out"), fix)
        case "MissingParameter" if error.param is not None:
            name = error.param.metavar or error.param.name.upper()
            return RecipeError(command, said("no {names}", names=name), name, fix)
        case "BadParameter" if error.param is not None:
            return _bad_value(error, fix)
    if more := re.match(r"Got unexpected extra argument\S* \((.*)\)", error.message):
        expected = " ".join(["", *(context.command.collect_usage_pieces(context) if context else ())]).strip()
        return RecipeError(command, said("more words: {words}", words=more[1]), expected, fix)
    if unknown := re.match(r"No such command '(.*?)'", error.message):
        names = context.command.list_commands(context)
        return RecipeError(
            f"tunesmith {unknown[1]}",
            said("no such command"),
            said("one of {names}", names=", ".join(names)),
            _meant(unknown[1], names, fix),
        )
    return RecipeError(command, error.format_message(), said("words as its help describes them"), fix)


def _no_such_option(error: Any, command: str, fix: str) -> RecipeError:
    known = [name for each in error.ctx.command.params for name in each.opts] if error.ctx else []
    found = said("an option that `{command}` does not have", command=command)
    mine = ours(error.option_name, known) if error.option_name not in known else None
    return RecipeError(error.option_name, found, said("one that it has"), mine or _meant(error.option_name, known, fix))


def _bad_value(error: Any, fix: str) -> RecipeError:
    where, cause = error.param.opts[0], error.__cause__
    if not isinstance(cause, ValidationError):
        return RecipeError(where, error.message, said("another value"), fix)
    first = cause.errors()[0]
    choices = re.search(r" is not one of (.*)\.", first["msg"])
    expected = said("one of {names}", names=choices[1]) if choices else recipes.expected(first)
    return RecipeError(where, repr(first["input"]), expected, fix)


def _meant(given: str, known: Iterable[str], fix: str) -> str:
    near = nearest(given, list(known))
    return said("Did you mean {name}?", name=near) + " " + fix if near else fix


def _words(context: Any) -> list[str]:
    return [context.info_name] if context is not None and context.parent is not None else []
