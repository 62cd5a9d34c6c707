"""The extras: what `pip install 'tunesmith[NAME]'` brings, for what is needed only for some things."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

from tunesmith.errors import MissingExtra
from tunesmith.language import marked

PURPOSES = {
    "cpu": marked("faster on a CPU"),
    "gpu": marked("bases of 4 bits and Liger's kernels"),
    "eval": marked("BLEU, chrF and a judge in `eval`"),
    "export": marked("`export --to gguf`, compared with llama.cpp"),
    "serve": marked("`serve`"),
    "tune": marked("`tune`"),
}


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed, by the metadata of tunesmith, as pyproject.toml has them."""
    lines = importlib.metadata.requires("tunesmith") or []
    names = [
        re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in lines if re.search(rf"extra == .{extra}\b", line)
    ]
    return [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]


def require(extra: str, needed_for: str) -> None:
    """Raises MissingExtra where a package of it is not installed."""
    if missing(extra):
        raise MissingExtra(needed_for, extra)
