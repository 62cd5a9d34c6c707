"""What transformers and peft say by themselves, kept to themselves."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers


def hush_libraries() -> None:
    """Keeps transformers' bars and its notes on defaults to itself; what matters is checked here and raised."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


@contextmanager
def quietly() -> Iterator[None]:
    """While it holds, transformers keeps its notes and its bars to itself, unless somebody has asked it for more or
    for less than it says by itself. What matters of what it would say is checked here and raised."""
    notes = transformers.logging
    verbosity, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    hushed = verbosity == logging.WARNING and "TUNESMITH_VERBOSE" not in os.environ
    if hushed:
        notes.set_verbosity_error()
        notes.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if hushed:  # peft asks for what transformers has renamed
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
            yield
    finally:
        if hushed:
            notes.set_verbosity(verbosity)
            if bars:
                notes.enable_progress_bar()
