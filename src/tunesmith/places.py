"""What is written for others says the names of files and folders, and not where they lie on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def named(text: str) -> str:
    """The last name of an absolute path; anything else, a hub's id for one, as it is."""
    path = Path(text)
    return path.name or text if path.is_absolute() or text.startswith("~") else text


def without(text: str, known: Iterable[str]) -> str:
    """A text in which absolute paths under the folders of `known` ones, and of the user's home, begin after them."""
    folders = {str(Path(path).parent) for path in known if Path(path).is_absolute()} | {str(Path.home())}
    for folder in sorted(folders - {"/"}, key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return text


def stripped(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config's settings but those by which libraries note the absolute path of what was loaded."""
    return {
        name: stripped(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if not (name.endswith(("_file", "name_or_path")) and isinstance(value, str) and Path(value).is_absolute())
    }


def paths_in(value: Any) -> Iterator[str]:
    """The absolute paths among the texts of a JSON value."""
    if isinstance(value, str) and Path(value).is_absolute():
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from paths_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from paths_in(part)
