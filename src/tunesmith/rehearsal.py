"""Some six hundred general prompts, to rehearse with: a model answers them before a training, in its own words, and
these answers are trained along with the data, so that it does not forget what it knew. No prompt is like one of the
questions of `general`, which measure what was forgotten, or asks for what they ask."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

_FILE = Path(__file__).parent / "rehearsal.jsonl"


@cache
def prompts() -> tuple[str, ...]:
    """All prompts, two English ones to a Chinese one. The first N are as mixed as the whole, whatever N is."""
    return tuple(json.loads(line)["prompt"] for line in _FILE.read_text(encoding="utf-8").splitlines())
