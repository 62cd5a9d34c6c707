"""Who calls, the command line or Python, and how what they should give is written for them.

Messages name settings and options as the command line takes them, `--set lora.r=16` and `--out`. Who calls from Python
reads the same as Python takes it: `flags={'lora.r': 16}` for `tunesmith.resolve`, and the argument `out`.
"""

from __future__ import annotations

import ast
import re
import shlex
from typing import Any

_is_command_line = False

# As `shlex.quote` writes it, without the sentence's own mark behind it.
_WORD = r"(?:'[^']*'|\"'\"|[^\s'\"])*(?:'[^']*'|[^\s'\".,;:)])"
_FLAGS = re.compile(rf"--(?:set|data) {_WORD}(?: --set {_WORD})*")
_OF_A_FUNCTION = re.compile(r"(?<!tunesmith )\b(eval|export) --(\w+)(?: (\w+))?")
_ALONE = {
    r"--set train\.epochs=N\b": "epochs=N",  # of `resume`
    r"`tunesmith train --help` lists": "`tunesmith.Recipe()` shows",
    r"--anyway\b": "anyway=True",
    r"--(to|like) (\w+)": r"\1='\2'",
    r"--(out|dtype|tasks)\b": r"`\1`",
    r"--set\b(?! )": "flags",
}


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
    text = _OF_A_FUNCTION.sub(_call, text)
    for pattern, written in _ALONE.items():
        text = re.sub(pattern, written, text)
    return _FLAGS.sub(_flags, text)


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
