"""The part of Go's template language in which tunesmith writes templates for Ollama, rendered without Go.

    {{ "text" }}   {{ .Content }}   {{ $name := "text" }}   {{ $name = .Role }}   {{ range .Messages }} … {{ end }}
    {{ if VALUE }} … {{ else if eq VALUE VALUE }} … {{ else }} … {{ end }}        eq, ne, not
    {{- and -}} take the white space beside them

A VALUE is a text in quotes, true, false, a field (.Name of what stands at the dot, $.Name of the whole), or a variable.
The rules are those of https://pkg.go.dev/text/template; the tests hold this to Go itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r'\{\{(-\s)?\s*((?:"(?:[^"\\\n]|\\.)*"|[^"])*?)\s*(\s-)?\}\}')
_WORD = re.compile(r'"(?:[^"\\\n]|\\.)*"|:=|=|[$.\w]+|\S')
_WHITE = " \t\r\n"
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


def quoted(text: str) -> str:
    """The text as a string of Go's; characters that can not be seen are written by their number."""
    return (
        '"'
        + "".join(_ESCAPES.get(letter) or (letter if letter.isprintable() else _number(letter)) for letter in text)
        + '"'
    )


def _number(letter: str) -> str:
    code = ord(letter)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _unquoted(word: str) -> str:
    def letter(match: re.Match[str]) -> str:
        number, other = match[1] or match[2], match[3]
        if number:
            return chr(int(number, 16))
        found = next((text for text, escaped in _ESCAPES.items() if escaped == f"\\{other}"), None)
        if found is None:
            raise Unknown(f"\\{other}")
        return found

    return re.sub(r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|(.))", letter, word[1:-1])


class Unknown(ValueError):
    """Something outside this part of the language; the text says what."""


@dataclass
class _Branches:
    """An if with its else-ifs: the first whose test holds is rendered."""

    cases: list[tuple[list[str], list[Any]]] = field(default_factory=list)
    otherwise: list[Any] = field(default_factory=list)


@dataclass
class _Range:
    over: str
    body: list[Any] = field(default_factory=list)


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text that Go makes of a template and these values; raises Unknown."""
    steps = _steps(template)
    body, end = _body(steps)
    if end is not None:
        raise Unknown("{{ end }} without a beginning")
    out: list[str] = []
    _write(body, values, values, [{}], out)
    return "".join(out)


def _steps(template: str) -> Iterator[str | list[str]]:
    """Texts as they stand, actions as their words."""
    at, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip(_WHITE) if trim else text
        yield text.rstrip(_WHITE) if match[1] else text
        yield _WORD.findall(match[2])
        at, trim = match.end(), match[3] is not None
    rest = template[at:]
    yield rest.lstrip(_WHITE) if trim else rest


def _body(steps: Iterator[str | list[str]]) -> tuple[list[Any], list[str] | None]:
    """What stands up to the end or else of the innermost block, and that end or else."""
    body: list[Any] = []
    for step in steps:
        if isinstance(step, str):
            body.append(step)
            continue
        if not step:
            raise Unknown("an empty action")
        word, *rest = step
        if word in ("end", "else"):
            return body, step
        if word == "if":
            body.append(_branches(rest, steps))
        elif word == "range" and len(rest) == 1:
            inner, end = _body(steps)
            _expect_end(end)
            body.append(_Range(rest[0], inner))
        else:
            body.append(step)
    return body, None


def _branches(test: list[str], steps: Iterator[str | list[str]]) -> _Branches:
    found = _Branches()
    while True:
        inner, end = _body(steps)
        found.cases.append((test, inner))
        if end is not None and end[:2] == ["else", "if"]:
            test = end[2:]
            continue
        if end == ["else"]:
            found.otherwise, end = _body(steps)
        _expect_end(end)
        return found


def _expect_end(end: list[str] | None) -> None:
    if end != ["end"]:
        raise Unknown("a block without {{ end }}")


def _write(body: Sequence[Any], dot: Any, whole: Any, scopes: list[dict[str, Any]], out: list[str]) -> None:
    for step in body:
        if isinstance(step, str):
            out.append(step)
        elif isinstance(step, _Range):
            for item in _value(step.over, dot, whole, scopes):
                _write(step.body, item, whole, [*scopes, {}], out)
        elif isinstance(step, _Branches):
            chosen = next((inner for test, inner in step.cases if _test(test, dot, whole, scopes)), step.otherwise)
            _write(chosen, dot, whole, [*scopes, {}], out)
        elif len(step) == 3 and step[1] == ":=" and _is_variable(step[0]):
            scopes[-1][step[0]] = _value(step[2], dot, whole, scopes)
        elif len(step) == 3 and step[1] == "=" and _is_variable(step[0]):
            _scope(step[0], scopes)[step[0]] = _value(step[2], dot, whole, scopes)
        elif len(step) == 1:
            value = _value(step[0], dot, whole, scopes)
            out.append(str(value).lower() if isinstance(value, bool) else value)
        else:
            raise Unknown(" ".join(step))


def _test(words: Sequence[str], dot: Any, whole: Any, scopes: list[dict[str, Any]]) -> bool:
    """A value is true unless it is empty or false."""
    if len(words) == 1:
        return bool(_value(words[0], dot, whole, scopes))
    name, *rest = words
    values = [_value(word, dot, whole, scopes) for word in rest]
    if name == "not" and len(values) == 1:
        return not values[0]
    if name in ("eq", "ne") and len(values) == 2:
        return (values[0] == values[1]) == (name == "eq")
    raise Unknown(" ".join(words))


def _value(word: str, dot: Any, whole: Any, scopes: list[dict[str, Any]]) -> Any:
    if word.startswith('"'):
        return _unquoted(word)
    if word in ("true", "false"):
        return word == "true"
    if match := re.fullmatch(r"(\$?)\.(\w+)", word):
        values = whole if match[1] else dot
        if match[2] not in values:
            raise Unknown(word)
        return values[match[2]]
    if _is_variable(word):
        return _scope(word, scopes)[word]
    raise Unknown(word)


def _is_variable(word: str) -> bool:
    return re.fullmatch(r"\$\w+", word) is not None


def _scope(name: str, scopes: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a variable was declared last."""
    for scope in reversed(scopes):
        if name in scope:
            return scope
    raise Unknown(f"{name}, which nobody declared")
