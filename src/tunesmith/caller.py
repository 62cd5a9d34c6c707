"""Who calls, the command line or Python, and how what they should give is written for them.

Messages name settings and options as the command line takes them, `--set lora.r=16` and `--out`. Who calls from Python
reads the same as Python takes it: `flags={'lora.r': 16}` for `tunesmith.resolve`, and the argument `out`.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from typing import Any

_is_command_line = False

# As `shlex.quote` writes it, without the sentence's own mark behind it; it quotes what is not ASCII.
_WORD = r"(?:'[^']*'|\"'\"|[^\s'\"。，；：、）])*(?:'[^']*'|[^\s'\".,;:)。，；：、）])"
_FLAGS = re.compile(rf"--(?:set|data) {_WORD}(?: --set {_WORD})*")


def is_command_line() -> None:
    """From now on this process speaks to somebody at a command line."""
    global _is_command_line
    _is_command_line = True


def told(text: str) -> str:
    """What a message says of settings and options, as its reader writes them."""
    return text if _is_command_line else in_python(text)


def in_python(text: str) -> str:
    """
    >>> in_python("Go on without them: --set data.allow_set_aside=true.")
    "Go on without them: flags={'data.allow_set_aside': True}."
    >>> in_python("Choose another --out.")
    'Choose another `out`.'
    """
    # From left to right, each place once: a column may be named like an option.
    parts, at = [], 0
    while here := [(found, how) for pattern, how in _HOW if (found := pattern.search(text, at))]:
        found, how = min(here, key=lambda one: one[0].start())
        parts += [text[at : found.start()], found.expand(how) if isinstance(how, str) else how(found)]
        at = found.end()
    return "".join(parts) + text[at:]


def _call(found: re.Match[str]) -> str:
    """
    >>> in_python("export --to gguf"), in_python("eval --data FILE"), in_python("eval --judge")
    ("export(to='gguf')", 'evaluate(data=FILE)', 'evaluate(judge=…)')
    """
    function, argument, value = found.groups("…")
    return f"{'evaluate' if function == 'eval' else function}({argument}={repr(value) if value.islower() else value})"


def _flags(found: re.Match[str]) -> str:
    """
    >>> in_python("--set lora.rnak"), in_python("--data 'my rows.csv'")
    ("flags['lora.rnak']", "flags={'data.path': 'my rows.csv'}")
    """
    given: dict[str, Any] = {}
    options, words = (shlex.split(found[0])[part::2] for part in (0, 1))
    for option, word in zip(options, words, strict=True):
        name, equals, value = word.partition("=") if option == "--set" else ("data.path", "=", word)
        if not equals:
            return f"flags[{name!r}]"
        is_text = option == "--data" or name.startswith("data.columns.")
        given[name] = value if is_text else _value(value)
    return f"flags={given}"


def _value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


# Of two that begin at the same place, the first.
_HOW: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"(?<!tunesmith )\b(eval|export) --(\w+)(?: (\w+))?"), _call),
    (re.compile(r"--set train\.epochs=N\b"), "epochs=N"),  # of `resume`
    (_FLAGS, _flags),
    (re.compile(r"`tunesmith train --help` lists"), "`tunesmith.Recipe()` shows"),
    (re.compile(r"`tunesmith train --help` 列出的"), "`tunesmith.Recipe()` 里的"),
    (re.compile(r"--(anyway|join)\b"), r"\1=True"),
    (re.compile(r"--(to|like) (\w+)"), r"\1='\2'"),
    (re.compile(r"--(out|dtype|tasks)\b"), r"`\1`"),
    (re.compile(r"--set\b(?! )"), "flags"),
]
