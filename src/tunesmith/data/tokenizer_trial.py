"""A tokenizer of somebody else's is tried in a process that a limit can end, before it is built in this one.

What is tried: that it can be built, that no step of it makes much more of a text than there was, and that runs of one
letter, which make patterns go back and forth, take no time. A tokenizer that has passed is not tried again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith import hub
from tunesmith.confined import Ended, WorkFailed, confined
from tunesmith.errors import ModelError
from tunesmith.language import said

_FILES = ("*.json", "*.model", "*.tiktoken", "vocab.txt", "vocab.bpe", "merges.txt")
_GROWTH = 64
"""Characters that may be made of one; Unicode itself makes up to 18 (U+FDFA)."""
_RUN = 1000
_UNITS = (
    "a",
    "A",
    "0",
    " ",
    "\n",
    "\r\n",
    "\t",
    "!",
    "'",
    '"',
    "-",
    "_",
    "é",
    "中",
    "\u0300",
    "aA",
    "a ",
    " a",
    "a'",
    "0,",
)
_ENDS = ("", "!", "a", "0", " ", "\x01")


def require_bounded(folder: Path, build: Callable[[Path], Any]) -> None:
    """Raises ModelError for a tokenizer that takes more time or memory than any that is meant well.

    `build` makes a tokenizer of transformers of the folder; what it raises is left to whoever builds it.
    """
    passed = hub.cache_dir() / "tokenizers" / _digest(folder)
    if passed.exists():
        return
    try:
        found = confined(lambda: _tried(folder, build))
    except WorkFailed:
        return
    except Ended as ended:
        found = said("a tokenizer that fails its trial ({what})", what=ended)
    if found:
        fix = said("Fetch the model again from its authors; a tokenizer that is meant well does not do this.")
        raise ModelError(str(folder), found, said("one that takes a moment"), fix)
    with suppress(OSError):  # then it is tried again
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()


def _digest(folder: Path) -> str:
    """Of the files that a tokenizer is built of."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted({path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            digest.update(path.name.encode(errors="surrogateescape") + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _tried(folder: Path, build: Callable[[Path], Any]) -> str:
    """What is wrong with it, in words; empty where nothing is."""
    tokenizer = build(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        for text in _texts():
            tokenizer(text, add_special_tokens=False)
        return ""
    steps = [
        json.loads(step.__getstate__()) for step in (backend.normalizer, backend.pre_tokenizer) if step is not None
    ]
    if (growth := max(map(_growth, steps), default=1)) > _GROWTH:
        return f"a tokenizer that makes {growth:.0e} characters of one"
    if backend.normalizer is not None:
        for start in range(1, 0x30000, 256):
            text = "".join(chr(code) for code in range(start, start + 256) if not 0xD800 <= code < 0xE000)
            if len(backend.normalizer.normalize_str(text)) > _GROWTH * len(text) + _GROWTH:
                return f"a tokenizer that makes more than {_GROWTH} characters of one near U+{start:04X}"
    for text in _texts():
        if len(backend.encode(text, add_special_tokens=False).ids) > 4 * len(text.encode()) + _GROWTH:
            return "a tokenizer that makes more than four tokens of a byte"
    return ""


def _growth(step: Any) -> float:
    """How many characters a step of a tokenizer's file may make of one, as far as it says so itself."""
    if not isinstance(step, dict):
        return 1
    inner = [part for value in step.values() if isinstance(value, list) for part in value if isinstance(part, dict)]
    growth = 1.0
    for part in inner:
        growth *= _growth(part)
    if step.get("type") == "Replace":
        growth *= max(1, len(str(step.get("content", ""))))
    if step.get("type") == "Prepend":
        growth *= max(1, len(str(step.get("prepend", ""))))
    return growth


def _texts() -> Iterator[str]:
    for unit in _UNITS:
        for end in _ENDS:
            yield unit * (_RUN // len(unit)) + end
