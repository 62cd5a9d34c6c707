"""Is a tuned model better than its base? The rules by which that is said, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Name = Literal["better", "learned, but forgot", "too few rows", "no difference", "worse"]

LEAST_ROWS = 10
"""Held-out rows without which nothing is called better."""
_LOST = 1 / 5
"""A model that has lost more than this share of its general answers is worse, whatever it has learned."""

RULES: tuple[tuple[str, str], ...] = (
    (
        "worse",
        "the loss of the held-out replies rose; or it has unlearned to listen: they are no likelier after their own "
        "question than after another row's although they are for the base, or less than half as much as for the base; "
        "or it forgot more than a fifth of what the base answers rightly",
    ),
    (
        "too few rows",
        f"fewer than {LEAST_ROWS} rows are held out: what so few say of the others is chance",
    ),
    (
        "learned, but forgot",
        "the loss fell and the replies are likelier after their own question; but of a hundred general questions it "
        "answers fewer rightly, by at least five, and a sign test gives that less than one chance in twenty",
    ),
    ("better", "the loss fell, the replies are likelier after their own question, and nothing was forgotten"),
    ("no difference", "none of these"),
)
"""Each verdict with what must hold for it; the first that does is given."""

MEANINGS: tuple[tuple[str, str], ...] = (
    (
        "rose, fell, likelier",
        "the interval in which the mean lies in 95 of 100 draws of rows is wholly on one side of zero",
    ),
    ("less than half as much", "that interval is wholly below half of the base's mean"),
    (
        "it copies",
        "more than half of the long runs of words in its replies stand in training rows and not in the row's own "
        "answer, and twice as many as the base has",
    ),
    ("does not end", "fewer than nine of ten replies end by themselves, and fewer than the base's"),
    (
        "it repeats itself",
        "a tenth of what it writes stands earlier in the same reply, and twice as much as in the base's",
    ),
)
"""What the words of the rules mean, and those of what is said beside a verdict."""


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
    figures = f"loss {base.loss:.2f} → {tuned.loss:.2f} nats per token"
    listens, listened = tuned.listening_interval[0] > 0, base.listening_interval[0] > 0
    forgot = has_forgotten(lost, gained)
    kept = f"{tuned.general} general questions of 100 right, {base.general} before"
    harms = "".join(f"; {harm}" for harm in _harms(base, tuned))
    name: Name
    if change[0] > 0:
        name, said = "worse", f"Worse than the base: the loss rose on your data ({figures})"
    elif listened and not listens:
        name, said = "worse", "Worse than the base: its answers no longer depend on the questions"
    elif listened and tuned.listening_interval[1] < base.listening / 2:
        name, said = "worse", "Worse than the base: its answers depend on the questions less than half as much"
    elif forgot and lost - gained > _LOST * base.general:
        name, said = "worse", f"Worse than the base: it forgot more than a fifth of what that knows ({kept})"
        forgot = False  # it is said
    elif rows < LEAST_ROWS:
        name = "too few rows"
        said = f"{rows} held-out rows are too few to say more than {figures}: at least {LEAST_ROWS} are needed"
    elif change[1] < 0 and listens and forgot:
        name, said = "learned, but forgot", f"It learned your data ({figures}), but forgot: {kept}"
        forgot = False
    elif change[1] < 0 and listens:
        return Verdict("better", f"Better on your data ({figures}), nothing forgotten ({kept}){harms}.")
    elif change[1] < 0:
        name = "no difference"
        said = (
            f"No better than the base: it has the tone of your data ({figures}), but neither model's answers depend on "
            "the questions of these rows (do the rows' answers belong to their questions?)"
        )
    else:
        name, said = "no difference", f"No difference that {rows} rows could show ({figures})"
    return Verdict(name, f"{said}{f'; it forgot: {kept}' if forgot else ''}{harms}.")


def has_forgotten(lost: int, gained: int) -> bool:
    """Whether so many general questions lost, and so many gained, are more than chance."""
    return lost - gained >= 5 and _chance(lost, gained) < 0.05


def advice(verdict: Name, held_out: Sequence[tuple[float, float]], forgot: bool, listens: bool) -> Iterator[str]:
    """What follows from the figures: what to do next, where something can be done.

    `held_out`: epochs that had passed and the held-out loss then, as it was measured while it trained.
    """
    if forgot:
        yield "It forgot: train with more of train.rehearse, a lower train.learning_rate or fewer train.epochs."
    if verdict == "too few rows":
        yield "Hold out more rows (eval.hold_out), or name a file of others: --data FILE."
    if not listens:
        yield "Its answers do not depend on the questions: look at the rows whose answers fit other questions as well."
    if len(held_out) < 3:  # one is from before the training
        return
    epochs, losses = zip(*held_out, strict=True)
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[-1] > 1.01 * losses[best]:
        yield (
            f"The held-out loss was lowest after epoch {epochs[best]:.3g} ({losses[best]:.3f}) and is "
            f"{losses[-1]:.3f} now: train with eval.keep=best, or for fewer epochs."
        )
    elif losses[-1] < 0.97 * losses[-2]:
        yield f"The held-out loss was still falling ({losses[-2]:.3f} → {losses[-1]:.3f}): train for more epochs."


def _harms(base: Side, tuned: Side) -> Iterator[str]:
    if tuned.copied is not None and tuned.copied > max(0.5, 2 * (base.copied or 0)):
        yield f"it copies: {tuned.copied:.0%} of its long runs of words stand in training rows"
    if tuned.stopped < min(0.9, base.stopped):
        yield f"only {tuned.stopped:.0%} of its answers end by themselves, {base.stopped:.0%} before"
    if tuned.repetition > max(0.1, 2 * base.repetition):
        yield f"it repeats itself: {tuned.repetition:.0%} of what it writes"


def _chance(lost: int, gained: int) -> float:
    """Of losing at least so many of the questions that changed, were losing and gaining equally likely (sign test)."""
    n = lost + gained
    return sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n
