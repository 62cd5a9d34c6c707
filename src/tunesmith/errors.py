"""The exceptions a user can meet.

    TunesmithError                 the message is for the user; exit code 2, no traceback
    ├── RecipeError   (ValueError) a setting is wrong
    ├── DataError     (ValueError) the data file can not be read or has faults; carries them
    ├── TemplateError (ValueError) a chat template can not do what training needs
    ├── ModelError    (OSError)    no such model, or a part of it is missing or broken
    ├── RunError      (OSError)    a run folder can not be written or is not what it should be
    ├── OutOfMemory   (MemoryError) a single row is too much
    ├── MissingExtra  (ImportError) an optional package is not installed
    ├── UnsupportedSystem (ImportError) an operating system that tunesmith does not run on
    └── ProofError                 what must hold does not: not-a-number, parity, digest; exit code 3

Anything else that reaches the command line is a bug of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tunesmith import commands
from tunesmith.caller import told
from tunesmith.language import said
from tunesmith.types import Fault


class TunesmithError(Exception):
    """A message in four parts: where, what was found, what was expected, what to do.

    Settings and options in it are given as the command line takes them; it holds them as its caller does.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: str, expected: str, fix: str) -> None:
        self.where, self.found, self.expected, self.fix = told(where), found, told(expected), told(fix)
        super().__init__(
            said(
                "{where}: found {found}; expected {expected}. {fix}",
                where=self.where,
                found=found,
                expected=self.expected,
                fix=self.fix,
            )
        )


class RecipeError(TunesmithError, ValueError):
    """A setting is unknown, impossible or contradicts another."""


class DataError(TunesmithError, ValueError):
    """The data file can not be read, or some of its rows are faulty (see `faults`)."""

    def __init__(self, where: str, found: str, expected: str, fix: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(where, found, expected, fix)
        self.faults = tuple(faults)


class TemplateError(TunesmithError, ValueError):
    """There is no chat template, or it can not express what training needs."""


class ModelError(TunesmithError, OSError):
    """No such model, or a file of it is missing or broken."""


class RunError(TunesmithError, OSError):
    """A run folder can not be written, or does not hold what it should."""


class OutOfMemory(TunesmithError, MemoryError):
    """Memory ran out and there was nothing left to make smaller."""


class MissingExtra(TunesmithError, ImportError):
    """An optional package is needed and absent; the message is one sentence that says what to install."""

    def __init__(self, needed_for: str, extra: str) -> None:
        super().__init__(
            needed_for,
            said("a package missing"),
            said("the extra '{name}'", name=extra),
            said("Install it with: {command}", command=commands.pip_install(f"tunesmith[{extra}]")),
        )


class UnsupportedSystem(TunesmithError, ImportError):
    """An operating system that tunesmith does not run on, or a card that torch has no kernels for."""


class ProofError(TunesmithError):
    """Something that must hold does not: a number is not finite, two results differ, a digest is wrong."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of what a library says is wrong, or else what it calls it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
