"""Is a tuned model better than its base? The rules by which that is said, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.evaluation.general import Kept
from tunesmith.language import marked, said

Name = Literal["better", "learned, but forgot", "too few rows", "no difference", "worse"]

LEAST_ROWS = 10
"""Held-out rows without which nothing is called better."""
_LOST = 1 / 5
"""A model that has lost more than this share of its general answers is worse, whatever it has learned."""
_FEW_RIGHT = 9 / 10
"""Held-out answers of which no larger share is known to be right are to be read."""
_LISTENS_LESS = 2 / 3
_COPIES = 1 / 5


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
            "the loss fell, the replies are likelier after their own question, and what the model writes is closer to "
            "the rows' own answers; but of the general questions, of all or of those in one language, it answers fewer "
            "rightly, by at least five, and a sign test gives that less than one chance in twenty"
        ),
    ),
    (
        "better",
        marked(
            "the loss fell, the replies are likelier after their own question, what the model writes is closer to the "
            "rows' own answers, and nothing was forgotten"
        ),
    ),
    ("no difference", marked("none of these")),
)
_MEANINGS: tuple[tuple[str, str], ...] = (
    (
        marked("rose, fell, likelier"),
        marked("the interval in which the mean lies in 95 of 100 draws of rows is wholly on one side of zero"),
    ),
    (
        marked("closer to the rows' own answers"),
        marked("likeness rose, or the share of short answers with the row's own words did"),
    ),
    (marked("less than half as much"), marked("that interval is wholly below half of the base's mean")),
    (
        marked("a lower loss does not yet mean right answers"),
        marked(
            "the loss is lower, which says that the rows' answers have become likelier, and fewer than nine of ten "
            "held-out answers are known to be right: those with the row's own words, where these are at most five"
        ),
    ),
    (
        marked("its answers depend less on the questions"),
        marked("replies are likelier after their own question by less than two thirds as much as for the base"),
    ),
    (
        marked("it copies"),
        marked(
            "more than a fifth of the long runs of words in its replies stand in training rows and not in the row's "
            "own answer, and twice as many as the base has"
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
class Compared:
    """The held-out rows, and what changed on them."""

    rows: int
    answered: int
    """Rows to which replies were written."""
    short: int
    """Of these, rows whose own answer is short."""
    loss: tuple[float, float]
    """Interval of the tuned model's loss minus the base's, in nats per token."""
    likeness: tuple[float, float]
    """Interval of the tuned model's likeness minus the base's."""
    exact: tuple[float, float] | None
    """The same of `exact`; None where no row's own answer is short."""


@dataclass(frozen=True)
class Verdict:
    """What is said of a tuned model."""

    name: Name
    sentence: str
    """With its reasons, and with what is known of right answers."""
    reserved: bool
    """Whether the sentence says something that speaks against the model beside the name."""


def conclude(base: Side, tuned: Side, compared: Compared, general: Sequence[Kept]) -> Verdict:
    """The verdict by the rules above; `general` is what became of the general questions, by language."""
    figures = said("loss {base:.2f} → {tuned:.2f} nats per token", base=base.loss, tuned=tuned.loss)
    rose, fell = compared.loss[0] > 0, compared.loss[1] < 0
    listens, listened = tuned.listening_interval[0] > 0, base.listening_interval[0] > 0
    closer = compared.likeness[0] > 0 or (compared.exact is not None and compared.exact[0] > 0)
    forgot = has_forgotten(general)
    kept = _kept(general)
    name: Name
    if rose:
        name = "worse"
        text = said("Worse than the base: the loss rose on your data ({figures})", figures=figures)
    elif listened and not listens:
        name, text = "worse", said("Worse than the base: its answers no longer depend on the questions")
    elif listened and tuned.listening_interval[1] < base.listening / 2:
        name = "worse"
        text = said("Worse than the base: its answers depend on the questions less than half as much")
    elif forgot and base.general - tuned.general > _LOST * base.general:
        name = "worse"
        text = said("Worse than the base: it forgot more than a fifth of what that knows ({kept})", kept=kept)
        forgot = False  # it is said
    elif compared.rows < LEAST_ROWS:
        name = "too few rows"
        text = said(
            "{rows} held-out rows are too few to say more than {figures}: at least {least} are needed",
            rows=compared.rows,
            figures=figures,
            least=LEAST_ROWS,
        )
    elif fell and listens and closer and forgot:
        name = "learned, but forgot"
        text = said("It learned your data ({figures}), but forgot: {kept}", figures=figures, kept=kept)
        forgot = False
    elif fell and listens and closer:
        name = "better"
        text = said("Better on your data ({figures}), nothing forgotten ({kept})", figures=figures, kept=kept)
    elif fell and listens:
        name = "no difference"
        text = said(
            "No better than the base: the rows' answers have become likelier ({figures}), but what it writes is no "
            "closer to them",
            figures=figures,
        )
    elif fell:
        name = "no difference"
        text = said(
            "No better than the base: it has the tone of your data ({figures}), but neither model's answers depend on "
            "the questions of these rows (do the rows' answers belong to their questions?)",
            figures=figures,
        )
    else:
        name = "no difference"
        text = said("No difference that {rows} rows could show ({figures})", rows=compared.rows, figures=figures)
    besides = [said("it forgot: {kept}", kept=kept)] if forgot else []
    besides += _harms(base, tuned, deaf=name == "worse")
    text += "".join(said("; {more}", more=more) for more in besides)
    few = tuned.loss < base.loss and (tuned.exact or 0) * compared.short < _FEW_RIGHT * compared.answered
    after = [_right(base, tuned, compared)]
    if few:
        after.append(said("A lower loss does not yet mean right answers: read them side by side"))
    for sentence in after:
        text = said("{text}. {sentence}", text=text, sentence=sentence)
    return Verdict(name, said("{sentence}.", sentence=text), reserved=few or bool(besides))


def has_forgotten(general: Sequence[Kept]) -> bool:
    """Whether more general questions are lost than by chance: of all, or of those in one language."""
    every = sum(one.lost for one in general), sum(one.gained for one in general)
    pairs = [every, *((one.lost, one.gained) for one in general)]
    return any(lost - gained >= 5 and _chance(lost, gained) < 0.05 for lost, gained in pairs)


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


def _kept(general: Sequence[Kept]) -> str:
    """How many general questions are answered rightly, before and after; by language where there are several."""
    text = said(
        "general questions {base} → {tuned} of {asked} right",
        base=sum(one.base for one in general),
        tuned=sum(one.tuned for one in general),
        asked=sum(one.asked for one in general),
    )
    if len(general) < 2:
        return text
    parts = (
        said(
            "{language} {base} → {tuned} of {asked}",
            language=one.called,
            base=one.base,
            tuned=one.tuned,
            asked=one.asked,
        )
        for one in general
    )
    return said("{total}: {parts}", total=text, parts=said(", ").join(parts))


def _right(base: Side, tuned: Side, compared: Compared) -> str:
    """What is known of right answers."""
    like = said(
        "likeness to the rows' own answers {base:.0%} → {tuned:.0%} (100% is the same text)",
        base=base.likeness,
        tuned=tuned.likeness,
    )
    if base.exact is None or tuned.exact is None:
        return said("Right answers: {like}", like=like)
    return said(
        "Right answers: {n} of {all} short held-out answers say what their row says, {before} before; {like}",
        n=round(tuned.exact * compared.short),
        all=compared.short,
        before=round(base.exact * compared.short),
        like=like,
    )


def _harms(base: Side, tuned: Side, *, deaf: bool) -> Iterator[str]:
    """What speaks against a model beside its verdict; how it listens only where it is not called worse already."""
    if not deaf and base.listening_interval[0] > 0 and tuned.listening < _LISTENS_LESS * base.listening:
        yield said(
            "its answers depend less on the questions: likelier after their own by {tuned:.2f} nats per token, "
            "{base:.2f} before",
            tuned=tuned.listening,
            base=base.listening,
        )
    if tuned.copied is not None and tuned.copied > max(_COPIES, 2 * (base.copied or 0)):
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
