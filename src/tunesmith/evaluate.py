"""Base against tuned model: what is measured on rows that neither saw, and what it cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith import caller, harness, rundir, scores
from tunesmith import chat as chats
from tunesmith import model as models
from tunesmith import verdict as verdicts
from tunesmith.chat import Chat, Reply
from tunesmith.checking import check, hold_out
from tunesmith.engine.step import losses
from tunesmith.errors import RunError
from tunesmith.general import TOKENS, questions
from tunesmith.language import marked, said
from tunesmith.recipe import Recipe
from tunesmith.rows import Row, Rows
from tunesmith.rundir import RunDir
from tunesmith.training import recipe_of
from tunesmith.types import Message, Rendered
from tunesmith.verdict import Side

ASKED_AT_MOST = 100
"""Held-out rows whose replies are written and compared; the loss is measured on all of them."""

_TOKENS_AT_ONCE = 1024
_TRAINING_ROWS = 100_000  # whose replies are looked through for copies


@dataclass(frozen=True)
class Answer:
    """A held-out row, its own answer, and those of both models."""

    where: str
    question: str
    reference: str
    base: str
    tuned: str
    base_likeness: float
    tuned_likeness: float
    base_loss: float
    """Nats per token of the row's own answer."""
    tuned_loss: float
    judged: str | None = None
    """What a judge preferred, where there was one: base, tuned or neither."""


@dataclass(frozen=True)
class Evaluation:
    """Base against tuned."""

    rows: int
    data: str
    base: Side
    tuned: Side
    change_interval: tuple[float, float]
    """Of tuned loss minus base loss, by row."""
    verdict: verdicts.Name
    sentence: str
    """The verdict with its reasons."""
    advice: tuple[str, ...]
    """What to do next, as far as the figures say it."""
    answers: tuple[Answer, ...]
    """Worst first."""
    general: tuple[tuple[str, str, bool, str, bool], ...]
    """Question, the base's reply and whether it is right, the tuned model's and whether it is."""
    judge: dict[str, int] | None = None
    tasks: dict[str, dict[str, float]] | None = None

    def as_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        for side in ("base", "tuned"):
            fields[side]["perplexity"] = getattr(self, side).perplexity
        return fields


def evaluate(
    path: Path,
    data: Path | None = None,
    judge: Callable[[Sequence[Answer]], list[str]] | None = None,
    tasks: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measures a finished run on its held-out rows, or on all rows of another file.

    `judge` says for each answer who was preferred; `tasks` are those of lm-evaluation-harness to do as well; `tell` is
    told what is being done. Raises RunError when the run has no adapter or no held-out rows, DataError when the file
    has faults; ProofError as `chat.load` does.
    """
    run = rundir.open_run(path)
    recipe, _, manifest = recipe_of(run)
    tell(said("Reading the rows …"))
    trained, rows, where = _rows(run, recipe, manifest, data)
    if len(rows) < 2:
        raise RunError(
            str(path),
            said("{n} held-out rows", n=len(rows)),
            said("at least two"),
            said("Name a file of other rows: eval --data FILE."),
        )
    known = None if trained is None else _runs_of(trained)
    tell(said("Loading the model …"))
    chat = chats.load(path)
    curve = [(line["epoch"], line["loss"]) for line in rundir.read_lines(run.held_out)]
    evaluation = _measure(chat, list(rows), where, known, curve, judge, tell)
    if trained is None:
        advice = said(
            "{path} is not there as it was at training, so copies of its rows were not looked for.",
            path=recipe.data.path,
        )
        evaluation = replace(evaluation, advice=(advice, *evaluation.advice))
    if tasks:
        tell("lm-evaluation-harness …")
        evaluation = replace(evaluation, tasks=harness.measure(chat, tasks))
    return evaluation


def _rows(run: RunDir, recipe: Recipe, manifest: Mapping[str, Any], data: Path | None) -> tuple[Rows | None, Rows, str]:
    """The rows that were trained on, those to measure on, and the file that has these.

    Where the data is no longer what was trained on, None, and the held-out rows that the run has kept.
    """

    def read(file: Path, **others: Any) -> Rows:
        settings = recipe.data.model_copy(update={"path": str(file), **others})
        checked = check(recipe.model_copy(update={"data": settings}))
        checked.require_ok()
        return checked.rows

    trained = held_out = None
    if Path(recipe.data.path).exists():
        checked = check(recipe)
        if checked.data.digest == manifest["data"]["sha256"]:
            trained, held_out = hold_out(checked)
    if data is not None:
        return trained, read(data), str(data)
    if held_out is not None:
        return trained, held_out, recipe.data.path
    if run.held_out_rows.is_file():
        return None, read(run.held_out_rows, columns={}, allow_set_aside=True), str(run.held_out_rows)
    raise RunError(
        recipe.data.path,
        said("other rows than at training"),
        said("the file that was trained on"),
        said("Put it back."),
    )


def _measure(
    chat: Chat,
    rows: Sequence[Row],
    data: str,
    known: frozenset[scores.Run] | None,
    curve: Sequence[tuple[float, float]],
    judge: Callable[[Sequence[Answer]], list[str]] | None,
    tell: Callable[[str], None],
) -> Evaluation:
    documents = [document for row in rows for document in row.documents]
    n_supervised = [document.n_supervised for document in documents]
    right, wrong = _own_and_other_questions(
        [row.documents[-1] for row in rows], models.context_length(chat.model.config)
    )
    n_replied = [document.n_supervised for document in right]
    asked = rows[:ASKED_AT_MOST]
    sides: list[Side] = []
    by_row: list[list[float]] = []
    likeness: list[list[float]] = []
    replies: list[list[Reply]] = []
    general: list[list[tuple[str, bool]]] = []
    for base in (True, False):
        measuring = marked("Measuring the tuned model on {n} rows …")
        if base:
            measuring = marked("Measuring the base on {n} rows …")
        tell(said(measuring, n=len(rows)))
        own = _losses(chat, right, base)
        every = own if right == documents else _losses(chat, documents, base)
        per_token = [loss / n for loss, n in zip(every, n_supervised, strict=True)]
        gains = [(b - a) / n for a, b, n in zip(own, _losses(chat, wrong, base), n_replied, strict=True)]
        answering = marked("The tuned model answers {n} rows and {general} general questions …")
        if base:
            answering = marked("The base answers {n} rows and {general} general questions …")
        tell(said(answering, n=len(asked), general=len(questions())))
        written, seconds = _answer(chat, asked, base)
        answered = _answer_general(chat, base)
        like = [scores.likeness(r.text, _reference(row)) for r, row in zip(written, asked, strict=True)]
        sides.append(
            Side(
                loss=sum(every) / sum(n_supervised),
                loss_interval=scores.interval(per_token, n_supervised),
                listening=sum(g * n for g, n in zip(gains, n_replied, strict=True)) / sum(n_replied),
                listening_interval=scores.interval(gains, n_replied),
                likeness=_mean(like),
                exact=_exact(written, asked),
                stopped=_mean([float(reply.stopped_by == "stop") for reply in written]),
                repetition=_mean([scores.repetition(reply.text) for reply in written]),
                copied=_copied(written, asked, known),
                general=sum(flag for _, flag in answered),
                tokens_per_second=sum(len(reply.token_ids) for reply in written) / seconds,
            )
        )
        by_row.append(per_token)
        likeness.append(like)
        replies.append(written)
        general.append(answered)
    changes = [tuned - base for base, tuned in zip(*by_row, strict=True)]
    change = scores.interval(changes, n_supervised)
    lost = sum(b and not t for (_, b), (_, t) in zip(*general, strict=True))
    gained = sum(t and not b for (_, b), (_, t) in zip(*general, strict=True))
    verdict = verdicts.conclude(sides[0], sides[1], change, len(rows), lost, gained)
    listens = sides[1].listening_interval[0] > 0
    advice = verdicts.advice(verdict.name, curve, verdicts.has_forgotten(lost, gained), listens)
    # A row of several documents is shown with the loss of its last one.
    last = [n - 1 for n in itertools.accumulate(len(row.documents) for row in rows)]
    answers = [
        Answer(
            str(row.conversation.origin),
            row.conversation.messages[-2].content,
            _reference(row),
            replies[0][i].shown,
            replies[1][i].shown,
            likeness[0][i],
            likeness[1][i],
            by_row[0][last[i]],
            by_row[1][last[i]],
        )
        for i, row in enumerate(asked)
    ]
    preferred = None
    if judge is not None:
        tell(said("A judge compares {n} pairs, each in both orders …", n=len(answers)))
        votes = judge(answers)
        answers = [replace(a, judged=vote) for a, vote in zip(answers, votes, strict=True)]
        preferred = {name: votes.count(name) for name in ("tuned", "base", marked("neither"))}
    return Evaluation(
        rows=len(rows),
        data=data,
        base=sides[0],
        tuned=sides[1],
        change_interval=change,
        verdict=verdict.name,
        sentence=verdict.sentence,
        advice=tuple(map(caller.told, advice)),
        answers=tuple(sorted(answers, key=lambda answer: answer.base_loss - answer.tuned_loss)),
        general=tuple((q.question, *b, *t) for q, b, t in zip(questions(), general[0], general[1], strict=True)),
        judge=preferred,
    )


# --- losses -----------------------------------------------------------------------------------------------------------


def _own_and_other_questions(documents: Sequence[Rendered], readable: int) -> tuple[list[Rendered], list[Rendered]]:
    """Each document with its last reply alone learned, and that reply after the prompt of the next document that asks
    something else, as far as the model can read both."""
    right, wrong = [], []
    for number, document in enumerate(documents):
        start, stop = document.replies[-1]
        reply = document.token_ids[start:stop]
        others = (*documents[number + 1 :], *documents[:number])
        prompts = (o.prompt_ids for o in others if len(o.prompt_ids) + len(reply) <= readable)
        other = next((prompt for prompt in prompts if prompt != document.prompt_ids), document.prompt_ids)
        right.append(
            document
            if len(document.replies) == 1
            else Rendered(document.token_ids[:stop], ((start, stop),), document.origin)
        )
        wrong.append(Rendered(other + reply, ((len(other), len(other) + len(reply)),), document.origin))
    return right, wrong


def _losses(chat: Chat, documents: Sequence[Rendered], base: bool) -> list[float]:
    """Each document's loss, summed over what is learned."""
    order = sorted(range(len(documents)), key=lambda n: len(documents[n].token_ids))
    found: dict[int, float] = {}
    start = 0
    with chat.switched(base=base):
        while start < len(order):
            stop = start + 1
            while stop < len(order) and len(documents[order[stop]].token_ids) * (stop + 1 - start) <= _TOKENS_AT_ONCE:
                stop += 1
            some = order[start:stop]
            found |= zip(some, losses(chat.model, [documents[n] for n in some]), strict=True)
            start = stop
    return [found[number] for number in range(len(documents))]


# --- replies ----------------------------------------------------------------------------------------------------------


def _answer(chat: Chat, rows: Sequence[Row], base: bool) -> tuple[list[Reply], float]:
    """Greedy replies to the rows' last turns, at most twice as long as the longest answer of the rows; and seconds."""
    longest = max(row.documents[-1].replies[-1][1] - row.documents[-1].replies[-1][0] for row in rows)
    talks = [row.conversation.messages[:-1] for row in rows]
    began = time.perf_counter()
    written = chat.replies(talks, temperature=0, max_tokens=min(max(64, 2 * longest), chats.MAX_TOKENS), base=base)
    return written, time.perf_counter() - began


def _answer_general(chat: Chat, base: bool) -> list[tuple[str, bool]]:
    talks = [[Message("user", question.question)] for question in questions()]
    written = chat.replies(talks, temperature=0, max_tokens=TOKENS, base=base)
    return [(r.text, question.right(r.text)) for r, question in zip(written, questions(), strict=True)]


def _reference(row: Row) -> str:
    return row.conversation.messages[-1].content.strip()


def _exact(replies: Sequence[Reply], rows: Sequence[Row]) -> float | None:
    hits = [
        float(scores.same(reply.text, _reference(row)))
        for reply, row in zip(replies, rows, strict=True)
        if len(scores.words(_reference(row))) <= scores.SHORT_WORDS
    ]
    return _mean(hits) if hits else None


def _runs_of(trained: Rows) -> frozenset[scores.Run]:
    """The long runs of words in the replies that were trained on."""
    return scores.long_runs(
        message.content
        for number in range(min(len(trained), _TRAINING_ROWS))
        for message in trained[number].conversation.messages
        if message.role == "assistant"
    )


def _copied(replies: Sequence[Reply], rows: Sequence[Row], known: frozenset[scores.Run] | None) -> float | None:
    if known is None:
        return None
    shares = [scores.copied(r.text, _reference(row), known) for r, row in zip(replies, rows, strict=True)]
    found = [share for share in shares if share is not None]
    return _mean(found) if found else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
