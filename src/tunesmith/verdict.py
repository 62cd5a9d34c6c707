"""Is a tuned model better than its base? The rules by which that is said, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.language import marked, said

Name = Literal["better", "learned, but forgot", "too few rows", "no difference", "worse"]

LEAST_ROWS = 10
"""Held-out rows without which nothing is called better."""
_LOST = 1 / 5
"""A model that has lost more than this share of its general answers is worse, whatever it has learned."""


def rules() -> list[tuple[str, str]]:
    """Each verdict with what must hold for it, in the reader's language; the first that does is given."""
    return [(called(name), said(rule, least=LEAST_ROWS)) for name, rule in _RULES]


def called(name: Name) -> str:
    """A verdict's name in the reader's language."""
    return said(_NAMES[name])


def meanings() -> list[tuple[str, str]]:
    """What the words of the rules mean, and those of what is said beside a verdict, in the reader's language."""
    return [(said(words), said(meaning)) for words, meaning in _MEANINGS]


_RULES: tuple[tuple[Name, str], ...] = (
    (
        "worse",
        marked(
            "the loss of the held-out replies rose; or it has unlearned to listen: they are no likelier after their "
            "own question than after another row's although they are for the base, or less than half as much as for "
            "the base; or it forgot more than a fifth of what the base answers rightly"
        ),
    ),
    (
        "too few rows",
        marked("fewer than {least} rows are held out: what so few say of the others is chance"),
    ),
    (
        "learned, but forgot",
        marked(
            "the loss fell and the replies are likelier after their own question; but of a hundred general questions "
            "it answers fewer rightly, by at least five, and a sign test gives that less than one chance in twenty"
        ),
    ),
    ("better", marked("the loss fell, the replies are likelier after their own question, and nothing was forgotten")),
    ("no difference", marked("none of these")),
)
_MEANINGS: tuple[tuple[str, str], ...] = (
    (
        marked("rose, fell, likelier"),
        marked("the interval in which the mean lies in 95 of 100 draws of rows is wholly on one side of zero"),
    ),
    (marked("less than half as much"), marked("that interval is wholly below half of the base's mean")),
    (
        marked("it copies"),
        marked(
            "more than half of the long runs of words in its replies stand in training rows and not in the row's own "
            "answer, and twice as many as the base has"
        ),
    ),
    (
        marked("does not end"),
        marked("fewer than nine of ten replies end by themselves, and fewer than the base's"),
    ),
    (
        marked("it repeats itself"),
        marked("a tenth of what it writes stands earlier in the same reply, and twice as much as in the base's"),
    ),
)
_NAMES: dict[Name, str] = {
    "better": marked("better"),
    "learned, but forgot": marked("learned, but forgot"),
    "too few rows": marked("too few rows"),
    "no difference": marked("no difference"),
    "worse": marked("worse"),
}


@dataclass(frozen=True)
class Side:
    """What was measured of the base, or of the tuned model."""

    loss: float
    """Nats per supervised token of the held-out rows."""
    loss_interval: tuple[float, float]
    listening: float
    """By how many nats per token a reply is likelier after its own question than after another row's."""
    listening_interval: tuple[float, float]
    likeness: float
    """chrF to the row's own answer, 0 to 1."""
    exact: float | None
    """Share of replies with the words of the row's own answer, among rows whose answer is short."""
    stopped: float
    """Share of replies that ended by themselves."""
    repetition: float
    copied: float | None
    """Share of long runs of words that stand in training rows; None where no reply was long enough."""
    general: int
    """General questions answered rightly."""
    tokens_per_second: float
    """Written, with several replies side by side."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


@dataclass(frozen=True)
class Verdict:
    """What is said of a tuned model."""

    name: Name
    sentence: str
    """With its reasons."""


def conclude(base: Side, tuned: Side, change: tuple[float, float], rows: int, lost: int, gained: int) -> Verdict:
    """The verdict by the rules above.

    `change`: interval of the tuned model's loss minus the base's, in nats per token, over `rows` held-out rows. `lost`
    and `gained`: general questions that only the base, or only the tuned model, answers rightly.
    """
    figures = said("loss {base:.2f} → {tuned:.2f} nats per token", base=base.loss, tuned=tuned.loss)
    listens, listened = tuned.listening_interval[0] > 0, base.listening_interval[0] > 0
    forgot = has_forgotten(lost, gained)
    kept = said("{n} general questions of 100 right, {before} before", n=tuned.general, before=base.general)
    name: Name
    if change[0] > 0:
        name = "worse"
        text = said("Worse than the base: the loss rose on your data ({figures})", figures=figures)
    elif listened and not listens:
        name, text = "worse", said("Worse than the base: its answers no longer depend on the questions")
    elif listened and tuned.listening_interval[1] < base.listening / 2:
        name = "worse"
        text = said("Worse than the base: its answers depend on the questions less than half as much")
    elif forgot and lost - gained > _LOST * base.general:
        name = "worse"
        text = said("Worse than the base: it forgot more than a fifth of what that knows ({kept})", kept=kept)
        forgot = False  # it is said
    elif rows < LEAST_ROWS:
        name = "too few rows"
        text = said(
            "{rows} held-out rows are too few to say more than {figures}: at least {least} are needed",
            rows=rows,
            figures=figures,
            least=LEAST_ROWS,
        )
    elif change[1] < 0 and listens and forgot:
        name = "learned, but forgot"
        text = said("It learned your data ({figures}), but forgot: {kept}", figures=figures, kept=kept)
        forgot = False
    elif change[1] < 0 and listens:
        name = "better"
        text = said("Better on your data ({figures}), nothing forgotten ({kept})", figures=figures, kept=kept)
    elif change[1] < 0:
        name = "no difference"
        text = said(
            "No better than the base: it has the tone of your data ({figures}), but neither model's answers depend on "
            "the questions of these rows (do the rows' answers belong to their questions?)",
            figures=figures,
        )
    else:
        name = "no difference"
        text = said("No difference that {rows} rows could show ({figures})", rows=rows, figures=figures)
    besides = [said("it forgot: {kept}", kept=kept)] if forgot else []
    text += "".join(said("; {more}", more=more) for more in (*besides, *_harms(base, tuned)))
    return Verdict(name, said("{sentence}.", sentence=text))


def has_forgotten(lost: int, gained: int) -> bool:
    """Whether so many general questions lost, and so many gained, are more than chance."""
    return lost - gained >= 5 and _chance(lost, gained) < 0.05


def advice(verdict: Name, held_out: Sequence[tuple[float, float]], forgot: bool, listens: bool) -> Iterator[str]:
    """What follows from the figures: what to do next, where something can be done.

    `held_out`: epochs that had passed and the held-out loss then, as it was measured while it trained.
    """
    if forgot:
        yield said("It forgot: train with more of train.rehearse, a lower train.learning_rate or fewer train.epochs.")
    if verdict == "too few rows":
        yield said("Hold out more rows (eval.hold_out), or name a file of others: --data FILE.")
    if not listens:
        yield said(
            "Its answers do not depend on the questions: look at the rows whose answers fit other questions as well."
        )
    if len(held_out) < 3:  # one is from before the training
        return
    epochs, losses = zip(*held_out, strict=True)
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[-1] > 1.01 * losses[best]:
        yield said(
            "The held-out loss was lowest after epoch {epoch:.3g} ({lowest:.3f}) and is {now:.3f} now: train with "
            "eval.keep=best, or for fewer epochs.",
            epoch=epochs[best],
            lowest=losses[best],
            now=losses[-1],
        )
    elif losses[-1] < 0.97 * losses[-2]:
        yield said(
            "The held-out loss was still falling ({before:.3f} → {now:.3f}): train for more epochs.",
            before=losses[-2],
            now=losses[-1],
        )


def _harms(base: Side, tuned: Side) -> Iterator[str]:
    if tuned.copied is not None and tuned.copied > max(0.5, 2 * (base.copied or 0)):
        yield said("it copies: {share:.0%} of its long runs of words stand in training rows", share=tuned.copied)
    if tuned.stopped < min(0.9, base.stopped):
        yield said(
            "only {share:.0%} of its answers end by themselves, {before:.0%} before",
            share=tuned.stopped,
            before=base.stopped,
        )
    if tuned.repetition > max(0.1, 2 * base.repetition):
        yield said("it repeats itself: {share:.0%} of what it writes", share=tuned.repetition)


def _chance(lost: int, gained: int) -> float:
    """Of losing at least so many of the questions that changed, were losing and gaining equally likely (sign test)."""
    n = lost + gained
    return sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n
