"""Everything that can be known before a weight is read: every row read, rendered and accounted for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedConfig

from tunesmith import hub, records
from tunesmith import model as models
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import Recipe
from tunesmith.render import Renderer
from tunesmith.types import Conversation, Fault, Origin, Rendered

HELD_OUT_AT_MOST = 200


@dataclass(frozen=True)
class Row:
    """A trainable row: what it says and its documents (one, but for templates that rewrite history)."""

    conversation: Conversation
    documents: tuple[Rendered, ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(document.token_ids) for document in self.documents)

    @property
    def n_supervised(self) -> int:
        return sum(document.n_supervised for document in self.documents)


@dataclass
class Checked:
    """What was found about a recipe's model and data."""

    recipe: Recipe
    found: hub.LocalModel
    config: PreTrainedConfig
    renderer: Renderer
    targets: list[models.Target]
    data: records.Records
    rows: list[Row] = field(default_factory=list)
    """Trainable rows in the order of the file."""
    faults: list[Fault] = field(default_factory=list)
    repeats: list[tuple[Origin, Origin]] = field(default_factory=list)
    """Rows that say the same as an earlier one, with that one."""

    @property
    def ok(self) -> bool:
        """Training may start: there are rows to train on, and faults (if any) are set aside knowingly."""
        return bool(self.rows) and (not self.faults or self.recipe.data.allow_set_aside)

    @property
    def n_set_aside(self) -> int:
        """Rows that are not trained on because of a fault."""
        return len(self.faults)

    def require_ok(self) -> None:
        """Raises DataError unless training may start."""
        if self.ok:
            return
        first = self.faults[0]
        if not self.rows:
            raise DataError(
                self.data.path,
                f"{self.n_set_aside} faulty rows and none to train on",
                "at least one good row",
                str(first),
                self.faults,
            )
        raise DataError(
            self.data.path,
            f"{self.n_set_aside} of {self.data.n_rows} rows faulty",
            "rows without faults",
            "Mend them, or go on without them: --set data.allow_set_aside=true.",
            self.faults,
        )


def check(recipe: Recipe, found: hub.LocalModel | None = None, data: records.Records | None = None) -> Checked:
    """Reads and renders every row of the recipe's data for its model; needs tokenizer and config, no weights.

    `found` and `data` spare finding the model and reading the file again. Faulty rows are collected, not raised.
    Raises what makes any answer impossible: ModelError, TemplateError,
    DataError (the file as a whole), RecipeError (targets, columns).
    """
    data = data or records.read(recipe.data.path, recipe.data.columns, recipe.template.system)
    found = found or locate(recipe, weights=False)
    config = models.load_config(found.folder)
    renderer = models.open_renderer(found, recipe.template)
    checked = Checked(recipe, found, config, renderer, models.targets(models.skeleton(config), recipe.lora), data)
    limit = _longest_allowed(recipe, config)
    first_with: dict[tuple[tuple[int, ...], ...], Origin] = {}
    for conversation, result in zip(data.conversations, renderer.render_all(data.conversations), strict=True):
        if isinstance(result, Fault):
            checked.faults.append(result)
            continue
        longest = max(len(document.token_ids) for document in result)
        if longest > limit:
            raised = "Shorten the row" if recipe.data.max_length == "auto" else "Raise data.max_length"
            checked.faults.append(
                Fault(
                    conversation.origin,
                    "row",
                    f"{longest} tokens",
                    f"at most {limit}",
                    f"{raised}, or set it aside; nothing is ever cut.",
                )
            )
            continue
        key = tuple(document.token_ids for document in result)
        if earlier := first_with.get(key):
            checked.repeats.append((conversation.origin, earlier))
            if recipe.data.on_repeats == "fault":
                checked.faults.append(
                    Fault(
                        conversation.origin,
                        "row",
                        f"the same as {earlier}",
                        "each example once",
                        "Delete it, or leave data.on_repeats at note.",
                    )
                )
                continue
        else:
            first_with[key] = conversation.origin
        checked.rows.append(Row(conversation, result))
    checked.faults = sorted([*data.faults, *checked.faults], key=lambda fault: fault.origin.line)
    return checked


def locate(recipe: Recipe, *, weights: bool) -> hub.LocalModel:
    """The recipe's model on this machine, fetched if need be, in a folder that transformers reads."""
    return models.prepared(hub.locate(recipe.model.name, recipe.model.revision, weights=weights))


def hold_out(checked: Checked) -> tuple[list[Row], list[Row]]:
    """The rows to train on and those to measure on: a pure function of seed, share and the data's digest."""
    settings, rows = checked.recipe, checked.rows
    count = min(int(len(rows) * settings.eval.hold_out), HELD_OUT_AT_MOST)
    chosen = set(random.Random(f"{settings.train.seed}:{checked.data.digest}:hold-out").sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def ledger(checked: Checked, held_out: Sequence[Row]) -> list[dict[str, str | int]]:
    """A line per row of the data: trained, held out, or set aside and why; in the order of the file."""
    held = {id(row) for row in held_out}
    lines: list[tuple[Origin, dict[str, str | int]]] = []
    for row in checked.rows:
        state: Literal["held_out", "trained"] = "held_out" if id(row) in held else "trained"
        account = {"tokens": row.n_tokens, "supervised_tokens": row.n_supervised}
        lines.append((row.conversation.origin, {"state": state, **account}))
    for fault in checked.faults:  # one a row
        reason = f"{fault.field}: found {fault.found}; expected {fault.expected}"
        lines.append((fault.origin, {"state": "set_aside", "reason": reason}))
    lines.sort(key=lambda line: line[0].line)
    return [{origin.unit: origin.line, **account} for origin, account in lines]


def _longest_allowed(recipe: Recipe, config: PreTrainedConfig) -> int:
    context = models.context_length(config)
    asked = recipe.data.max_length
    if asked == "auto":
        return context
    if asked > context:
        raise RecipeError(
            "data.max_length",
            str(asked),
            f"at most {context}, which is all the model can read",
            "Lower it, or leave it at auto.",
        )
    return asked
