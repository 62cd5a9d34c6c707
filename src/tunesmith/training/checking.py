"""Everything that can be known before a weight is read: every row read, rendered and accounted for."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedConfig

from tunesmith import hub, markup, models
from tunesmith.data import cache, records
from tunesmith.data.records.found import plain
from tunesmith.data.render import Renderer
from tunesmith.data.rows import Rows, faults_of
from tunesmith.errors import DataError, RecipeError
from tunesmith.language import said
from tunesmith.recipe import Recipe
from tunesmith.training import rehearsal
from tunesmith.types import Fault, Origin

HELD_OUT_AT_MOST = 200
_SHOWN = 10  # faults and lines, in a notebook


@dataclass(frozen=True)
class Checked:
    """What was found about a recipe's model and data."""

    recipe: Recipe
    found: hub.LocalModel
    config: PreTrainedConfig
    renderer: Renderer
    targets: list[models.Target]
    data: records.Records
    n_read: int
    """Rows of the file, as far as it could be read."""
    rows: Rows
    """Trainable rows in the order of the file."""
    faults: list[Fault]
    """At most one a row, in the order of the file."""
    repeats: list[tuple[Origin, Origin]]
    """Rows that say the same as an earlier one, with that one."""
    contradictions: list[tuple[Origin, Origin]]
    """Rows with the prompt of an earlier one and another reply, with that one."""

    def __repr__(self) -> str:
        return f"<Checked {self._in_a_line}>"

    def _repr_html_(self) -> str:
        total, supervised = int(self.rows.n_tokens.sum()), int(self.rows.n_supervised.sum())
        facts = [
            (said("model"), self.recipe.model.name),
            (said("template"), self.renderer.template.described),
            (said("system text"), self.system_text),
            (said("tokens"), said("{total:,}, of them learned {learned:,}", total=total, learned=supervised)),
        ]
        for name, pairs in ((said("repeats"), self.repeats), (said("contradictions"), self.contradictions)):
            lines = ", ".join(str(row.line) for row, _ in pairs[:_SHOWN]) + " …" * (len(pairs) > _SHOWN)
            facts += [(name, said("{n:,} rows (lines {lines})", n=len(pairs), lines=lines))] if pairs else []
        parts = [markup.table(facts)]
        if shown := self.faults[:_SHOWN]:
            rows = [(fault.origin, fault.field, fault.found, fault.expected, fault.fix) for fault in shown]
            parts.append(markup.table(rows, ("", said("field"), said("found"), said("expected"), said("fix"))))
        if more := self.n_set_aside - len(shown):
            parts.append(markup.paragraph(said("… and {n:,} more; all of them are in .faults", n=more)))
        return markup.block(self._in_a_line, *parts)

    @property
    def _in_a_line(self) -> str:
        return said(
            "{path}: {account}; {verdict}",
            path=plain(self.data.path),
            account=self.account,
            verdict=said("ok") if self.ok else said("not ok"),
        )

    @property
    def ok(self) -> bool:
        """Training may start: there are rows to train on, and faults (if any) are set aside knowingly."""
        return bool(self.rows) and (not self.faults or self.recipe.data.allow_set_aside)

    @property
    def n_set_aside(self) -> int:
        """Rows that are not trained on because of a fault."""
        return len(self.faults)

    @property
    def n_held_out(self) -> int:
        """Rows that training will measure on and not learn from."""
        return _n_held_out(len(self.rows), self.recipe.eval.hold_out)

    @property
    def account(self) -> str:
        """What becomes of the rows that were read, in a phrase."""
        return said(
            "{read:,} read = {to_train:,} to train on + {held_out:,} to hold out + {set_aside:,} to set aside",
            read=self.n_read,
            to_train=len(self.rows) - self.n_held_out,
            held_out=self.n_held_out,
            set_aside=self.n_set_aside,
        )

    @property
    def system_text(self) -> str:
        """Which system text the model reads, in a phrase: the rows' own (looked for in the first thousand), that of the
        recipe, the one that the template writes, or none."""
        template, given = self.renderer.template, self.recipe.template.system
        first = (row.conversation.messages[0] for row in self.rows[:1000])
        own = any(message.role == "system" and message.content != given for message in first)
        where = said(", where a row has none") if own else ""
        none = given is None and not template.own_system
        rest = []
        if given is not None:
            rest = [said("“{text}”{where}", text=given, where=where)]
        elif template.own_system:
            rest = [said("the template's own{where}: “{text}”", where=where, text=template.own_system)]
        elif not own:
            rest = [said("none")]
        text = said("; ").join([*([said("each row's own")] if own else []), *rest])
        if not template.folds_system:
            return text
        if none and not own:
            return text + said(
                "; it would go in front of the first user turn, a blank line between: the template has no place for it"
            )
        return text + said(
            "; it goes in front of the first user turn, a blank line between: the template has no place for it"
        )

    def require_ok(self) -> None:
        """Raises DataError unless training may start."""
        if self.ok:
            return
        first = self.faults[0]
        if not self.rows:
            raise DataError(
                self.data.path,
                said("{n} faulty rows and none to train on", n=self.n_set_aside),
                said("at least one good row"),
                str(first),
                self.faults,
            )
        raise DataError(
            self.data.path,
            said("{n} of {read} rows faulty", n=self.n_set_aside, read=self.n_read),
            said("rows without faults"),
            said("Mend them, or go on without them: --set data.allow_set_aside=true."),
            self.faults,
        )


def check(
    recipe: Recipe,
    found: hub.LocalModel | None = None,
    data: records.Records | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Checked:
    """Reads and renders every row of the recipe's data for its model; needs tokenizer and config, no weights.

    `found` and `data` spare finding the model and opening the file again; `on_rows` is told how many rows of a large
    file have been rendered. Faulty rows are collected, not raised. Raises what makes any answer impossible:
    ModelError, TemplateError, DataError (the file as a whole), RecipeError (targets, columns).
    """
    data = data or records.open_file(recipe.data.path, recipe.data.columns, recipe.template.system)
    found = found or locate(recipe, weights=False)
    config = models.load_config(found.folder)
    renderer = models.open_renderer(found, recipe.template)
    targets = models.targets(models.skeleton(config), recipe.lora)
    limit = _longest_allowed(recipe, config)
    if recipe.data.rehearse is not None:
        rehearsal.prompts(recipe.data.rehearse)
    table = cache.rendered(data, renderer, on_rows)
    rows, faults = Rows(table, data), faults_of(table, data)
    faults += _too_long(recipe, rows, limit)
    rows = rows.pick(rows.longest <= limit)
    pairs = rows.repeats()
    repeats = [(rows.origin(again), rows.origin(first)) for again, first in pairs]
    if recipe.data.on_repeats == "fault" and pairs:
        fix = said("Delete it, or leave data.on_repeats at note.")
        faults += [
            Fault(at, "row", said("the same as {row}", row=first), said("each example once"), fix)
            for at, first in repeats
        ]
        kept = np.ones(len(rows), dtype=bool)
        kept[[again for again, _ in pairs]] = False
        rows = rows.pick(kept)
    contradictions = [(rows.origin(again), rows.origin(first)) for again, first in rows.contradictions()]
    faults.sort(key=lambda fault: fault.origin.line)
    return Checked(
        recipe, found, config, renderer, targets, data, table.num_rows, rows, faults, repeats, contradictions
    )


def _too_long(recipe: Recipe, rows: Rows, limit: int) -> list[Fault]:
    fix = said("Raise data.max_length, or set it aside; nothing is ever cut.")
    if recipe.data.max_length == "auto":
        fix = said("Shorten the row, or set it aside; nothing is ever cut.")
    return [
        Fault(rows.origin(i), "row", said("{n} tokens", n=rows.longest[i]), said("at most {n}", n=limit), fix)
        for i in np.flatnonzero(rows.longest > limit).tolist()
    ]


def locate(recipe: Recipe, *, weights: bool) -> hub.LocalModel:
    """The recipe's model on this machine, fetched if need be, in a folder that transformers reads."""
    return models.prepared(hub.locate(recipe.model.name, recipe.model.revision, weights=weights), weights=weights)


def hold_out(checked: Checked) -> tuple[Rows, Rows]:
    """The rows to train on and those to measure on: a pure function of seed, share and the data's digest."""
    settings, rows = checked.recipe, checked.rows
    held = np.zeros(len(rows), dtype=bool)
    chance = random.Random(f"{settings.train.seed}:{checked.data.digest}:hold-out")
    held[chance.sample(range(len(rows)), checked.n_held_out)] = True
    return rows.pick(~held), rows.pick(held)


def _n_held_out(n_rows: int, share: float | Literal["auto"]) -> int:
    if share != "auto":
        return min(int(n_rows * share), HELD_OUT_AT_MOST)
    if n_rows < 50:
        return n_rows // 5
    return 10 if n_rows < 100 else min(max(20, n_rows // 20), HELD_OUT_AT_MOST)


def held_out_in_training(checked: Checked) -> list[tuple[Origin, Origin]]:
    """Held-out rows that stand among those trained on as well, with the first of these: what is measured on them is
    memory."""
    training, held_out = hold_out(checked)
    return [(held_out.origin(row), training.origin(other)) for row, other in held_out.among(training)]


def lengths(rows: Rows) -> list[tuple[int, int]]:
    """How many rows have at most so many tokens, and more than the bound before: [(bound, rows), ...]; the last bound
    is the longest row, the limit that loses nothing."""
    longest = int(rows.longest.max(initial=0))
    bounds = [2**n for n in range(4, 31) if 2**n < longest]
    bounds = [*bounds, longest]
    counts, _ = np.histogram(rows.longest, [0.5, *(bound + 0.5 for bound in bounds)])
    return [(bound, count) for bound, count in zip(bounds, counts.tolist(), strict=True) if count or bound == longest]


def ledger(checked: Checked, training: Rows, held_out: Rows) -> Iterator[dict[str, str | int]]:
    """A line per row of the data: trained, held out, or set aside and why; in the order of the file."""
    accounts = (_account(training, "trained"), _account(held_out, "held_out"), _set_aside(checked.faults))
    unit = checked.data.unit
    for line, account in heapq.merge(*accounts, key=lambda each: each[0]):
        yield {unit: line, **account}


def _account(rows: Rows, state: Literal["trained", "held_out"]) -> Iterator[tuple[int, dict[str, str | int]]]:
    columns = (rows.lines.tolist(), rows.n_tokens.tolist(), rows.n_supervised.tolist())
    for line, n_tokens, n_supervised in zip(*columns, strict=True):
        yield line, {"state": state, "tokens": n_tokens, "supervised_tokens": n_supervised}


def _set_aside(faults: Sequence[Fault]) -> Iterator[tuple[int, dict[str, str | int]]]:
    for fault in faults:
        reason = said(
            "{field}: found {found}; expected {expected}",
            field=fault.field,
            found=fault.found,
            expected=fault.expected,
        )
        yield fault.origin.line, {"state": "set_aside", "reason": reason}


def _longest_allowed(recipe: Recipe, config: PreTrainedConfig) -> int:
    context = models.context_length(config)
    asked = recipe.data.max_length
    if asked == "auto":
        return context
    if asked > context:
        raise RecipeError(
            "data.max_length",
            str(asked),
            said("at most {n}, which is all the model can read", n=context),
            said("Lower it, or leave it at auto."),
        )
    return asked
