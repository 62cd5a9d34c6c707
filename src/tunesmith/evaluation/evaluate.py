"""Base against tuned model: what is measured on rows that neither saw, and what it cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith import caller, models
from tunesmith import chat as chats
from tunesmith.chat import Chat, Reply
from tunesmith.data.rows import Row, Rows
from tunesmith.engine.hf.losses import losses
from tunesmith.errors import RunError
from tunesmith.evaluation import harness, scores
from tunesmith.evaluation import verdict as verdicts
from tunesmith.evaluation.general import TOKENS, Kept, kept, questions
from tunesmith.evaluation.verdict import Compared, Side
from tunesmith.language import marked, said
from tunesmith.recipe import Recipe
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.training.checking import check, hold_out
from tunesmith.training.planning import clock
from tunesmith.training.run import recipe_of
from tunesmith.types import Message, Rendered

ASKED_AT_MOST = 100
"""Held-out rows whose replies are written and compared; the loss is measured on all of them."""

_TOKENS_AT_ONCE = 1024
_ENOUGH_REPLIES = 8  # to say from how long they took how long others will take
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
    short: int
    """Rows that were answered and whose own answer is short: those of `exact`."""
    verdict: verdicts.Name
    sentence: str
    """The verdict with its reasons."""
    reserved: bool
    """Whether the sentence says something that speaks against the tuned model beside the verdict."""
    advice: tuple[str, ...]
    """What to do next, as far as the figures say it."""
    answers: tuple[Answer, ...]
    """Worst first."""
    general: tuple[tuple[str, str, bool, str, bool], ...]
    """Question, the base's reply and whether it is right, the tuned model's and whether it is."""
    kept: tuple[Kept, ...]
    """What became of these, by language."""
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
    announce: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Measures a finished run on its held-out rows, or on all rows of another file.

    `judge` says for each answer who was preferred; `tasks` are those of lm-evaluation-harness to do as well;
    `announce` is told once what will be done, `tell` what is being done, how far it is, and how long it will take as
    soon as that is known. Raises RunError when the run has no adapter or no held-out rows, DataError when the file
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
    evaluation = _measure(chat, list(rows), where, known, curve, judge, tell, announce)
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
    announce: Callable[[str], None],
) -> Evaluation:
    documents = [document for row in rows for document in row.documents]
    n_supervised = [document.n_supervised for document in documents]
    right, wrong = _own_and_other_questions(
        [row.documents[-1] for row in rows], models.context_length(chat.model.config)
    )
    n_replied = [document.n_supervised for document in right]
    asked = rows[:ASKED_AT_MOST]
    n_short = sum(map(_is_short, asked))
    n_texts = len(right) * (2 if right == documents else 3)
    pace = _Pace(n_texts, len(asked) + len(questions()), tell)
    announce(
        said(
            "Base and tuned model are compared: the loss of {rows} held-out rows, then answers to {asked} of them and "
            "to {general} general questions, {replies} replies in all. How long it takes is said with the first of "
            "them.",
            rows=len(rows),
            asked=len(asked),
            general=len(questions()),
            replies=2 * (len(asked) + len(questions())),
        )
    )
    sides: list[Side] = []
    by_row: list[list[float]] = []
    likeness: list[list[float]] = []
    exact: list[list[float]] = []
    replies: list[list[Reply]] = []
    general: list[list[tuple[str, bool]]] = []
    for base in (True, False):
        pace.begin(base=base)
        own = _losses(chat, right, base, pace)
        every = own if right == documents else _losses(chat, documents, base, pace)
        per_token = [loss / n for loss, n in zip(every, n_supervised, strict=True)]
        other = _losses(chat, wrong, base, pace)
        gains = [(b - a) / n for a, b, n in zip(own, other, n_replied, strict=True)]
        written, seconds = _answer(chat, asked, base, pace)
        answered = _answer_general(chat, base, pace.wrote_after(written))
        like = [scores.likeness(r.text, _reference(row)) for r, row in zip(written, asked, strict=True)]
        same = [
            float(scores.same(reply.text, _reference(row)))
            for reply, row in zip(written, asked, strict=True)
            if _is_short(row)
        ]
        sides.append(
            Side(
                loss=sum(every) / sum(n_supervised),
                loss_interval=scores.interval(per_token, n_supervised),
                listening=sum(g * n for g, n in zip(gains, n_replied, strict=True)) / sum(n_replied),
                listening_interval=scores.interval(gains, n_replied),
                likeness=_mean(like),
                exact=_mean(same) if same else None,
                stopped=_mean([float(reply.stopped_by == "stop") for reply in written]),
                repetition=_mean([scores.repetition(reply.text) for reply in written]),
                copied=_copied(written, asked, known),
                general=sum(flag for _, flag in answered),
                tokens_per_second=sum(len(reply.token_ids) for reply in written) / seconds,
            )
        )
        by_row.append(per_token)
        likeness.append(like)
        exact.append(same)
        replies.append(written)
        general.append(answered)
    change = scores.interval(_changes(*by_row), n_supervised)
    compared = Compared(
        rows=len(rows),
        answered=len(asked),
        short=n_short,
        loss=change,
        likeness=scores.interval(_changes(*likeness)),
        exact=scores.interval(_changes(*exact)) if n_short else None,
    )
    what_was_kept = kept(*([flag for _, flag in answered] for answered in general))
    verdict = verdicts.conclude(sides[0], sides[1], compared, what_was_kept)
    listens = sides[1].listening_interval[0] > 0
    advice = verdicts.advice(verdict.name, curve, verdicts.has_forgotten(what_was_kept), listens)
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
        short=n_short,
        verdict=verdict.name,
        sentence=verdict.sentence,
        reserved=verdict.reserved,
        advice=tuple(map(caller.told, advice)),
        answers=tuple(sorted(answers, key=lambda answer: answer.base_loss - answer.tuned_loss)),
        general=tuple((q.question, *b, *t) for q, b, t in zip(questions(), general[0], general[1], strict=True)),
        kept=what_was_kept,
        judge=preferred,
    )


class _Pace:
    """Says how far a comparison is, and how long it will still take, as soon as some replies are written: what the
    base took is expected of the tuned model."""

    def __init__(self, n_texts: int, n_replies: int, tell: Callable[[str], None]) -> None:
        """`n_texts` are read by each of the models, and `n_replies` written."""
        self._n_texts, self._n_replies, self._tell = n_texts, n_replies, tell
        self._reading = 0.0  # seconds, of the base
        self._earlier = 0.0, 0  # seconds and replies of the base, while the tuned model is measured
        self._writing, self._n_ended = 0.0, 0
        self._said = ""

    def begin(self, *, base: bool) -> None:
        """The base, and after it the tuned model."""
        self._base = base
        self._earlier = self._writing, self._n_ended
        self._began = time.monotonic()
        self._writing, self._n_read, self._n_ended = 0.0, 0, 0
        self.read(0)

    def read(self, n: int) -> None:
        """So many more texts are read."""
        self._n_read += n
        self._read_at = time.monotonic()
        if self._base:
            self._reading = self._read_at - self._began
        doing = marked("The base reads: {n} of {all} texts")
        if not self._base:
            doing = marked("The tuned model reads: {n} of {all} texts")
        self._say(said(doing, n=self._n_read, all=self._n_texts))

    def wrote(self, n: int, n_tokens: int) -> None:
        """So many replies of this model have come to their end, and so many tokens are written."""
        self._n_ended, self._writing = n, time.monotonic() - self._read_at
        doing = marked("The base answers: {n} of {all} replies, {tokens:,} tokens")
        if not self._base:
            doing = marked("The tuned model answers: {n} of {all} replies, {tokens:,} tokens")
        self._say(said(doing, n=n, all=self._n_replies, tokens=n_tokens))

    def wrote_after(self, replies: Sequence[Reply]) -> Callable[[int, int], None]:
        """As `wrote`, for what is written after some replies."""
        n_before, tokens_before = len(replies), sum(len(reply.token_ids) for reply in replies)
        return lambda n, n_tokens: self.wrote(n_before + n, tokens_before + n_tokens)

    def _say(self, doing: str) -> None:
        seconds, n = (before + now for before, now in zip(self._earlier, (self._writing, self._n_ended), strict=True))
        if n >= _ENOUGH_REPLIES:
            to_read = 1 if self._base else 1 - self._n_read / self._n_texts
            to_write = self._n_replies * (2 if self._base else 1) - self._n_ended
            left = seconds / n * to_write + self._reading * to_read
            doing = said("{doing}, about {time} left", doing=doing, time=clock(left))
        if doing != self._said:
            self._said = doing
            self._tell(doing)


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


def _losses(chat: Chat, documents: Sequence[Rendered], base: bool, pace: _Pace) -> list[float]:
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
            pace.read(len(some))
            start = stop
    return [found[number] for number in range(len(documents))]


# --- replies ----------------------------------------------------------------------------------------------------------


def _answer(chat: Chat, rows: Sequence[Row], base: bool, pace: _Pace) -> tuple[list[Reply], float]:
    """Greedy replies to the rows' last turns, at most twice as long as the longest answer of the rows; and seconds."""
    longest = max(row.documents[-1].replies[-1][1] - row.documents[-1].replies[-1][0] for row in rows)
    talks = [row.conversation.messages[:-1] for row in rows]
    began = time.perf_counter()
    n_tokens = min(max(64, 2 * longest), chats.MAX_TOKENS)
    written = chat.replies(talks, temperature=0, max_tokens=n_tokens, base=base, on_written=pace.wrote)
    return written, time.perf_counter() - began


def _answer_general(chat: Chat, base: bool, on_written: Callable[[int, int], None]) -> list[tuple[str, bool]]:
    talks = [[Message("user", question.question)] for question in questions()]
    written = chat.replies(talks, temperature=0, max_tokens=TOKENS, base=base, on_written=on_written)
    return [(r.text, question.right(r.text)) for r, question in zip(written, questions(), strict=True)]


def _reference(row: Row) -> str:
    return row.conversation.messages[-1].content.strip()


def _is_short(row: Row) -> bool:
    return len(scores.words(_reference(row))) <= scores.SHORT_WORDS


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


def _changes(base: Sequence[float], tuned: Sequence[float]) -> list[float]:
    return [after - before for before, after in zip(base, tuned, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
