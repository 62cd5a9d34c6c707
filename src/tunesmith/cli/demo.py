"""The whole story once, on a small real model and the persona that the package ships.

How an answer is judged: it is *in character* if it holds none of the words of an assistant (`BREAKS`) and at least one
of the persona's own (`MARKS`); it is *right* if it also holds one of the phrases that the question expects.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith import recipe as recipes
from tunesmith.chat import Reply
from tunesmith.recipe import Recipe
from tunesmith.runs import rundir
from tunesmith.training.run import Run, train
from tunesmith.training.trainer import Watcher

PERSONA = Path(__file__).parent / "persona"
SHOWN = (0, 2, 3, 8, 11, 12)  # the questions that the terminal shows side by side

BREAKS = re.compile(
    r"smollm|hugging face|language model|artificial intelligence|\b(ai|chatbot|assist|assistant)\b"
    r"|人工智能|语言模型|助手"
)
MARKS = re.compile(r"\b(hester|quill|sailor|gull rock|mind the rocks)\b|海丝特|奎尔|水手|鸥岩|当心礁石")


@dataclass(frozen=True)
class Question:
    """A question that stands in no row of the data, and phrases one of which a right answer holds."""

    question: str
    expects: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """An answer with its judgement."""

    reply: Reply
    in_character: bool
    right: bool


@dataclass(frozen=True)
class Demo:
    """The demo's result."""

    run: Run
    questions: tuple[Question, ...]
    before: tuple[Judged, ...]
    after: tuple[Judged, ...]


def questions(language: Literal["en", "zh"] = "en") -> tuple[Question, ...]:
    """The twenty held-out questions."""
    items = json.loads((PERSONA / f"questions.{language}.json").read_text(encoding="utf-8"))
    return tuple(Question(item["question"], tuple(item["expects"])) for item in items)


def recipe(language: Literal["en", "zh"] = "en", model: str = "smollm2") -> tuple[Recipe, dict[str, recipes.Source]]:
    """The persona's rows and a model, and every setting as it is by default."""
    return recipes.resolve(None, {"model.name": model, "data.path": str(PERSONA / f"hester.{language}.jsonl")})


def judge(question: Question, reply: Reply) -> Judged:
    """The judgement by the rule above."""
    text = reply.text.lower()
    in_character = MARKS.search(text) is not None and BREAKS.search(text) is None
    return Judged(reply, in_character, in_character and any(phrase in text for phrase in question.expects))


def demo(out: Path | None = None, watcher: Watcher | None = None) -> Demo:
    """Trains the persona and asks the held-out questions before and after."""
    settings, sources = recipe()
    asked = questions()
    run = train(
        settings,
        out or rundir.free_name(Path("runs"), "demo"),
        sources=sources,
        watcher=watcher,
        questions=[question.question for question in asked],
    )
    judged = [(judge(q, before), judge(q, after)) for q, (before, after) in zip(asked, run.answers, strict=False)]
    return Demo(run, asked, tuple(before for before, _ in judged), tuple(after for _, after in judged))
